"""How a conversion plan is shown."""

import json
from collections.abc import Iterator

from rich.filesize import decimal

from speculators.checkpoint.tensor import describe_shape
from speculators.cli.output import Listing, show
from speculators.convert.config_diff import ConfigChange, config_diff
from speculators.convert.plan import ConversionPlan

__all__ = ["print_plan"]

SIGNS = {"kept": "=", "changed": "~", "left out": "-", "added": "+"}


def print_plan(plan: ConversionPlan) -> None:
    """Print what will become of every tensor and every key of the config."""
    show(
        f"{plan.source.name}: {len(plan.tensors)} tensors ({decimal(plan.nbytes)}) are "
        f"written, {len(plan.left_out)} are left out",
        "",
        Listing(("tensor", "dtype", "shape", "becomes"), _tensors(plan)),
        "",
        "config.json (= kept, ~ changed, - left out, + added)",
        *map(_line, config_diff(plan)),
        "",
        *(f"{name} is copied as it is." for name in plan.companions),
        *(f"Note: {clause}." for clause in plan.discrepancies),
        "Nothing was written.",
    )


def _tensors(plan: ConversionPlan) -> Iterator[tuple[str, ...]]:
    for name, info in plan.source.tensors.items():
        made = {
            target: tensor.dtype
            for target, tensor in plan.tensors.items()
            if any(piece.name == name for piece in tensor.sources)
        }
        becomes = ", ".join(made) or f"left out: {plan.left_out[name]}"
        rounded = "".join(f" -> {dtype}" for dtype in {*made.values()} - {info.dtype})
        yield name, info.dtype + rounded, describe_shape(info.shape), becomes


def _line(change: ConfigChange) -> str:
    before, after = json.dumps(change.before), json.dumps(change.after)
    value = {
        "kept": after,
        "changed": f"{before} -> {after}",
        "left out": before,
        "added": after,
    }[change.change]
    why = f"  ({change.why})" if change.why else ""
    return f"{SIGNS[change.change]} {change.target or change.source}: {value}{why}"
