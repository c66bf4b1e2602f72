"""Loading a draft of 8B size to the GPU, against the safetensors library on the same file."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file

from on_gpu.bench import Bench, free, in_turns, timed
from on_gpu.constructed_pair import SHAPES, random_draft, random_verifier
from speculators.models.eagle import EagleSpeculator

ROUNDS = 5
TARGET = 1.25
"""The longest loading time allowed, over the library's."""

BASELINE = "load_file"


def loading(bench: Bench, result: dict[str, Any], until: float) -> None:
    """Measure a draft that uses the verifier's embedding, and one with its own."""
    shape = SHAPES[bench.options.shape]
    verifier = random_verifier(shape, bench.device, bench.dtype)
    result |= {"shape": bench.options.shape, "target": TARGET, "cases": {}}
    for case, own in (("the verifier's embedding", False), ("an embedding of its own", True)):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "draft"
            random_draft(shape, bench.device, bench.dtype, own_embedding=own).save_pretrained(
                directory
            )
            result["cases"][case] = compared(bench, directory, verifier, until)
        bench.save()
    show(result)


def compared(bench: Bench, directory: Path, verifier: Any, until: float) -> dict[str, Any]:
    """Load a draft in each way, in turns, with its file in the page cache."""
    file, device = directory / "model.safetensors", str(bench.device)

    def by_device_map() -> Any:
        return EagleSpeculator.from_pretrained(
            directory, verifier=verifier, device_map={"": device}
        )

    def by_to() -> Any:
        return EagleSpeculator.from_pretrained(directory, verifier=verifier).to(device)  # type: ignore[arg-type]

    ways: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: load_file(file, device=device),
        "from_pretrained, device_map": by_device_map,
        "from_pretrained, to": by_to,
    }
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in ways}
    for turn in range(ROUNDS + 1):
        for name in in_turns(list(ways), turn):
            free(bench.device)
            before = reset_peak()
            loaded, seconds = timed(ways[name], bench.device)
            peak = peak_memory()
            del loaded
            if turn:  # the first round warms up
                found[name]["seconds"].append(seconds)
                if before is not None and peak is not None:
                    found[name].setdefault("peak_host_bytes", []).append(peak - before)
        if turn > 1 and time.perf_counter() > until:
            break
    free(bench.device)
    baseline = median(found[BASELINE]["seconds"])
    for said in found.values():
        said["median_s"] = median(said["seconds"])
        said["over_load_file"] = said["median_s"] / baseline
        if "peak_host_bytes" in said:
            said["peak_host_bytes"] = median(said["peak_host_bytes"])
    return {"bytes": file.stat().st_size, "ways": found}


def reset_peak() -> int | None:
    """Reset this process's peak memory in Linux; returns its current memory, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return None
    return status("VmRSS")


def peak_memory() -> int | None:
    """This process's peak memory since the reset, mapped files included, in bytes."""
    return status("VmHWM")


def status(key: str) -> int | None:
    """A number of /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    for case, said in result["cases"].items():
        print(f"{case}: {said['bytes'] / 1e9:.2f} GB")
        for name, way in said["ways"].items():
            peak = way.get("peak_host_bytes")
            told = "" if peak is None else f"  {peak / 1e6:8.0f} MB of host memory at most"
            print(f"  {name:28} {way['median_s']:7.3f} s  {way['over_load_file']:5.2f}{told}")
