"""What a checkpoint is, judged by its tensors with the table of ``registry``.

The converter uses it to refuse what it cannot convert, and ``inspect`` to say what a checkpoint is.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from speculators.checkpoint.tensor import FLOATS, TensorInfo, describe_shape
from speculators.errors import listed
from speculators.families.family import Family
from speculators.families.foreign import CONVERTED, DRAFT_IN_MODEL
from speculators.families.registry import families, family_named, signatures
from speculators.families.research.fused import unfused
from speculators.families.research.rope_names import is_rope_table
from speculators.families.signature import Signature

__all__ = ["Names", "Near", "Recognition", "recognise", "short_names"]

USUAL_PREFIX = "model."
"""What transformers' own code puts before the names, of all tensors or all but some."""

BESIDE = {"lm_head.weight", "d2t", "t2d"}
"""What may lie beside a draft that is a part of a model, without the prefix of its names."""

WRAPPERS = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names."""

MOST_TENSORS = 10_000
"""No draft has more."""

LAYERS = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")

FUSION = "fc.weight"
"""The matrix that shows where the names of a draft begin."""

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
            f"but lacks {listed(sorted(self.missing))}" if self.missing else "",
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
    names = short_names(tensors)
    stored = {short: tensors[name] for name, short in names.short.items()}
    quantized = [info.name for name, info in stored.items() if QUANTIZED.fullmatch(name)]
    quantization = [f"it has {listed(sorted(quantized))}"] if quantized else []
    if config.get("quantization_config") and not (tensors and _are_plain(stored)):
        quantization.append("config.json has a quantization_config")
    # Judge a quantized module by the name that its weight had before.
    whole = (
        {QUANTIZED.sub(r"\g<module>.weight", name): info for name, info in stored.items()}
        if quantized
        else stored
    )
    # A head of rank 0 is none.
    whole = {name: info for name, info in whole.items() if info.elements or not info.shape}
    inside = None if names.exact else _draft_inside(whole)

    for signature, family in signatures():
        evidence = _evidence(signature, config, whole)
        if signature is DRAFT_IN_MODEL and inside is not None:
            evidence = [inside]
        if evidence:
            written = family_named(config.get("speculators_model_type"))
            if signature is CONVERTED and written and written.converts_again(config):
                return Recognition(
                    written.signature, written, tuple(evidence), tuple(quantization), ()
                )
            return Recognition(signature, family, tuple(evidence), tuple(quantization), ())
    return Recognition(None, None, (), tuple(quantization), _nearest(whole))


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a checkpoint's tensors without what training code put before them.

    Attributes:
        short: stored name → short name.
        prefix: what was taken off all of them, or all but those of ``BESIDE``; may be empty.
        exact: whether the short names are exactly those of a family.

    """

    short: dict[str, str]
    prefix: str
    exact: bool


def short_names(stored: Collection[str]) -> Names:
    """The names without a prefix.

    ``model.`` is taken off wherever it is, and a prefix that all names share, perhaps but those of
    ``BESIDE``, whatever it is, if it leaves exactly the tensors of a family, or else those of a
    kind that is known by its names.
    """
    inner = {name: WRAPPERS.sub("", name) if "._" in name else name for name in stored}

    def without(prefix: str) -> dict[str, str]:
        return {
            name: it.removeprefix(prefix).removeprefix(USUAL_PREFIX) for name, it in inner.items()
        }

    if len(inner) > MOST_TENSORS:
        return Names(without(""), "", exact=False)
    within = [name for name in inner.values() if name not in BESIDE]
    shortened = {prefix: without(prefix) for prefix in _common_prefixes(within)}
    for prefix, short in shortened.items():
        if any(_is_exact(family, short.values()) for family in families()):
            return Names(short, prefix, exact=True)
    for prefix, short in shortened.items():
        if any(
            re.fullmatch(signature.marks, name)
            for signature, _ in signatures()
            if not signature.alone
            for name in short.values()
        ):
            return Names(short, prefix, exact=False)
    return Names(shortened[""], "", exact=False)


def _common_prefixes(names: Collection[str]) -> list[str]:
    """The prefixes, of whole parts, that all names share: the empty one first."""
    first, last = (
        name.split(".")[:-1] for name in (min(names, default=""), max(names, default=""))
    )
    shared = [
        one for one, _ in takewhile(lambda it: it[0] == it[1], zip(first, last, strict=False))
    ]
    return ["".join(f"{part}." for part in shared[:count]) for count in range(len(shared) + 1)]


def _is_exact(family: Family, short: Collection[str]) -> bool:
    """Whether these are all tensors of a draft of a family, and nothing else."""
    named = {family.names.in_format(part) for name in short for part in unfused(name)}
    pattern = {spec: spec.pattern for spec in family.tensors}
    known = {
        spec: {name for name in named if found.fullmatch(name)} for spec, found in pattern.items()
    }
    single = [it for it in family.tensors if it.feature is None and "{" not in it.name]
    if not all(known[spec] for spec in single):
        return False
    return all(
        is_rope_table(name) or any(re.fullmatch(form, name) for form in family.omissions)
        for name in named - set().union(*known.values())
    )


def _draft_inside(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What shows that a draft's tensors are among others; ``None`` if that is not so."""
    if len(tensors) > MOST_TENSORS:
        return None
    starts = {name.removesuffix(FUSION) for name in tensors if f".{name}".endswith(f".{FUSION}")}
    for start in sorted(starts):
        inside = {name for name in tensors if name.startswith(start)}
        if not start:
            inside = {name for name in tensors if name.split(".")[0] in {"fc", "layers"}}
        others = tensors.keys() - inside
        if any(LAYERS.search(name) for name in others) and any(
            _is_exact(family, [name.removeprefix(start) for name in inside])
            for family in families()
        ):
            fusion = tensors[start + FUSION].name
            return f"{fusion} is a draft's, and {listed(sorted(others), 1)} are not"
    return None


def _are_plain(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether all weights are floating-point numbers, and none is split into quantized parts."""
    return all(
        info.dtype in FLOATS or not name.endswith(("weight", "bias"))
        for name, info in tensors.items()
    ) and not any(QUANTIZED.fullmatch(name) for name in tensors)


def _evidence(
    signature: Signature, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """What shows that a checkpoint is of a kind; empty if it is not."""
    hints = _hints(signature, config)
    if signature.decisive or not tensors:
        return hints if len(hints) == len(signature.hints) > 0 else []
    is_mark = re.compile(signature.marks).fullmatch
    marks = [info.name for name, info in tensors.items() if is_mark(name)]
    shown = [f"it has {listed(sorted(marks))}"] if marks else []
    if signature.alone and len(marks) != len(tensors):
        return []
    fc, query = tensors.get(FUSION), tensors.get("layers.0.self_attn.q_proj.weight")
    output = tensors.get("layers.0.self_attn.o_proj.weight")
    wide = fc is not None and signature.fc_inputs == _ratio(fc.shape[1:], fc.shape[:1])
    if fc is not None and wide:
        shown.append(
            f"{fc.name} {describe_shape(fc.shape)} takes {signature.fc_inputs} hidden sizes"
        )
    if (
        (signature.both and not (marks and wide))
        or (signature.hinted and len(hints) < len(signature.hints))
        or not all(_match(pattern, tensors) for pattern in signature.needs)
        or _match(signature.never, tensors)
    ):
        return []
    if (
        query is not None
        and output is not None
        and signature.attention_inputs == _ratio(query.shape[1:], output.shape[:1])
    ):
        shown.append(
            f"{query.name} {describe_shape(query.shape)} takes {signature.attention_inputs} "
            "hidden sizes"
        )
    if not shown or signature.lacks in tensors:
        return []
    if signature.lacks is not None:
        shown.append(f"it has no {signature.lacks}")
    return shown + hints


def _match(pattern: str, tensors: Collection[str]) -> bool:
    """Whether a pattern matches one of the names."""
    return any(map(re.compile(pattern).fullmatch, tensors))


def _ratio(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> float:
    """The ratio of a matrix's inputs to outputs; 0 if it is not a matrix."""
    return inputs[0] / outputs[0] if len(inputs) == len(outputs) == 1 and outputs[0] else 0


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
