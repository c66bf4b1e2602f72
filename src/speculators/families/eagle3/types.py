"""The types of an EAGLE-3 config's keys, so that the string "false" is not taken for true."""

from typing import Any

from speculators.errors import ConversionError
from speculators.families.eagle3.publishers import eagle_config
from speculators.families.family import Source

__all__ = ["check_types"]

TRUE_OR_FALSE = (
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "use_aux_norm",
    "norm_output",
    "return_hidden_post_norm",
    "use_aux_hidden_state",
    "embed_requires_grad",
)
WHOLE_NUMBERS = ("draft_vocab_size", "target_hidden_size", "num_aux_hidden_states")


def check_types(source: Source) -> None:
    """Refuse keys whose values are of another type, such as the string "false".

    Raises:
        ConversionError: naming the first such key.

    """
    config = source.checkpoint.config
    for prefix, keys in (("", config), ("eagle_config.", eagle_config(config))):
        for key, value in keys.items():
            if value is not None and (expected := _expected(key, value)):
                raise ConversionError(
                    f"{source.checkpoint.config_file}, key {prefix}{key}: {value!r} is not "
                    f"{expected}; correct the config."
                )


def _expected(key: str, value: Any) -> str | None:
    """What a key should be, if its value is something else."""
    if key in TRUE_OR_FALSE and not isinstance(value, bool):
        return "true or false"
    if key in WHOLE_NUMBERS and (type(value) is not int or value < 1):
        return "a whole number over 0"
    return None
