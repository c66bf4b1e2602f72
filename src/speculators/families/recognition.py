"""Families of checkpoints, told apart by their tensors with one table.

The converter uses it to refuse what it cannot convert, and ``inspect`` to say what a checkpoint is.
A new family is a new row.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.format.tensors import required_tensors

__all__ = ["FAMILIES", "Family", "Near", "Recognition", "listed", "recognise", "strip_prefix"]

PREFIXES = ("model.",)
"""Prefixes that some training code puts before every name."""

NEVER = r"(?!)"

QUANTIZED = re.compile(
    r"(?P<module>.+)\.(qweight|qzeros|g_idx|weight_scale(_inv)?|weight_packed|input_scale|scales?"
    r"|SCB|absmax|quant_map|weight\..+)"
)
"""Names of the tensors that quantization stores in place of a module's ``weight``, or beside it."""


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint, and how to recognise it.

    Attributes:
        kind: its name for programs.
        name: its name in messages, as it follows "holds".
        marks: a pattern of tensor names; one match is enough to show the family.
        fc_inputs: the input width of ``fc``, in hidden sizes; this, too, is enough on its own.
        lacks: a tensor that it never has.
        hints: key of config.json → a pattern of its value. Hints that match are added to the
            evidence; without tensors to judge by, the family is assumed if all of them match.
        decisive: whether the hints alone decide, whatever the tensors are.
        parts: tensors that every such checkpoint has; an unknown checkpoint is compared with them.
        advice: what to do instead of converting it; ``None`` for a family that is converted.

    """

    kind: str
    name: str
    marks: str = NEVER
    fc_inputs: int | None = None
    lacks: str | None = None
    hints: Mapping[str, str] = field(default_factory=dict)
    decisive: bool = False
    parts: tuple[str, ...] = ()
    advice: str | None = None


FAMILIES = (
    Family(
        "speculators",
        "a draft in the speculators format",
        hints={"speculators_model_type": r".+"},
        decisive=True,
        advice="it is converted already: load it with EagleSpeculator.from_pretrained",
    ),
    Family(
        "eagle3",
        "an EAGLE-3 draft",
        marks=r"d2t|t2d|midlayer\..*|layers\.0\.hidden_norm\.weight",
        fc_inputs=3,
        hints={"architectures": r".*Eagle3.*"},
        parts=("fc.weight", "midlayer.self_attn.q_proj.weight", "midlayer.hidden_norm.weight"),
        advice="EAGLE-3 needs another format; vLLM and SGLang serve EAGLE-3 drafts as published",
    ),
    Family(
        "language-model",
        "a whole language model",
        marks=(
            r"layers\.0\.input_layernorm\.weight|layers\.[1-9]\d*\..*|(transformer\.)?h\.\d+\..*"
            r"|(language_model\.(model\.)?|decoder\.|backbone\.|gpt_neox\.)layers\.\d+\..*"
        ),
        lacks="fc.weight",
        hints={"architectures": r".*ForCausalLM", "num_hidden_layers": r"[2-9]|\d\d+"},
        parts=("embed_tokens.weight", "layers.0.input_layernorm.weight", "norm.weight"),
        advice="give the draft as INPUT, and the language model as BASE_MODEL",
    ),
    Family(
        "several-layers",
        "a draft of several layers",
        marks=r"layers\.[1-9]\d*\..*",
        advice="EAGLE-1, EAGLE-2 and HASS drafts have one layer",
    ),
    Family(
        "medusa",
        "Medusa heads",
        marks=(
            r"(medusa_head\.)?\d+\.\d+\.(linear\.)?(weight|bias)"
            r"|blocks\.\d+\.layers\.\d+\.(weight|bias)"
        ),
        hints={"medusa_num_heads": r"\d+"},
        parts=("0.0.linear.weight", "0.0.linear.bias", "0.1.weight"),
        advice="only EAGLE-1, EAGLE-2 and HASS drafts are converted",
    ),
    Family(
        "mlp-speculator",
        "an MLP speculator",
        marks=r"(speculator\.)?(emb|proj|head|ln)\.\d+\..*",
        hints={"model_type": r"mlp_speculator"},
        parts=("emb.0.weight", "proj.0.weight", "ln.0.weight", "head.0.weight"),
        advice="only EAGLE-1, EAGLE-2 and HASS drafts are converted",
    ),
    Family(
        "eagle",
        "an EAGLE-1 or EAGLE-2 draft",
        marks=r"fc\.(weight|bias)|layers\.0\.(self_attn|mlp)\..*",
        fc_inputs=2,
        lacks="layers.0.input_layernorm.weight",
        hints={"num_hidden_layers": r"1"},
        parts=tuple(required_tensors(())),
    ),
)
"""All known families; a checkpoint belongs to the first one that it matches."""


@dataclass(frozen=True, slots=True)
class Near:
    """How an unknown checkpoint differs from a family.

    Attributes:
        family: the family.
        found: part of the family that the checkpoint has → its name in the checkpoint.
        missing: parts of the family that the checkpoint lacks.
        excluded: a tensor that the checkpoint has, and the family never has; else ``None``.

    """

    family: Family
    found: dict[str, str]
    missing: tuple[str, ...]
    excluded: str | None

    def __str__(self) -> str:
        """The difference as a clause."""
        before = sorted({name.removesuffix(part) for part, name in self.found.items()} - {""})
        clauses = [
            f"of {self.family.name} it has {len(self.found)} of {len(self.family.parts)} tensors",
            f"with {' or '.join(before)} before their names" if before else "",
            f"but lacks {listed(self.missing)}" if self.missing else "",
            f"but also has {self.excluded}, which that never has" if self.excluded else "",
        ]
        return ", ".join(filter(None, clauses))


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a checkpoint is, and on what evidence.

    Attributes:
        family: ``None`` if it is of no known family.
        evidence: what shows the family, each a clause that follows "since".
        quantized: what shows that the weights are quantized, likewise; empty if nothing does.
        near: for an unknown checkpoint, the families that it resembles, the nearest first.

    """

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

    for family in FAMILIES:
        evidence = _evidence(family, config, whole)
        if evidence:
            return Recognition(family, tuple(evidence), tuple(quantization), ())
    return Recognition(None, (), tuple(quantization), _nearest(whole))


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
    family: Family, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """What shows that a checkpoint belongs to a family; empty if it does not."""
    hints = _hints(family, config)
    if family.decisive or not tensors:
        return hints if len(hints) == len(family.hints) > 0 else []
    marks = [info.name for name, info in tensors.items() if re.fullmatch(family.marks, name)]
    fc = tensors.get("fc.weight")
    evidence = [f"it has {listed(marks)}"] if marks else []
    if fc is not None and family.fc_inputs == _inputs(fc):
        evidence.append(
            f"{fc.name} {describe_shape(fc.shape)} takes {family.fc_inputs} hidden sizes"
        )
    if not evidence or family.lacks in tensors:
        return []
    if family.lacks is not None:
        evidence.append(f"it has no {family.lacks}")
    return evidence + hints


def _inputs(fc: TensorInfo) -> float:
    """The ratio of inputs to outputs of ``fc``; 0 if it is not a matrix."""
    return fc.shape[1] / fc.shape[0] if len(fc.shape) == 2 and fc.shape[0] else 0


def _hints(family: Family, config: Mapping[str, Any]) -> list[str]:
    hints = []
    for key, pattern in family.hints.items():
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        fitting = [it for it in values if it is not None and re.fullmatch(pattern, str(it))]
        if fitting:
            hints.append(f"config.json says {key} {fitting[0]}")
    return hints


def _nearest(tensors: Mapping[str, TensorInfo]) -> tuple[Near, ...]:
    """The families some of whose parts are there, perhaps under longer names."""
    near: list[Near] = []
    for family in FAMILIES:
        found = {
            part: info.name
            for part in family.parts
            for name, info in tensors.items()
            if f".{name}".endswith(f".{part}")
        }
        if found:
            missing = tuple(part for part in family.parts if part not in found)
            excluded = family.lacks if family.lacks in tensors else None
            near.append(Near(family, found, missing, excluded))
    near.sort(key=lambda it: len(it.missing) / len(it.family.parts))
    # A family with most of its parts missing is worth mentioning only if it is the nearest.
    return tuple(it for it in near if it is near[0] or len(it.found) >= len(it.missing))
