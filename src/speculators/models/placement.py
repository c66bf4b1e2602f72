"""Where the modules of a model run that ``device_map`` has spread over devices.

Accelerate gives such modules a hook that moves inputs to the module's device. Weights offloaded to
CPU memory or to disk are on the meta device until the module runs; the hook then loads them to the
device on which it runs.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["device_of", "products_of", "rows_of", "value_of"]


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module with a weight runs; ``meta`` if the weight has no values."""
    weight: Any = module.weight
    if weight.is_meta:
        for hook in _hooks_of(module):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
    device_of_weight: torch.device = weight.device
    return device_of_weight


def value_of(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module's own while the module does not run, loaded if it is offloaded."""
    tensor: Tensor = getattr(module, name)
    if tensor.is_meta:
        for hook in _hooks_of(module):
            if (weights := getattr(hook, "weights_map", None)) is not None:
                loaded: Tensor = weights[name]
                return loaded
    return tensor


def rows_of(embedding: nn.Module, ids: Tensor) -> Tensor:
    """The rows of an embedding as they are stored, (batch, length, hidden).

    Transformers' modules of Gemma multiply them, which is a part of the verifier: drafts are
    trained and served with what its file holds (``_raw_input_embeddings`` of dflash 0.1.0,
    SpecForge's ``load_embedding``, the modules that vLLM shares).
    """
    if not hasattr(embedding, "embed_scale"):
        rows: Tensor = embedding(ids.to(device_of(embedding)))
        return rows
    weight = value_of(embedding, "weight")
    return F.embedding(ids.to(weight.device), weight)


def products_of(head: nn.Module, states: Tensor) -> Tensor:
    """The products of states with a head's rows, (batch, length, vocabulary).

    A bias, as Phi's has, is a part of the verifier: trainers and engines give drafts its rows.
    """
    if getattr(head, "bias", None) is None:
        weight: Any = head.weight
        products: Tensor = head(states.to(device=device_of(head), dtype=weight.dtype))
        return products
    rows = value_of(head, "weight")
    return F.linear(states.to(rows), rows)


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Accelerate's hook of a module, and those that it holds."""
    hook: Any = getattr(module, "_hf_hook", None)
    return (hook, *getattr(hook, "hooks", ()))
