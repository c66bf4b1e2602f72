"""Two faults of vLLM's CPU backend in speculative decoding, mended where they are found.

Each is looked for by what vLLM computes, not by its version. Where it is not there, and on every
other device, nothing changes.
"""

from contextlib import suppress
from typing import Any

__all__ = ["mend_cpu_backend"]


def mend_cpu_backend() -> None:
    """Replace what vLLM's CPU backend computes wrongly; never raises.

    Where a function is gone, or refuses what it is tried with, it stays as it is.
    """
    for mend in (_mend_norm, _mend_expansion):
        with suppress(ImportError, AttributeError, TypeError, RuntimeError):
            from vllm.platforms import current_platform

            if current_platform.is_cpu():  # elsewhere, importing operations might load a device
                mend()


def _mend_norm() -> None:
    """Norm the context keys of each layer of a DFlash draft with that layer's weight.

    It is one call for all layers, with a weight of (layers, head size). The kernel for GPUs takes
    the row of each layer, that for CPUs the first row for all of them
    (``findings/vllm-0.32-norms-dflash-context-by-the-first-layer.sh``), so that the draft computes
    something else than it was trained to.
    """
    import torch
    from vllm import _custom_ops as operations

    rms_norm = operations.rms_norm
    ones, weight = torch.ones(2, 1, 64), torch.tensor([[1.0], [2.0]]).repeat(1, 64)
    rms_norm(normed := torch.empty_like(ones), ones, weight, 0.0)
    if torch.allclose(normed, weight[:, None]):
        return

    def rms_norm_by_row(out: Any, input: Any, weight: Any, epsilon: float) -> None:  # noqa: A002
        if weight is None or weight.dim() == 1:
            rms_norm(out, input, weight, epsilon)
        else:
            for rows in zip(out, input, weight, strict=True):
                rms_norm(*rows, epsilon)

    operations.rms_norm = rms_norm_by_row


def _mend_expansion() -> None:
    """Give each drafted token the temperature, top_p and top_k of its request.

    What the kernel for CPUs expands is written to a copy, and dropped: drafted tokens are accepted,
    and others drawn in their place, by numbers that were never written
    (``findings/vllm-0.32-samples-by-unwritten-memory-on-cpus.sh``).
    """
    import torch
    from vllm import _custom_ops  # noqa: F401 - loads the kernels
    from vllm.utils import cpu_triton_utils as kernels

    values, ends = torch.tensor([0.5, 2.5]), torch.tensor([1, 3])
    kernels._expand_kernel_impl(expanded := torch.zeros(3), values, ends, 0, 1)
    if expanded.tolist() == [0.5, 2.5, 2.5]:
        return

    def expand(
        output: Any,
        values: Any,
        ends: Any,
        replace_from: int,
        replace_to: int,
        MAX_NUM_TOKENS: int | None = None,  # noqa: ARG001, N803 - as 0.29 calls it
    ) -> None:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        output.copy_(
            values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts)
        )

    kernels._expand_kernel_impl = expand
    if hasattr(kernels, "expand_kernel"):  # up to 0.29 there is an object that holds the function
        kernels.expand_kernel.func = expand
