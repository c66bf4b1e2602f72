"""How a conversion plan is shown."""

import json
from collections.abc import Iterator

from rich.filesize import decimal

from speculators.checkpoint.tensor import describe_shape
from speculators.cli.output import show, table
from speculators.convert.config_diff import ConfigChange, config_diff
from speculators.convert.plan import ConversionPlan

__all__ = ["print_plan"]

SIGNS = {"kept": "=", "changed": "~", "left out": "-", "added": "+"}


def print_plan(plan: ConversionPlan) -> None:
    """Print what will become of every tensor and every key of the config."""
    show(
        f"{plan.source.name}: {len(plan.tensors)} tensors ({decimal(plan.nbytes)}) are taken "
        f"along, {len(plan.left_out)} are left out",
        "",
        table(("tensor", "dtype", "shape", "becomes"), _tensors(plan)),
        "",
        "config.json (= kept, ~ changed, - left out, + added)",
        *map(_line, config_diff(plan)),
        "",
        *(f"Note: {sentence}." for sentence in plan.odd),
        "Nothing was written.",
    )


def _tensors(plan: ConversionPlan) -> Iterator[tuple[str, ...]]:
    targets = {info.name: target for target, info in plan.tensors.items()}
    for name, info in plan.source.tensors.items():
        becomes = targets.get(name) or f"left out: {plan.left_out[name]}"
        rounded = name in targets and plan.rounded_to not in {None, info.dtype}
        dtype = f"{info.dtype} -> {plan.rounded_to}" if rounded else info.dtype
        yield name, dtype, describe_shape(info.shape), becomes


def _line(change: ConfigChange) -> str:
    before, after = json.dumps(change.before), json.dumps(change.after)
    value = {
        "kept": after,
        "changed": f"{before} -> {after}",
        "left out": before,
        "added": after,
    }[change.kind]
    why = f"  ({change.why})" if change.why else ""
    return f"{SIGNS[change.kind]} {change.target or change.source}: {value}{why}"
