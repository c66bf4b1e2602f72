"""The forms of the values in a research checkpoint's config.json, checked before they are read."""

from collections.abc import Iterator, Mapping
from typing import Any

from speculators.errors import ConversionError, printable
from speculators.families.research.keys import CANONICAL, NESTED, SPELLINGS

__all__ = ["check_forms"]

ROPE = {"rope_parameters", "rope_scaling"}
"""Objects that may hold one object for each type of layer."""

OBJECTS = {
    *ROPE,
    "dflash_config",
    "dspark_config",
    "eagle_config",
    "speculators_config",
    "transformer_layer_config",
}

WORDS = {"architectures", "exported_zeros", "layer_types"}

LISTS = {"proposal_methods"}

SINGLE = {
    *SPELLINGS,
    *CANONICAL,
    "block_size",
    "draft_vocab_size",
    "intermediate_size_mlp",
    "mask_token_id",
    "model_type",
    "num_aux_hidden_states",
    "pard_token",
    "partial_rotary_factor",
    "ptd_token_id",
    "rope_type",
    "target_hidden_size",
    "target_vocab_size",
    "type",
    "vocab_size",
}
"""Keys of one number or word."""


def check_forms(config: Mapping[str, Any], where: str) -> None:
    """Check that keys that are read have a value of the right form; ``null`` is of any.

    Args:
        config: the parsed config.json.
        where: the file, for messages.

    Raises:
        ConversionError: naming the first key that has another.

    """
    for path, value in _values(config):
        key = path.rpartition(".")[2]
        expected = (
            "a JSON object"
            if key in OBJECTS and not isinstance(value, dict)
            else "a list"
            if key in LISTS and not isinstance(value, list)
            else "a list of words"
            if key in WORDS and not _is_words(value)
            else "a single value"
            if key in SINGLE and isinstance(value, dict | list)
            else None
        )
        if expected and value is not None:
            raise ConversionError(
                f"{where}, key {path}: {printable(repr(value))} is not {expected}; correct the "
                "config."
            )


def _values(
    config: Mapping[str, Any], path: str = "", within: str = ""
) -> Iterator[tuple[str, Any]]:
    """The paths and values of the keys, and of those in the objects that are read."""
    for key, value in config.items():
        here = path + printable(key)
        of_type = within in ROPE and isinstance(value, dict) and key not in SINGLE
        if not of_type:
            yield here, value
        if isinstance(value, dict) and (of_type or key in OBJECTS or key in NESTED):
            yield from _values(value, f"{here}.", key)


def _is_words(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(it, str) for it in value)
    )
