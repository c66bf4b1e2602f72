"""Where the modules of a model compute that ``device_map`` has spread over devices.

Accelerate gives such modules a hook, which brings inputs to the module's device. Weights that are
offloaded to the memory of the CPU or to a disk are on no device until the module runs; the hook
then loads them to where it runs.
"""

from typing import Any

import torch
from torch import nn

__all__ = ["device_of"]


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module with a weight computes; ``meta`` if it has no values."""
    weight: Any = module.weight
    if weight.is_meta:
        hook: Any = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):  # several are kept in one
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    device_of_weight: torch.device = weight.device
    return device_of_weight
