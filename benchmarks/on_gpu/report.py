"""The tables and plots of BENCHMARKS.md, made from the results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BLUE",
    "GREY",
    "ORANGE",
    "drawing",
    "fill",
    "image",
    "markdown",
    "met",
    "number",
    "render",
]

MARKED = re.compile(r"(?<=<!-- made: )(?P<name>[a-z-]+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
"""The text between the markers of a table or plot."""

BLUE, ORANGE, GREEN, GREY = "#3b6ea8", "#d1762b", "#4c8c4a", "#888888"
SIZE = (7.0, 4.2)
"""In inches, at 150 dots per inch."""

Results = dict[str, Any]


def render(results: Results, root: Path) -> None:
    """Write the tables into BENCHMARKS.md, and the plots next to the results.

    Args:
        results: of any parts; missing ones are shown as not measured.
        root: the root of the repository.

    """
    made = {name: table_of(results, *table) for name, table in TABLES.items()}
    for name, plot in PLOTS.items():
        made[name] = "Not measured yet."
        if results.get(plot.part, {}).get("contestants"):
            with drawing(root, name) as axes:
                plot.draw(results[plot.part], axes)
            made[name] = image(name, plot.text)
    fill(root, made)


def fill(root: Path, made: dict[str, str]) -> None:
    """Put tables and plots between their markers in BENCHMARKS.md; others there stay."""

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{name} -->\n\n{made[name]}\n\n" if name in made else match[0]

    page = root / "BENCHMARKS.md"
    page.write_text(MARKED.sub(filled, page.read_text("utf-8")), encoding="utf-8")


@contextmanager
def drawing(root: Path, name: str) -> Iterator[Axes]:
    """Draw a plot, which is then written among the results."""
    from matplotlib.figure import Figure  # no pyplot: no display, no state, Agg for PNG

    figure = Figure(figsize=SIZE, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(root / "benchmarks" / "results" / f"{name}.png")


def image(name: str, text: str) -> str:
    """A plot in Markdown."""
    return f"![{text}](benchmarks/results/{name}.png)"


def table_of(results: Results, part: str | None, make: Callable[[Results], str]) -> str:
    """A table, or the reason why there is none."""
    if part is None:
        return make(results)
    if part not in results:
        return "Not measured yet."
    try:
        return make(results[part])
    except KeyError:
        return f"Not measured: {results[part].get('error', 'see the errors in the results.')}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown; ``None`` is an empty cell."""
    lines = [list(head), *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str | None:
    """A number with this many digits after the decimal point."""
    return None if value is None else f"{value:.{digits}f}"


def code(text: str) -> str:
    """A text as code in a table cell."""
    escaped = text.replace("|", "\\|")
    return f"`` {escaped} ``"


def met(holds: bool) -> str:
    """Whether a goal is met."""
    return "met" if holds else "**missed**"


# Tables


def conditions_table(results: Results) -> str:
    """When, on which machine and with which software each part was measured."""
    rows = []
    for part, result in results.items():
        said = result["conditions"]
        versions = said["versions"]
        rows.append(
            (
                part,
                said["date"].partition("T")[0],
                f"{said['device']}, driver {said['driver']}",
                f"{versions['torch']}, CUDA {said['cuda']}",
                versions["transformers"],
                f"{said['cpu']}, {said['cores']} cores",
                f"{said['copy_bandwidth'] / 1e12:.2f} TB/s",
            )
        )
    head = ("part", "date", "GPU", "torch", "transformers", "CPU", "copy, read + written")
    return markdown(head, rows) if rows else "Not measured yet."


def decoding_table(result: Results) -> str:
    """All contestants; the last column compares speculation with plain decoding in graphs."""
    alone = result.get("step_ms", {}).get("greedy:1", {}).get("verify")
    rows = []
    for name, said in result["contestants"].items():
        by_graphs = said.get("graphs") and alone is not None
        rows.append(
            (
                name.replace("_", " "),
                number(said["tokens_per_second"], 1),
                number(said["speedup"]),
                number(said["acceptance_length"]),
                number(said["ms_per_step"]),
                f"{said['same_as_transformers']} of {said['prompts']}",
                number(said["tokens_per_second"] * alone / 1000) if by_graphs else None,
            )
        )
    head = (
        "",
        "tokens/s",
        "speed-up",
        "tokens per step",
        "ms per step",
        "same output",
        "speed-up by speculation alone",
    )
    best = max(said["speedup"] for said in result["contestants"].values())
    prompts = next(iter(result["contestants"].values()))["prompts"]
    return (
        f"{prompts} prompts, up to {result['max_new_tokens']} new tokens. Goal: 2 times the speed "
        f"of transformers' greedy `generate`; best: {best:.2f} times, {met(best >= 2)}.\n\n"
        + markdown(head, rows)
    )


def steps_table(result: Results) -> str:
    """The GPU time of the parts of a step."""
    parts = result["step_ms"]
    if not parts:
        return "Not measured: there were no graphs."
    rows = [
        (name.replace("_", " "), *(number(ms, 3) for ms in one.values()))
        for name, one in parts.items()
    ]
    return markdown(("", "draft, ms", "verifier, ms", "gather, ms"), rows)


def static_table(result: Results) -> str:
    """Speculation against transformers' static cache."""
    rows = []
    for name, said in result["contestants"].items():
        first, _, third = result["first_s"][name]
        rows.append(
            (
                "transformers, static cache" if said["kind"] == "static cache" else name,
                number(said["tokens_per_second"], 1),
                number(said["speedup"]),
                number(said["ms_per_step"]),
                f"{said['same_as_transformers']} of {said['prompts']}",
                f"{first - third:.0f}",
            )
        )
    head = (
        "",
        "tokens/s",
        "over the static cache",
        "ms per step",
        "same output",
        "the first generation took more, s",
    )
    return markdown(head, rows)


def kinds_table(result: Results) -> str:
    """Drafts of different kinds, and the parts of their steps."""
    rows = []
    for name, said in result["contestants"].items():
        parts = result["step_ms"].get(name, {})
        rows.append(
            (
                name.replace("_", " "),
                number(said["tokens_per_second"], 1),
                number(said["speedup"]),
                number(said["acceptance_length"]),
                number(said["ms_per_step"]),
                *(number(parts.get(key), 3) for key in ("draft", "verify", "gather")),
            )
        )
    head = (
        "",
        "tokens/s",
        "speed-up",
        "tokens per step",
        "ms per step",
        "of the GPU: draft",
        "verifier",
        "gather",
    )
    prompts = next(iter(result["contestants"].values()))["prompts"]
    said = result["conditions"]
    return (
        f"{said['device']}, {prompts} prompts, up to {result['max_new_tokens']} new tokens.\n\n"
        + markdown(head, rows)
    )


def outputs_table(result: Results) -> str:
    """What drafts of different kinds had accepted in two dtypes, and whose outputs differed."""
    told = result["outputs"]
    exact, rounded = told["dtypes"]["float32"], told["dtypes"]["bfloat16"]
    rows = []
    for name in exact:
        if name == "tie_in_spacings":
            continue
        cells = [name]
        for said in (exact[name], rounded[name]):
            different = len(said["differences"])
            cells += [
                f"{said['acceptance_length']:.3f}",
                f"{sum(said['steps'])}, {sum(said['accepted'])}",
                f"{said['identical']} of {told['prompts']}"
                + (f"; {said['ties']} of {different} others are ties" if different else ""),
            ]
        rows.append(cells)
    head = ["", "float32", "steps, accepted", "same output", "bfloat16", *["steps, accepted"]]
    return f"{told['prompts']} prompts, up to {told['max_new_tokens']} new tokens.\n\n" + markdown(
        [*head, "same output"], rows
    )


def size_table(result: Results) -> str:
    """The parts of a step at 8B size, with floors and goals."""
    alone = result["contestants"]["greedy:1"].get("parts_ms", {}).get("verify")
    rows = []
    for name, said in result["contestants"].items():
        parts = said.get("parts_ms", {})
        share = said.get("overhead")
        rows.append(
            (
                name.replace("_", " "),
                number(said["acceptance_length"]),
                number(said["ms"]),
                *(number(parts.get(key)) for key in ("draft", "verify", "gather")),
                None if share is None else f"{share:.1%}",
                number(said.get("draft_pass_ms"), 3),
                number(said.get("draft_over_floor")),
                number(said.get("verify_over_floor")),
                number(said["speedup"]),
                number(said["tokens_per_second"] * alone / 1000) if parts else None,
            )
        )
    head = (
        "",
        "tokens per step",
        "ms per step",
        "draft",
        "verifier",
        "gather",
        "rest",
        "draft pass, ms",
        "over its floor",
        "verifier over its floor",
        "speed-up",
        "by speculation alone",
    )
    return goals(result) + markdown(head, rows)


def goals(result: Results) -> str:
    """The floors, and the goals at 8B size."""
    floors, bytes_read = result["floor_ms"], result["weights"]
    told = (
        f"Floors: {bytes_read['draft'] / 1e9:.2f} GB of weights for a pass of the draft, "
        f"{floors['draft']:.3f} ms; {bytes_read['verify'] / 1e9:.2f} GB for one of the verifier, "
        f"{floors['verify']:.2f} ms.\n\n"
    )
    kinds = {"chains, at most": "greedy:", "static tree": "static", "dynamic tree": "dynamic"}
    recorded = {
        kind: [
            one
            for name, one in result["contestants"].items()
            if name.startswith(start) and "overhead" in one
        ]
        for kind, start in kinds.items()
    }
    recorded = {kind: some for kind, some in recorded.items() if some}
    if not recorded:
        return told
    head, rows = ["goal"], []
    for kind in recorded:
        head += [kind, ""]
    for text, key, shown in (
        ("share of a step outside the passes", "overhead", "{:.1%}"),
        ("a draft pass over its floor", "draft_over_floor", "{:.2f}"),
    ):
        limit = result["targets"][key]
        row = [f"{text}: at most {shown.format(limit)}"]
        for some in recorded.values():
            most = max(one[key] for one in some)
            row += [shown.format(most), met(most <= limit)]
        rows.append(row)
    return f"{told}{markdown(head, rows)}\n\n"


def loading_table(result: Results) -> str:
    """Loading against the safetensors library."""
    rows = []
    for case, said in result["cases"].items():
        for name, way in said["ways"].items():
            peak = way.get("peak_host_bytes")
            rows.append(
                (
                    f"{case}, {said['bytes'] / 1e9:.2f} GB",
                    f"`{name.partition(',')[0]}`{''.join(name.partition(',')[1:])}",
                    number(way["median_s"], 3),
                    number(way["over_load_file"]),
                    None if peak is None else f"{peak / 1e6:.0f}",
                    None if name == "load_file" else met(way["over_load_file"] <= result["target"]),
                )
            )
    goal = f"goal: {result['target']}"
    return markdown(("draft", "", "s", "over `load_file`", "host memory, MB", goal), rows)


def golden_table(result: Results) -> str:
    """Differences from the golden vectors."""
    rows = []
    for name, said in result["golden"]["checkpoints"].items():
        worst = [
            max(one[key] for one in said["differences"].values())
            for key in ("absolute", "relative")
        ]
        tree = {None: "", True: "identical", False: "**differs**"}[said["same_tree"]]
        rows.append((f"`{name}`", *(f"{one:.1e}" for one in worst), met(said["within"]), tree))
    goal = f"goal: {result['golden']['tolerance']:.0e} absolute"
    return markdown(
        ("", "largest difference", "over the largest value", goal, "EAGLE-2 tree"), rows
    )


def acceptance_table(result: Results) -> str:
    """Acceptance lengths on the GPU and on a CPU."""
    told = result["acceptance"]
    rows = [
        (
            name,
            number(said["bfloat16"], 3),
            number(said["float32"], 3),
            number(said.get("cpu"), 3),
            number(said.get("difference"), 3),
            met(said["within"]) if "within" in said else "not measured",
        )
        for name, said in told["drafts"].items()
    ]
    head = (
        "draft",
        "bfloat16, GPU",
        "float32, GPU",
        "float32, CPU",
        "bfloat16 to CPU",
        f"goal: {told['tolerance']}",
    )
    return (
        f"A chain of three, {told['prompts']} prompts, up to {told['max_new_tokens']} new "
        f"tokens.\n\n{markdown(head, rows)}"
    )


def losslessness_table(result: Results) -> str:
    """How many outputs are identical, and how close the logits are where others differ."""
    said = result["losslessness"]
    rounding, differences = said["rounding"], said["differences"]
    gaps = [one["gap_in_spacings"] for one in differences if "gap_in_spacings" in one]
    told = (
        f"{said['identical']} of {said['prompts']} outputs are identical "
        f"({said['identical'] / said['prompts']:.0%}), of {said['new_tokens']} tokens. "
        f"{said['ties']} of the {len(differences)} first differences are ties"
    )
    if gaps:
        told += (
            f"; their gaps are {median(gaps):.2f} spacings in the median, {max(gaps):.2f} at most"
        )
    told += (
        f". From float32 to bfloat16 the lead of the best token over the second changes by "
        f"{rounding['median']:.2f} spacings in the median of {rounding['positions']} positions, by "
        f"{rounding['99 %']:.2f} in the 99th percentile, by {rounding['largest']:.2f} at most.\n\n"
    )
    rows = [
        (
            one["prompt"],
            one["position"],
            *(None if text is None else code(repr(text)) for text in one["texts"]),
            number(one.get("gap"), 3),
            number(one.get("gap_in_bfloat16"), 3),
            number(one.get("spacing"), 4),
            number(one.get("gap_in_spacings")),
            "yes" if one["tie"] else "**no**",
        )
        for one in differences
    ]
    head = (
        "prompt",
        "at token",
        "transformers",
        "ours",
        "gap in float32",
        "in bfloat16",
        "spacing",
        "gap in spacings",
        "tie",
    )
    return told + (markdown(head, rows) if rows else "")


TABLES: dict[str, tuple[str | None, Callable[[Results], str]]] = {
    "conditions": (None, conditions_table),
    "decoding": ("decoding", decoding_table),
    "decoding-steps": ("decoding", steps_table),
    "static": ("static", static_table),
    "kinds": ("kinds", kinds_table),
    "kinds-outputs": ("kinds", outputs_table),
    "size": ("size", size_table),
    "loading": ("loading", loading_table),
    "golden": ("correctness", golden_table),
    "acceptance": ("correctness", acceptance_table),
    "losslessness": ("correctness", losslessness_table),
}
"""The name in the marker → the part of the results, and the function that makes the table."""


# Plots


def speed_by_length(result: Results, axes: Axes) -> None:
    """Tokens per second by chain length, with baselines."""
    ours = [said for said in result["contestants"].values() if said.get("graphs")]
    colors = dict(
        zip(dict.fromkeys(said["draft"] for said in ours), (BLUE, ORANGE, GREEN), strict=False)
    )
    for draft, color in colors.items():
        chains = [said for said in ours if said["draft"] == draft and said["proposal"] == "greedy"]
        axes.plot(
            [said["tokens"] for said in chains],
            [said["tokens_per_second"] for said in chains],
            color=color,
            marker="o",
            label=f"{draft}, chain",
        )
        for at, tree, marker in ((9.5, "static_tree", "s"), (11, "dynamic_tree", "^")):
            speeds = [
                said["tokens_per_second"]
                for said in ours
                if (said["draft"], said["proposal"]) == (draft, tree)
            ]
            axes.plot([at] * len(speeds), speeds, color=color, marker=marker, linestyle="none")
    for style, name in (("-", "transformers"), (":", "transformers, prompt lookup 3")):
        if name in result["contestants"]:
            speed = result["contestants"][name]["tokens_per_second"]
            axes.axhline(speed, color=GREY, linestyle=style, label=name)
    alone = result.get("step_ms", {}).get("greedy:1", {}).get("verify")
    if alone:
        axes.axhline(1000 / alone, color=GREY, linestyle="--", label="a graphed pass a token")
    axes.set(
        title=f"SmolLM2-135M, batch 1, bfloat16 ({result['conditions']['device']})",
        xlabel="length of the chain",
        ylabel="tokens per second",
        xlim=(0.5, 11.8),
        xticks=[*range(1, 9), 9.5, 11],
        xticklabels=[*map(str, range(1, 9)), "static\ntree", "dynamic\ntree"],
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.12))


def step_by_length(result: Results, axes: Axes) -> None:
    """The parts of a step by chain length, with the floors."""
    chains = {
        said["draft_passes"]: (said, said["parts_ms"])
        for name, said in result["contestants"].items()
        if re.fullmatch(r"greedy:\d", name) and "parts_ms" in said
    }
    lengths = list(chains)
    parts = {
        "verifier": [parts["verify"] for _, parts in chains.values()],
        "draft": [parts["draft"] for _, parts in chains.values()],
        "rest": [
            max(0.0, said["ms"] - parts["draft"] - parts["verify"])
            for said, parts in chains.values()
        ],
    }
    bottom = [0.0] * len(lengths)
    for (name, heights), color in zip(parts.items(), (BLUE, ORANGE, GREY), strict=True):
        axes.bar(lengths, heights, bottom=bottom, color=color, width=0.6, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    floor = result["floor_ms"]
    axes.axhline(floor["verify"], color="black", linestyle=":", label="floor of the verifier")
    axes.plot(
        lengths,
        [floor["verify"] + length * floor["draft"] for length in lengths],
        color="black",
        linestyle="--",
        label="floor of both",
    )
    axes.set(
        title=f"A step at the size of Llama-3.1-8B, bfloat16 ({result['conditions']['device']})",
        xlabel="length of the chain",
        ylabel="milliseconds",
        xticks=lengths,
    )
    axes.set_ylim(0, 1.25 * max(bottom))
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)


@dataclass(frozen=True)
class Plot:
    """A plot: the part of the results it shows, the function that draws it, and its alt text."""

    part: str
    draw: Callable[[Results, Axes], None]
    text: str


PLOTS = {
    "gpu-decoding": Plot(
        "decoding", speed_by_length, "Tokens a second by the length of the chain, and of trees"
    ),
    "gpu-step": Plot("size", step_by_length, "The parts of a step by the length of the chain"),
}
"""The name in the marker, which is also the file's → the plot."""
