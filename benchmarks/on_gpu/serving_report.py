"""The tables and the plot of BENCHMARKS.md that are made from the runs of ``serving_gpu.py``."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from on_gpu.report import BLUE, GREY, ORANGE, drawing, fill, image, markdown, met, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = ["render"]

TARGETS = {"1": 0.99, "80": 0.97}
"""The batch size → the plugin's speed over that of vLLM's own EAGLE model, at least."""

SIZES = tuple(TARGETS)
ALONE, PLUGIN, NATIVE = "no draft", "eagle1:3", "eagle1:3, vLLM's own"
PLOT = "serving-gpu"

Run = dict[str, Any]
Measured = dict[str, Any]


def render(runs: list[Run], root: Path) -> None:
    """Write the tables into BENCHMARKS.md, and the plot next to the results.

    Args:
        runs: in the order in which they were made.
        root: the root of the repository.

    """
    made = {name: make(runs) for name, make in TABLES.items()}
    with drawing(root, PLOT) as axes:
        speed_by_length(of(runs, "drafts"), axes)
    made[PLOT] = image(PLOT, "The speed-up over no draft by the number of drafted tokens")
    fill(root, made)


def of(runs: list[Run], comparison: str) -> list[Run]:
    """The runs of one comparison."""
    return [run for run in runs if run["comparison"] == comparison]


def turns(runs: list[Run], name: str, size: str) -> list[Measured]:
    """What was measured of an engine, turn by turn."""
    return [measured for run in runs for one in run["rounds"] for measured in one[name][size]]


def speed(measured: list[Measured]) -> float:
    """Tokens per second."""
    tokens = sum(it["tokens"] for it in measured)
    return float(tokens / sum(it["seconds"] for it in measured))


def ratios(runs: list[Run], name: str, over: str, size: str) -> list[float]:
    """The speed of an engine over that of another one, turn by turn."""
    pairs = zip(turns(runs, name, size), turns(runs, over, size), strict=True)
    return [speed([ours]) / speed([theirs]) for ours, theirs in pairs]


def acceptance(runs: list[Run], name: str, size: str) -> list[float]:
    """The share of steps in which the drafted token at each position was accepted."""
    measured = turns(runs, name, size)
    drafts = sum(it["drafts"] for it in measured)
    positions = zip(*(it["accepted"] for it in measured), strict=True)
    return [sum(accepted) / drafts for accepted in positions]


def length(runs: list[Run], name: str, size: str) -> str | None:
    """Tokens per step of the verifier; None without a draft."""
    rates = acceptance(runs, name, size)
    return number(1 + sum(rates), 3) if rates else None


def same(run: Run, name: str, other: str, size: str) -> str:
    """How many answers are those of another engine."""
    pairs = zip(*(run["answers"][it][size].split() for it in (name, other)), strict=True)
    equal = [ours == theirs for ours, theirs in pairs]
    return f"{sum(equal)} of {len(equal)}"


def spread(values: list[float]) -> str:
    """The median, and the lowest and the highest value."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# Tables


def conditions_table(runs: list[Run]) -> str:
    """When and on what each run was made."""
    rows = []
    for run in runs:
        said = run["conditions"]
        versions = said["versions"]
        rows.append(
            (
                run["comparison"],
                said["date"][:16].replace("T", " "),
                f"{said['device']}, driver {said['driver']}",
                f"{versions['vllm']}, {versions['torch']}, {versions['transformers']}",
                f"{said['cpu']}, {said['cores']} cores",
                run["started"],
            )
        )
    head = ("comparison", "UTC", "GPU", "vLLM, torch, transformers", "CPU", "engines started")
    return markdown(head, rows)


def native_table(runs: list[Run]) -> str:
    """The plugin against vLLM's own model, by pair of processes."""
    rows = [row for run in of(runs, "native") for row in native_rows(run)]
    head = (
        "processes started",
        "batch",
        "vLLM's own, tokens/s",
        "plugin",
        "plugin over vLLM's own",
        "goal",
        "tokens per step, own / plugin",
        "same answers",
    )
    return markdown(head, rows)


def native_rows(run: Run) -> Iterator[tuple[object, ...]]:
    """A row for each batch size."""
    for size, target in TARGETS.items():
        over = ratios([run], PLUGIN, NATIVE, size)
        yield (
            run["conditions"]["date"][11:16],
            size,
            *(f"{speed(turns([run], name, size)):.0f}" for name in (NATIVE, PLUGIN)),
            spread(over),
            f"{target}: {met(median(over) >= target)}",
            " / ".join(str(length([run], name, size)) for name in (NATIVE, PLUGIN)),
            same(run, PLUGIN, NATIVE, size),
        )


def kernels_table(runs: list[Run]) -> str:
    """What ran on the GPU for the same answers of both."""
    rows = []
    for run in of(runs, "native"):
        for size, target in TARGETS.items() if "kernels" in run else ():
            own, ours = (run["kernels"][name][size]["kernels"] for name in (NATIVE, PLUGIN))
            own_ms, ours_ms = (sum(ms for ms, _ in it.values()) for it in (own, ours))
            own_count, ours_count = (sum(count for _, count in it.values()) for it in (own, ours))
            rows.append(
                (
                    size,
                    f"{own_count} / {ours_count}",
                    f"{own_ms:.1f} / {ours_ms:.1f}",
                    f"{own_ms / ours_ms:.3f}",
                    f"{target}: {met(own_ms / ours_ms >= target)}",
                )
            )
    head = ("batch", "kernels, own / plugin", "ms on the GPU", "plugin's speed over own", "goal")
    return markdown(head, rows)


def drafts_table(runs: list[Run], comparison: str = "drafts") -> str:
    """All engines of a comparison, with the verifier alone."""
    runs = of(runs, comparison)
    rows = []
    for name in runs[0]["engines"]:
        for size in SIZES:
            rates = acceptance(runs, name, size)
            rows.append(
                (
                    name if size == SIZES[0] else None,
                    size,
                    f"{speed(turns(runs, name, size)):.0f}",
                    None if name == ALONE else spread(ratios(runs, name, ALONE, size)),
                    length(runs, name, size),
                    ", ".join(f"{rate:.2f}" for rate in rates) or None,
                    None if name == ALONE else same(runs[0], name, ALONE, size),
                )
            )
    head = (
        "draft",
        "batch",
        "tokens/s",
        "speed-up",
        "tokens per step",
        "accepted at positions 1, 2, ...",
        "same answers as no draft",
    )
    return markdown(head, rows)


def starts_table(runs: list[Run]) -> str:
    """How long engines take to start that start one by one."""
    rows = [
        (name, said["cache"], number(said["start_s"], 0))
        for run in runs
        if run["started"] == "one by one"
        for name, said in run["engines"].items()
    ]
    return markdown(("engine", "vLLM's cache", "seconds"), rows)


TABLES: dict[str, Callable[[list[Run]], str]] = {
    "serving-conditions": conditions_table,
    "serving-native": native_table,
    "serving-kernels": kernels_table,
    "serving-drafts": drafts_table,
    "serving-quantized": lambda runs: drafts_table(runs, "fp8"),
    "serving-starts": starts_table,
}
"""The name in the marker → the function that makes the table."""


# The plot


def speed_by_length(runs: list[Run], axes: Axes) -> None:
    """The speed-up over no draft by the number of drafted tokens, with all turns."""
    lengths = range(1, 6)
    for size, color, aside in zip(SIZES, (BLUE, ORANGE), (-0.06, 0.06), strict=True):
        gains = [ratios(runs, f"hass:{tokens}", ALONE, size) for tokens in lengths]
        for tokens, each in zip(lengths, gains, strict=True):
            axes.plot(
                [tokens + aside] * len(each), each, color=color, marker=".", ls="none", alpha=0.3
            )
        middle = [median(each) for each in gains]
        axes.plot(lengths, middle, color=color, marker="o", label=f"hass, batch {size}")
        for draft, marker, at in (("eagle1", "s", 2.85), ("layernorms", "^", 3.15)):
            gain = median(ratios(runs, f"{draft}:3", ALONE, size))
            label = f"{draft}, batch {size}"
            axes.plot(at, gain, color=color, marker=marker, mfc="none", ls="none", label=label)
    axes.axhline(1, color=GREY, linestyle="--", label="no draft")
    conditions = runs[0]["conditions"]
    axes.set(
        title=f"SmolLM2-135M, vLLM {conditions['versions']['vllm']}, bfloat16 "
        f"({conditions['device']})",
        xlabel="drafted tokens",
        ylabel="speed-up over no draft",
        xticks=lengths,
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
