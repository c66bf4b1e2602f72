"""The two layouts of a layer's experts: a tensor for each matrix, or all experts in two tensors.

    experts.3.gate_proj.weight (I, H)     experts.gate_up_proj (E, 2 I, H): the rows of gate first
    experts.3.up_proj.weight   (I, H)
    experts.3.down_proj.weight (H, I)     experts.down_proj (E, H, I)

The orientation is that of transformers 5 (``Qwen3_5MoeExperts``) and of vLLM 0.33.0
(``fused_moe/routed_experts.py``, where ``is_fused_checkpoint_transposed`` is off). So stacking is
writing the same bytes in another order.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from speculators.checkpoint.tensor import PlannedTensor, TensorInfo, describe_shape
from speculators.errors import ConversionError

__all__ = ["Layout", "expert_of", "layout_of", "restacked"]

Layout = Literal["each", "fused"]

_EACH = re.compile(
    r"(?P<place>(?:.+\.)?experts)\.(?P<index>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.(?P<rest>.+)"
)
_FUSED = re.compile(
    r"(?P<place>(?:.+\.)?experts)\.(?P<matrix>gate_up_proj|down_proj)(?P<rest>(?:[._].+)?)"
)
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Expert:
    """What a tensor's name says about experts.

    Attributes:
        place: the name of the module that holds them all.
        index: which expert; ``None`` if all.
        matrices: which of gate_proj, up_proj and down_proj.
        plain: whether it holds the matrices themselves, and no part of a quantized one.

    """

    place: str
    index: int | None
    matrices: tuple[str, ...]
    plain: bool


def expert_of(name: str) -> Expert | None:
    """Read a tensor's name; ``None`` if it is no expert's."""
    if found := _EACH.fullmatch(name):
        plain = found["rest"] == "weight"
        return Expert(found["place"], int(found["index"]), (found["matrix"],), plain)
    if found := _FUSED.fullmatch(name):
        matrices = _PARTS.get(found["matrix"], (found["matrix"],))
        return Expert(found["place"], None, matrices, found["rest"] == "")
    return None


def layout_of(names: Collection[str]) -> Layout | None:
    """The layout of the experts among some tensors; ``None`` if there are none."""
    for name in names:
        if expert := expert_of(name):
            return "fused" if expert.index is None else "each"
    return None


def restacked(tensors: Mapping[str, TensorInfo], layout: Layout | None) -> dict[str, PlannedTensor]:
    """Plan to write tensors with their experts in a layout.

    Args:
        tensors: name to write → the tensor.
        layout: that of the result; as it is if ``None``.

    Raises:
        ConversionError: if the experts would have to be restacked, and are quantized or incomplete.

    """
    planned: dict[str, PlannedTensor] = {}
    each: dict[str, dict[tuple[int, str], TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        expert = expert_of(name)
        if layout is None or expert is None or (expert.index is None) == (layout == "fused"):
            planned[name] = PlannedTensor.copy_of(info)
            continue
        if not expert.plain or len(info.shape) != (3 if expert.index is None else 2):
            raise ConversionError(
                f"{info.file}: {info.name} is a part of quantized experts, which have another "
                "layout in the verifier, and are not restacked; give an MTP that is not quantized, "
                "or whose experts are laid out as the verifier's."
            )
        if expert.index is None:
            planned |= _taken_apart(expert, info)
        else:
            each[expert.place][expert.index, expert.matrices[0]] = info
    for place, matrices in each.items():
        planned |= _stacked(place, matrices)
    return planned


def _taken_apart(expert: Expert, info: TensorInfo) -> dict[str, PlannedTensor]:
    """Each expert's own matrices out of a stack of them."""
    count, rows, _ = info.shape
    if rows % len(expert.matrices):
        raise ConversionError(
            f"{info.file}: {info.name} {describe_shape(info.shape)} has an odd number of rows for "
            "each expert, but should hold the rows of two matrices."
        )
    height = rows // len(expert.matrices)
    planned = {}
    for index in range(count):
        stack = info.slice(index, index + 1)
        one = replace(
            stack, shape=info.shape[1:], strides=info.strides and info.strides[1:], rows=None
        )
        for number, matrix in enumerate(expert.matrices):
            piece = one.slice(number * height, (number + 1) * height)
            planned[f"{expert.place}.{index}.{matrix}.weight"] = PlannedTensor.copy_of(piece)
    return planned


def _stacked(place: str, each: Mapping[tuple[int, str], TensorInfo]) -> dict[str, PlannedTensor]:
    """The two stacks of the matrices of all experts."""
    count = 1 + max(index for index, _ in each)
    planned = {}
    for stack, matrices in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", None)):
        names = matrices or (stack,)
        # Not all of them at once: the last may have any number.
        needed = ((index, matrix) for index in range(count) for matrix in names)
        if lost := next((key for key in needed if key not in each), None):
            index, matrix = lost
            raise ConversionError(f"The MTP lacks {place}.{index}.{matrix}.weight.")
        keys = [(index, matrix) for index in range(count) for matrix in names]
        pieces = tuple(each[key] for key in keys)
        first = pieces[0]
        if odd := [it for it in pieces if (it.shape, it.dtype) != (first.shape, first.dtype)]:
            raise ConversionError(
                f"{odd[0].file}: {odd[0].name} is {odd[0].dtype} {describe_shape(odd[0].shape)}, "
                f"and {first.name} is {first.dtype} {describe_shape(first.shape)}, so the experts "
                "cannot be stacked as the verifier's are."
            )
        rows, columns = first.shape
        shape = (count, len(names) * rows, columns)
        planned[f"{place}.{stack}"] = PlannedTensor(first.dtype, shape, pieces)
    return planned
