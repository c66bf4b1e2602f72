"""What checkpoints look like: the tables that tell one family from another by its tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from speculators.checkpoint.tensor import TensorInfo

__all__ = [
    "OMISSIONS",
    "PREFIXES",
    "Family",
    "reason_to_leave_out",
    "recognise_other_family",
    "strip_prefix",
]

PREFIXES = ("model.",)
"""What some training codes put before every name."""

OMISSIONS = {
    r"lm_head\.weight": "logits come from the verifier's own head",
    r"layers\.0\.self_attn\.rotary_emb\.inv_freq": "it is computed from the config",
}
"""Tensors that a checkpoint may have and the format leaves out, and why."""


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint that `convert eagle` does not take.

    Attributes:
        name: what it is, for the message.
        names: a pattern of tensor names, any of which shows the family.
        advice: what the user can do.
        lacks: a tensor that must not be there.
        fc_inputs: how many hidden sizes ``fc`` takes, where that alone shows the family.

    """

    name: str
    names: str
    advice: str
    lacks: str | None = None
    fc_inputs: int | None = None


OTHER_FAMILIES = (
    Family(
        "quantized weights",
        r".*(\.(qweight|qzeros|g_idx|weight_scale(_inv)?|weight_packed|input_scale|scales?|SCB"
        r"|absmax|quant_map)|\.weight\..*)",
        "convert the original, unquantized checkpoint",
    ),
    Family(
        "an EAGLE-3 draft",
        r"d2t|t2d|midlayer\..*|layers\.0\.hidden_norm\.weight",
        "EAGLE-3 needs another format; vLLM and SGLang serve EAGLE-3 drafts as published",
        fc_inputs=3,
    ),
    Family(
        "a whole language model",
        r"layers\.0\.input_layernorm\.weight",
        "give the draft as INPUT, and the language model as BASE_MODEL",
        lacks="fc.weight",
    ),
    Family(
        "a draft of several layers",
        r"layers\.[1-9]\d*\..*",
        "EAGLE-1, EAGLE-2 and HASS drafts have one layer",
    ),
    Family(
        "Medusa heads",
        r"(medusa_head\.)?\d+\.\d+\.(linear\.)?weight",
        "only EAGLE-1, EAGLE-2 and HASS drafts are converted",
    ),
    Family(
        "an MLP speculator",
        r"(speculator\.)?(emb|proj|head|ln)\.\d+\..*",
        "only EAGLE-1, EAGLE-2 and HASS drafts are converted",
    ),
)


def reason_to_leave_out(name: str) -> str | None:
    """Why the tensor called ``name`` (without prefix) is left out; ``None`` if it is not."""
    return next((why for form, why in OMISSIONS.items() if re.fullmatch(form, name)), None)


def recognise_other_family(
    tensors: Mapping[str, TensorInfo],
) -> tuple[Family, list[str]] | None:
    """The first of ``OTHER_FAMILIES`` that these tensors (without prefix) show, and which do."""
    for family in OTHER_FAMILIES:
        if family.lacks in tensors:
            continue
        evidence = [name for name in tensors if re.fullmatch(family.names, name)]
        if not evidence and _fc_inputs(tensors) == family.fc_inputs is not None:
            evidence = ["fc.weight"]
        if evidence:
            return family, evidence
    return None


def strip_prefix(name: str) -> str:
    """A stored name without any of ``PREFIXES``."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _fc_inputs(tensors: Mapping[str, TensorInfo]) -> float | None:
    fc = tensors.get("fc.weight")
    return fc.shape[1] / fc.shape[0] if fc and len(fc.shape) == 2 and fc.shape[0] else None
