"""What a checkpoint is, judged by its tensors with the table of ``registry``.

The converter uses it to refuse what it cannot convert, and ``inspect`` to say what a checkpoint is.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.families.family import Family
from speculators.families.foreign import CONVERTED
from speculators.families.registry import family_named, signatures
from speculators.families.signature import Signature

__all__ = ["Near", "Recognition", "listed", "recognise", "strip_prefix"]

PREFIXES = ("model.",)
"""Prefixes that some training code puts before every name."""

QUANTIZED = re.compile(
    r"(?P<module>.+)\.(qweight|qzeros|g_idx|weight_scale(_inv)?|weight_packed|input_scale|scales?"
    r"|SCB|absmax|quant_map|weight\..+)"
)
"""Names of the tensors that quantization stores in place of a module's ``weight``, or beside it."""


@dataclass(frozen=True, slots=True)
class Near:
    """How an unknown checkpoint differs from a known kind.

    Attributes:
        signature: that of the kind.
        found: part of the kind that the checkpoint has → its name in the checkpoint.
        missing: parts of the kind that the checkpoint lacks.
        excluded: a tensor that the checkpoint has, and the kind never has; else ``None``.

    """

    signature: Signature
    found: dict[str, str]
    missing: tuple[str, ...]
    excluded: str | None

    def __str__(self) -> str:
        """The difference as a clause."""
        signature = self.signature
        before = sorted({name.removesuffix(part) for part, name in self.found.items()} - {""})
        clauses = [
            f"of {signature.title} it has {len(self.found)} of {len(signature.parts)} tensors",
            f"with {' or '.join(before)} before their names" if before else "",
            f"but lacks {listed(self.missing)}" if self.missing else "",
            f"but also has {self.excluded}, which that never has" if self.excluded else "",
        ]
        return ", ".join(filter(None, clauses))


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a checkpoint is, and on what evidence.

    Attributes:
        signature: that of its kind; ``None`` if it is of no known kind.
        family: the family that it belongs to, if it can be converted.
        evidence: what shows the kind, each a clause that follows "since".
        quantized: what shows that the weights are quantized, likewise; empty if nothing does.
        near: for an unknown checkpoint, the kinds that it resembles, the nearest first.

    """

    signature: Signature | None
    family: Family | None
    evidence: tuple[str, ...]
    quantized: tuple[str, ...]
    near: tuple[Near, ...]


def recognise(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Recognition:
    """Say what a checkpoint is.

    Args:
        config: its config.json; only a hint, except for ``speculators_model_type``.
        tensors: its tensors, by their stored names; if empty, the config alone decides.

    """
    stored = {strip_prefix(name): info for name, info in tensors.items()}
    quantized = [info.name for name, info in stored.items() if QUANTIZED.fullmatch(name)]
    quantization = [f"it has {listed(quantized)}"] if quantized else []
    if config.get("quantization_config"):
        quantization.append("config.json has a quantization_config")
    # Judge a quantized module by the name that its weight had before.
    whole = {QUANTIZED.sub(r"\g<module>.weight", name): info for name, info in stored.items()}

    for signature, family in signatures():
        evidence = _evidence(signature, config, whole)
        if evidence:
            written = family_named(config.get("speculators_model_type"))
            if signature is CONVERTED and written and written.converts_again(config):
                return Recognition(
                    written.signature, written, tuple(evidence), tuple(quantization), ()
                )
            return Recognition(signature, family, tuple(evidence), tuple(quantization), ())
    return Recognition(None, None, (), tuple(quantization), _nearest(whole))


def strip_prefix(name: str) -> str:
    """A stored name without any of ``PREFIXES``."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def listed(names: Collection[str], at_most: int = 4) -> str:
    """The first names in sorted order, and how many more there are."""
    shown = sorted(names)[:at_most]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _evidence(
    signature: Signature, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """What shows that a checkpoint is of a kind; empty if it is not."""
    hints = _hints(signature, config)
    if signature.decisive or not tensors:
        return hints if len(hints) == len(signature.hints) > 0 else []
    marks = [info.name for name, info in tensors.items() if re.fullmatch(signature.marks, name)]
    fc = tensors.get("fc.weight")
    evidence = [f"it has {listed(marks)}"] if marks else []
    if fc is not None and signature.fc_inputs == _inputs(fc):
        evidence.append(
            f"{fc.name} {describe_shape(fc.shape)} takes {signature.fc_inputs} hidden sizes"
        )
    if not evidence or signature.lacks in tensors:
        return []
    if signature.lacks is not None:
        evidence.append(f"it has no {signature.lacks}")
    return evidence + hints


def _inputs(fc: TensorInfo) -> float:
    """The ratio of inputs to outputs of ``fc``; 0 if it is not a matrix."""
    return fc.shape[1] / fc.shape[0] if len(fc.shape) == 2 and fc.shape[0] else 0


def _hints(signature: Signature, config: Mapping[str, Any]) -> list[str]:
    hints = []
    for key, pattern in signature.hints.items():
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        fitting = [it for it in values if it is not None and re.fullmatch(pattern, str(it))]
        if fitting:
            hints.append(f"config.json says {key} {fitting[0]}")
    return hints


def _nearest(tensors: Mapping[str, TensorInfo]) -> tuple[Near, ...]:
    """The kinds some of whose parts are there, perhaps under longer names."""
    near: list[Near] = []
    for signature, _ in signatures():
        found = {
            part: info.name
            for part in signature.parts
            for name, info in tensors.items()
            if f".{name}".endswith(f".{part}")
        }
        if found:
            missing = tuple(part for part in signature.parts if part not in found)
            excluded = signature.lacks if signature.lacks in tensors else None
            near.append(Near(signature, found, missing, excluded))
    near.sort(key=lambda it: len(it.missing) / len(it.signature.parts))
    # A kind with most of its parts missing is worth mentioning only if it is the nearest.
    return tuple(it for it in near if it is near[0] or len(it.found) >= len(it.missing))
