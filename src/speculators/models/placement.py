"""Where the modules of a model run that ``device_map`` has spread over devices.

Accelerate gives such modules a hook that moves inputs to the module's device. Weights offloaded to
CPU memory or to disk are on the meta device until the module runs; the hook then loads them to the
device on which it runs.
"""

from typing import Any

import torch
from torch import nn

__all__ = ["device_of"]


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module with a weight runs; ``meta`` if the weight has no values."""
    weight: Any = module.weight
    if weight.is_meta:
        hook: Any = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):  # a hook can hold several others
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    device_of_weight: torch.device = weight.device
    return device_of_weight
