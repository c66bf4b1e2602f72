"""How two checkpoints differ, as pydantic models.

The JSON schema in docs/diff.schema.json is made from these models.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from speculators.checkpoint.progress import Progress, silent
from speculators.checkpoint.tensor import PlannedTensor
from speculators.comparison.numbers import compare_numbers, largest_value
from speculators.comparison.side import Side

__all__ = ["Computation", "ConfigDifference", "Difference", "TensorDifference", "compare"]

WITHOUT_EFFECT = frozenset({"embed_requires_grad", "num_target_layers"}) | frozenset(
    f"transformer_layer_config.{key}"
    for key in (
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "max_window_layers",
        "num_aux_hidden_states",  # follows from eagle_aux_hidden_state_layer_ids
        "pad_token_id",
        "pretraining_tp",
        "use_cache",
    )
)
"""Keys that the draft does not compute with."""


class CheckpointSummary(BaseModel):
    """One of the two checkpoints."""

    name: str
    """The directory, file or Hub id, as it was given."""
    commit: str | None
    """Of a checkpoint on the Hub; ``None`` for a directory."""
    title: str
    """What it is."""
    family: str | None
    """The family of the draft; ``None`` if it belongs to none."""
    in_format: bool
    """Whether its names and config are compared as the format has them; otherwise as they are."""


class StoredTensor(BaseModel):
    """A tensor of one of the two."""

    name: str
    """Its name there, or what it is made of."""
    dtype: str
    """As the safetensors format calls it."""
    shape: list[int]
    """Sizes, outermost first."""


class TensorDifference(BaseModel):
    """A tensor, and how the two checkpoints differ in it."""

    name: str
    """Its name in the format."""
    result: Literal[
        "same", "same values", "rounded", "different", "other shape", "only in a", "only in b"
    ]
    """``same``, byte for byte; the ``same values`` in another dtype; ``rounded``, one is the other
    rounded to its dtype; ``different`` values; and so on."""
    a: StoredTensor | None
    b: StoredTensor | None
    differing: int = 0
    """How many of its elements differ."""
    largest_difference: float | None = None
    """The largest difference of two elements; ``None`` where one of them is not a number."""
    largest_value: float | None = None
    """The largest absolute value of any element, to judge the difference by; 0 of a tensor that
    only one of the two has means that it has no effect."""


class ConfigDifference(BaseModel):
    """A key of the config that differs."""

    key: str
    """Of the format's config.json, with dots between levels."""
    a: Any
    b: Any
    computed_with: bool
    """Whether the draft computes with it: then the two are not the same draft."""


class Computation(BaseModel):
    """What the two compute from the same random inputs, in float32."""

    same: bool
    """Whether the outputs are equal up to rounding."""
    largest_difference: float
    """Of the drafts' last hidden states and logits; a head that they lack is random, too."""
    largest_value: float
    """The largest of these, to judge the difference by."""


class Difference(BaseModel):
    """How two checkpoints differ."""

    a: CheckpointSummary
    b: CheckpointSummary
    same: bool
    """Whether all tensors are the same byte for byte, and all keys that a draft computes with.

    Never if the config of only one of them can be read as that of a draft."""
    tensors: list[TensorDifference]
    """All tensors, also those that are the same."""
    config: list[ConfigDifference]
    """The keys that differ."""
    computation: Computation | None = None
    """Only with --compute."""
    notes: list[str] = Field(default_factory=list)
    """What could not be compared, and what only one of the two stores without effect."""


def compare(a: Side, b: Side, *, progress: Progress = silent) -> Difference:
    """Compare two checkpoints.

    Args:
        a: one of them.
        b: the other.
        progress: reports the bytes compared.

    Raises:
        CheckpointError: if a tensor cannot be read.

    """
    common = [name for name in a.tensors if name in b.tensors]
    advance = progress("Comparing", sum(a.tensors[name].nbytes for name in common))
    tensors = []
    for name in [*a.tensors, *(it for it in b.tensors if it not in a.tensors)]:
        tensors.append(_compare_tensor(name, a.tensors.get(name), b.tensors.get(name)))
        if name in common:
            advance(a.tensors[name].nbytes)
    config = _compare_configs(a, b)
    return Difference(
        a=_summary(a),
        b=_summary(b),
        same=a.planned == b.planned
        and all(it.result == "same" for it in tensors)
        and not any(it.computed_with for it in config),
        tensors=tensors,
        config=config,
        notes=[*a.notes, *b.notes, *_left_out(a, b)],
    )


def _compare_tensor(
    name: str, a: PlannedTensor | None, b: PlannedTensor | None
) -> TensorDifference:
    stored: dict[str, Any] = {"name": name, "a": _stored(a), "b": _stored(b)}
    if a is None or b is None:
        (there,) = (it for it in (a, b) if it is not None)
        return TensorDifference(
            result="only in a" if b is None else "only in b",
            **stored,
            largest_value=largest_value(there),
        )
    if a.shape != b.shape:
        return TensorDifference(result="other shape", **stored)
    numbers = compare_numbers(a, b)
    if numbers.result == "same":
        return TensorDifference(result="same", **stored)
    return TensorDifference(
        result=numbers.result,
        **stored,
        differing=numbers.differing,
        largest_difference=numbers.largest if numbers.largest != float("inf") else None,
        largest_value=numbers.of,
    )


def _stored(tensor: PlannedTensor | None) -> StoredTensor | None:
    if tensor is None:
        return None
    return StoredTensor(name=tensor.label, dtype=tensor.dtype, shape=list(tensor.shape))


def _compare_configs(a: Side, b: Side) -> list[ConfigDifference]:
    """Compare the configs: where only one is the format's, the keys of the layer that both have."""
    ours, theirs = a.config, b.config
    if a.planned != b.planned:
        raw, known = (b, a) if a.planned else (a, b)
        # In the format, or flat as in research.
        layer = {f"transformer_layer_config.{key}": it for key, it in raw.config.items()}
        layer |= raw.config
        shared = {key: it for key, it in layer.items() if key in known.config}
        ours, theirs = (
            (shared, {key: b.config[key] for key in shared})
            if raw is a
            else ({key: a.config[key] for key in shared}, shared)
        )
    return [
        ConfigDifference(
            key=key,
            a=ours.get(key),
            b=theirs.get(key),
            computed_with=key not in WITHOUT_EFFECT,
        )
        for key in [*ours, *(it for it in theirs if it not in ours)]
        if ours.get(key) != theirs.get(key)
    ]


def _left_out(a: Side, b: Side) -> list[str]:
    """What one stores, and the format has no place for."""
    return [
        f"{side.checkpoint.name} stores {name}, which is not compared: {why}"
        for side in (a, b)
        for name, why in side.left_out.items()
    ]


def _summary(side: Side) -> CheckpointSummary:
    return CheckpointSummary(
        name=side.checkpoint.name,
        commit=side.checkpoint.commit,
        title=side.title,
        family=side.family.name if side.family else None,
        in_format=side.planned,
    )
