"""`speculators diff`: whether two checkpoints hold the same draft."""

from typing import TYPE_CHECKING, Annotated

import typer

from speculators.cli.shared import CacheDir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from speculators.comparison.difference import Difference, TensorDifference

__all__ = ["diff"]


def diff(
    one: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A checkpoint of any layout: a directory, a file of weights in one, or a Hugging "
            "Face id.",
        ),
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    compute: Annotated[
        bool,
        typer.Option("--compute", help="Run both, too, and compare what they compute."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, as docs/diff.md describes it.")
    ] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Compare two checkpoints: whether one is the other, repackaged.

    Both may be as they were trained, converted or exported: tensors are
    compared by their names in the speculators format, and configs by what they
    mean. The status is 0 if they are the same draft, byte for byte, and 1 if not.

    For example:

    speculators diff ./draft ./converted

    speculators diff ./converted my-organization/eagle-llama-3.1-8b --compute
    """
    from speculators.checkpoint.hub.access import HubAccess
    from speculators.cli.diff_result import DiffResult
    from speculators.cli.printing import printed
    from speculators.cli.progress import progress_bar
    from speculators.comparison.difference import compare
    from speculators.comparison.side import open_sides

    result = DiffResult()
    with printed(as_json, result):
        sides = open_sides((one, other), HubAccess(cache_dir))
        with progress_bar() as progress:
            found = compare(*sides, progress=progress)
        if compute:
            from speculators.comparison.computation import compute as run

            found.computation = run(*sides)
        result.difference = found
        if not found.same:
            result.fail("They differ.")
        if not as_json:
            _print(found)
    if not found.same:
        raise typer.Exit(1)


def _print(found: "Difference") -> None:
    """Print the tensors and keys that differ, and what follows."""
    import json
    from collections import Counter

    from speculators.cli.output import Listing, labelled, show

    counts = Counter(it.result for it in found.tensors)
    differing = [it for it in found.tensors if it.result != "same"]
    show(
        labelled(
            [
                ("A", [f"{found.a.name}: {found.a.title}"]),
                ("B", [f"{found.b.name}: {found.b.title}"]),
            ]
        ),
        "",
        f"{len(found.tensors)} tensors: "
        + ", ".join(f"{count} {SAID.get(it, it)}" for it, count in counts.items()),
    )
    if differing:
        rows = ((it.name, it.result, *_sides(it), _how_much(it)) for it in differing)
        show(Listing(("tensor", "", "A", "B", "by how much"), rows), "")
    if found.config:
        keys = (
            (
                it.key,
                json.dumps(it.a),
                json.dumps(it.b),
                "" if it.computed_with else "without effect",
            )
            for it in found.config
        )
        show(Listing(("key of config.json", "A", "B", ""), keys), "")
    elif found.a.in_format == found.b.in_format:
        show("The configs mean the same.")
    else:
        unread = found.b if found.a.in_format else found.a
        show(f"The config of {unread.name} cannot be read as that of a draft.")
    show(*(f"Note: {note}." for note in found.notes), *_conclusion(found))


SAID = {"same": "the same, byte for byte", "same values": "with the same values"}


def _sides(tensor: "TensorDifference") -> tuple[str, str]:
    from speculators.checkpoint.tensor import describe_shape

    one, other = (
        "-" if it is None else f"{it.dtype} {describe_shape(tuple(it.shape))}"
        for it in (tensor.a, tensor.b)
    )
    return one, other


def _how_much(tensor: "TensorDifference") -> str:
    if not tensor.differing:
        return "all zeros" if tensor.largest_value == 0 else ""
    if tensor.largest_difference is None or not tensor.largest_value:
        return f"{tensor.differing} values, some of which are not numbers"
    relative = tensor.largest_difference / tensor.largest_value
    return (
        f"{tensor.differing} values, by up to {tensor.largest_difference:.2g} "
        f"({relative:.2g} of the largest, {tensor.largest_value:.2g})"
    )


def _conclusion(found: "Difference") -> "Iterator[str]":
    if run := found.computation:
        relation = "the same" if run.same else "something else"
        yield (
            f"On random inputs they compute {relation}: the outputs differ by up to "
            f"{run.largest_difference:.2g}, and go up to {run.largest_value:.2g}."
        )
    results = {it.result for it in found.tensors}
    configs = "" if not any(it.computed_with for it in found.config) else ", with another config"
    if found.same:
        yield "They are the same draft."
    elif results <= {"same"}:
        yield f"They have the same tensors{configs}."
    elif results <= {"same", "same values"}:
        yield f"They have the same values, in other dtypes{configs}."
    elif results <= {"same", "same values", "rounded"}:
        yield f"They have the same tensors, rounded in one of them{configs}."
    else:
        yield "They are not the same draft."
