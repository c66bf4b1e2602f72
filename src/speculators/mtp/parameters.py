"""Stored tensors and the parameters that they hold, whole, quantized or as one stack of experts."""

import re
from collections.abc import Collection

from speculators.mtp.experts import expert_of

__all__ = ["companion_of", "module_of", "parameters"]

_NUMBERS = re.compile(r"(?P<module>.+)\.(weight|qweight|weight_packed)")
"""What holds a matrix's numbers."""

_COMPANION = re.compile(
    r"(?P<module>.+)\.(weight_(scale|scale_inv|scale_2|global_scale|shape|zero_point|g_idx)"
    r"|(input|output|k|v)_scale|input_(global_scale|zero_point)|qzeros|scales?|biases|g_idx"
    r"|SCB|absmax|quant_map|weight\..+)"
)
"""What quantization stores beside it."""


def parameters(names: Collection[str]) -> set[str]:
    """The parameters that tensors hold: ``a.weight`` for all of a quantized ``a``'s.

    All experts' matrices of one kind are one parameter, in either layout.
    """
    found = set()
    for name in names:
        expert = expert_of(name)
        if expert:
            found |= {f"{expert.place}.{matrix}.weight" for matrix in expert.matrices}
        elif module := module_of(name):
            found.add(f"{module}.weight")
        elif not companion_of(name) and not name.endswith("rotary_emb.inv_freq"):
            found.add(name)
    return found


def module_of(name: str) -> str | None:
    """The module whose matrix a tensor holds; ``None`` if it holds something else."""
    found = _NUMBERS.fullmatch(name)
    return found["module"] if found else None


def companion_of(name: str) -> str | None:
    """The module whose quantization a tensor belongs to; ``None`` if it is no such tensor."""
    found = _COMPANION.fullmatch(name)
    return found["module"] if found else None
