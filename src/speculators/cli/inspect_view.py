"""How a finding of `speculators inspect` is shown."""

import shlex
from collections.abc import Iterator

from rich.filesize import decimal

from speculators.checkpoint.tensor import describe_shape
from speculators.cli.output import Listing, labelled, show
from speculators.errors import listed
from speculators.families.readers import READERS
from speculators.families.registry import family_named
from speculators.families.serving import Refusal, Way
from speculators.families.signature import Serving
from speculators.inspection.findings import (
    Finding,
    MtpFinding,
    RefusalFinding,
    ServingFinding,
    TensorFinding,
    VerifierFinding,
)

__all__ = ["print_finding"]

AT_MOST_FILES = 3

LAYOUTS = {
    "current": "tensors have their current names",
    "0.1.0 to 0.3.0": "tensors have the names that versions 0.1.0 to 0.3.0 gave them",
}


def print_finding(finding: Finding) -> None:
    """Print what a checkpoint is, for people."""
    show(f"{finding.name}: {finding.title}", "", labelled(_lines(finding)))
    if finding.tensors:
        named = any(map(_becomes, finding.tensors))
        heads = ("tensor", "dtype", "shape", *(["in the format"] if named else []))
        rows = (
            (tensor.name, tensor.dtype, describe_shape(tuple(tensor.shape)), _becomes(tensor))
            for tensor in finding.tensors
        )
        show("", Listing(heads, (row[: len(heads)] for row in rows)))


def _lines(finding: Finding) -> Iterator[tuple[str, list[str]]]:
    features = finding.features or {}
    family = family_named(finding.family)
    labels = family.features if family else {}
    yield "evidence", finding.evidence
    yield "quantized", finding.quantized
    yield "nearest", [near.difference for near in finding.near]
    yield (
        "features",
        [f"{labels[it]}: {', '.join(names)}" for it, names in features.items() if names],
    )
    yield "without", [labels[it] for it, names in features.items() if not names]
    for label, fact in finding.facts.items():
        yield label, [fact]
    if finding.tensors:
        yield "weights", _weights(finding)
    if finding.sizes:
        yield "sizes", [", ".join(f"{key} {value}" for key, value in finding.sizes.items())]
    if source := finding.converted_from:
        yield "made of", [source.name + (f" at {source.revision}" if source.revision else "")]
    if finding.layout:
        yield "layout", [LAYOUTS[finding.layout]]
    if finding.verifier:
        yield "fits", _fits(finding.kind, finding.verifier)
    if finding.serving is not None:
        yield "served by", [*map(_served, finding.serving)] or ["no engine"]
    yield "not by", [*map(_not_served, finding.not_serving)]
    if finding.exports is not None:
        yield "exports", [", ".join(READERS[it] for it in finding.exports) or "none"]
    if finding.mtp:
        yield "mtp", _mtp(finding, finding.mtp)
    if finding.kind != "unknown":
        yield "conversion", _conversion(finding)
    yield "notes", finding.notes


def _weights(finding: Finding) -> list[str]:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in finding.dtypes.items())
    files = sorted({tensor.file for tensor in finding.tensors})
    more = len(files) - AT_MOST_FILES
    size = f"{finding.parameters:,} parameters, {decimal(finding.bytes)}"
    where = ", ".join(files[:AT_MOST_FILES]) + (f" and {more} more files" if more > 0 else "")
    return [f"{size}; tensors: {dtypes}; in {where}"]


def _fits(kind: str, verifier: VerifierFinding) -> list[str]:
    what = "drafts" if kind == "language-model" else "verifiers"
    sizes = (
        f"{what} of hidden size {verifier.hidden_size} and a vocabulary of {verifier.vocab_size}"
    )
    return [sizes] + ([f"its config names {verifier.name}"] if verifier.name else [])


def _served(it: ServingFinding) -> str:
    return str(Way(Serving(it.engine, it.option, it.until or "", it.note or ""), it.export))


def _not_served(it: RefusalFinding) -> str:
    return str(Refusal(it.engine, it.export, it.why, it.note or ""))


def _mtp(finding: Finding, mtp: MtpFinding) -> list[str]:
    said = f"{mtp.key} {mtp.promised}" if mtp.promised else None
    promise = f"promised by {said}" if said else f"config.json does not promise it ({mtp.key})"
    given = shlex.quote(finding.name)
    if mtp.state == "missing":
        return [
            f"{mtp.title}: missing, though config.json promises it ({said})",
            f"speculators mtp graft {given} MTP OUT puts one back",
        ]
    size = (
        f"{mtp.layers} layer{'s' * (mtp.layers > 1)}, {mtp.tensors} tensors, {decimal(mtp.bytes)}"
    )
    lines = [f"{mtp.title}: {mtp.state}, {size}; {promise}"]
    if mtp.missing:
        lines.append(f"missing: {listed(sorted(mtp.missing))}")
    stored = "; ".join(f"{count} in {how}" for how, count in mtp.stored.items())
    lines.append(f"{'quantized' if mtp.quantized else 'not quantized'}; its matrices: {stored}")
    if mtp.not_excluded:
        lines.append(
            "the quantization_config does not exclude these, which are not quantized: "
            + listed(sorted(mtp.not_excluded))
        )
    if mtp.state == "complete" and finding.kind == "language-model":
        lines.append(f"speculators mtp cut {given} OUT makes a draft of it")
    return lines


def _conversion(finding: Finding) -> list[str]:
    conversion = finding.conversion
    if conversion.command is None:
        return [f"not possible: {conversion.why_not}"]
    renamed = [it for it in finding.tensors if it.target and it.target != it.name]
    left_out = [it for it in finding.tensors if it.left_out]
    done = (
        f"renames {len(renamed)} tensors and leaves {len(left_out)} out; "
        "--dry-run tells what becomes of config.json"
    )
    return [conversion.command, done, *conversion.discrepancies]


def _becomes(tensor: TensorFinding) -> str:
    return tensor.target or (f"left out: {tensor.left_out}" if tensor.left_out else "")
