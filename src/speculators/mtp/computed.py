"""Which MTPs are computed here: known without torch, before anything large is loaded."""

from collections.abc import Mapping
from typing import Any

from speculators.checkpoint.tensor import TensorInfo
from speculators.errors import FormatError
from speculators.mtp.find import Mtp
from speculators.mtp.quantization import WHOLE
from speculators.mtp.types import model_types

__all__ = ["computed_as"]

COMPUTED = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
"""The ``model_type`` of the verifiers, without ``_text``."""


def computed_as(
    name: str, config: Mapping[str, Any], mtp: Mtp, tensors: Mapping[str, TensorInfo]
) -> str:
    """In which kind of verifier's layer an MTP is computed.

    Args:
        name: of the checkpoint, for messages.
        config: its config.json.
        mtp: its MTP.
        tensors: of the MTP; only their dtypes are looked at.

    Returns:
        one of ``COMPUTED``.

    Raises:
        FormatError: if it is of another kind, has several layers, or is quantized.

    """
    kind = next((it for it in COMPUTED if it in model_types(config)), None)
    odd = next((it for it in tensors.values() if it.dtype not in WHOLE), None)
    if kind is not None and mtp.layers == 1 and odd is None:
        return kind
    what = (
        f"is for {' or '.join(sorted(model_types(config))) or 'a verifier without model_type'}"
        if kind is None
        else f"has {mtp.layers} layers"
        if odd is None
        else f"is quantized ({odd.name} is {odd.dtype})"
    )
    raise FormatError(
        f"{name} has {mtp.type.title}, which cannot be run here, since it {what}: only those of "
        f"{', '.join(COMPUTED)} with one layer that is not quantized can; where vLLM serves it, "
        "`speculators evaluate` measures it with --server."
    )
