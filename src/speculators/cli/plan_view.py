"""How a conversion plan is shown."""

import sys

from rich.console import Console
from rich.table import Column, Table

from speculators.checkpoint.tensor import describe_shape
from speculators.convert.eagle.plan import ConversionPlan

__all__ = ["print_plan"]


def print_plan(plan: ConversionPlan) -> None:
    """Print what will become of every tensor and every key of the config."""
    # Names are for reading and for grep: never cut short, and brackets in them are no markup.
    console = Console(soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 1000)
    tensors = Table(
        *(Column(head, overflow="fold") for head in ("source tensor", "becomes", "type", "shape")),
        title=plan.source.name,
    )
    for target, info in plan.tensors.items():
        rounded = plan.rounded_to not in {None, info.dtype}
        dtype = f"{info.dtype} -> {plan.rounded_to}" if rounded else info.dtype
        tensors.add_row(info.name, target, dtype, describe_shape(info.shape))
    for name, why in plan.left_out.items():
        info = plan.source.tensors[name]
        tensors.add_row(name, f"left out: {why}", info.dtype, describe_shape(info.shape))
    console.print(tensors)
    if plan.config_left_out:
        keys = Table("key of config.json", "left out, because", title="config.json")
        for key, why in plan.config_left_out.items():
            keys.add_row(key, why)
        console.print(keys)
    console.print_json(plan.config.model_dump_json(exclude_none=True))
    for sentence in plan.odd:
        console.print(f"Note: {sentence}")
    console.print(f"{len(plan.tensors)} tensors, {plan.nbytes / 1e6:.1f} MB; nothing was written.")
