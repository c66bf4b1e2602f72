"""Measure converting an EAGLE-3 draft against `cp`, and against speculators 0.9.0.

    make .venv-upstream/.installed
    python benchmarks/convert_eagle3.py

The draft has the shapes of EAGLE-3 for Llama 3.1 8B in SafeAILab's layout: 848 MB in float16. As
in `convert.py`, a copy, a conversion and one of a tiny draft (the start-up time) run one after the
other, and ratios are taken within such a round. The raw seconds go into
benchmarks/results/convert-eagle3.json.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from beside import UPSTREAM, UPSTREAM_VERSION
from make_checkpoint import SIZES, write_verifier

from convert import CACHE, COMMAND, ROOT, TIMED_COMMAND, Case, Run, conditions, copy, run

RESULTS = ROOT / "benchmarks" / "results" / "convert-eagle3.json"
MAKE = "make"
"""The first argument of the process that writes a checkpoint, whose memory is not measured."""

LAYERS = 32
"""The verifier's, of which the draft reads the states that enter 2, 16 and 29."""

DRAFTED = {"8B": 32000, "small": 96}


def write_draft(directory: Path, size: str) -> None:
    """Write an EAGLE-3 checkpoint with random weights in SafeAILab's layout."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    sizes, drafted = SIZES[size], DRAFTED[size]
    hidden, key_value = sizes.hidden, sizes.hidden // sizes.heads * sizes.key_value_heads
    shapes = {
        "fc.weight": (hidden, 3 * hidden),
        "lm_head.weight": (drafted, hidden),
        "norm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (hidden, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (key_value, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (key_value, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, hidden),
        "midlayer.mlp.gate_proj.weight": (sizes.intermediate, hidden),
        "midlayer.mlp.up_proj.weight": (sizes.intermediate, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, sizes.intermediate),
        **{
            f"midlayer.{name}.weight": (hidden,)
            for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
        },
    }
    tensors = {
        name: torch.empty(shape, dtype=torch.float16).normal_(std=0.02)
        for name, shape in shapes.items()
    }
    tokens = torch.arange(drafted) * (sizes.vocabulary // drafted)
    tensors["d2t"] = tokens - torch.arange(drafted)
    tensors["t2d"] = torch.zeros(sizes.vocabulary, dtype=torch.bool)
    tensors["t2d"][tokens] = True
    write_verifier(directory, size, draft_vocab_size=drafted, torch_dtype="float16")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def convert(source: Path, target: Path, verifier: Path) -> Run:
    """Run `speculators convert eagle3 --no-validate`, with its fsync calls timed."""
    report = target.with_name("fsync")
    arguments = ("convert", "eagle3", source, target, verifier, "--no-validate")
    done = run(*TIMED_COMMAND, report, *arguments)
    done.fsync_s, done.fsync_cpu_s = map(float, report.read_text().split())
    return done


def convert_upstream(source: Path, target: Path, verifier: Path) -> Run:
    """Let the PyPI project speculators convert it; it validates only if it is given a device."""
    arguments = ("--algorithm", "eagle3", "--verifier", verifier, "--output-path", target)
    return run(UPSTREAM, "-I", "-m", "speculators", "convert", source, *arguments)


def measure(repeats: int, folder: Path, size: str) -> tuple[Case, list[Run]]:
    """Run copies and conversions in turns, then the other converter."""
    source, target, verifier = folder / "draft", folder / "out", folder / "verifier"
    tiny = folder / "tiny"
    for directory, of in ((source, size), (tiny, "small")):
        run(sys.executable, __file__, MAKE, directory, of)
    write_verifier(verifier, size, num_hidden_layers=LAYERS)
    write_verifier(folder / "tiny-verifier", "small", num_hidden_layers=LAYERS)
    case = Case("safetensors", sum(path.stat().st_size for path in source.iterdir()) / 1e6)

    def once(what: Callable[[], Run]) -> Run:
        os.sync()
        try:
            return what()
        finally:
            shutil.rmtree(target, ignore_errors=True)

    once(lambda: copy(source, target))  # into the page cache
    for repeat in range(repeats):
        if repeat % 2:
            case.cp.append(once(lambda: copy(source, target)))
        case.convert.append(once(lambda: convert(source, target, verifier)))
        case.startup.append(once(lambda: convert(tiny, target, folder / "tiny-verifier")))
        if not repeat % 2:
            case.cp.append(once(lambda: copy(source, target)))
        print(f"cp {case.cp[-1]}, convert {case.convert[-1]}", flush=True)
    upstream = []
    for _ in range(min(repeats, 3)):
        upstream.append(once(lambda: convert_upstream(source, target, verifier)))
        print(f"{UPSTREAM_VERSION} {upstream[-1]}", flush=True)
    return case, upstream


def summarise(case: Case, upstream: list[Run]) -> dict[str, Any]:
    """Reduce the runs to the numbers that have targets."""
    cpu, peak = (
        median(getattr(it, what) for it in upstream) / median(getattr(it, what) for it in ours)
        for what, ours in (("cpu_s", case.convert), ("peak_mb", case.convert))
    )
    return {
        "over cp": {
            "median": median(case.ratios(fsync=False)),
            "of CPU": median(case.cpu_ratios()),
            "at most": 1.15,
        },
        "over cp, with fsync in both": {"median": median(case.ratios(fsync=True))},
        "peak MB": {"median": median(it.peak_mb for it in case.convert), "at most": 60},
        "CPU seconds": {"median": median(it.cpu_s for it in case.convert)},
        f"CPU time of {UPSTREAM_VERSION} over ours": {
            "median": cpu,
            "its CPU seconds": median(it.cpu_s for it in upstream),
            "at least": 20,
        },
        f"memory of {UPSTREAM_VERSION} over ours": {
            "median": peak,
            "its peak MB": median(it.peak_mb for it in upstream),
            "at least": 40,
        },
    }


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    CACHE.mkdir(exist_ok=True)
    about = conditions()
    run(*COMMAND, "--help")  # into the page cache
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="bench-") as name:
        case, upstream = measure(arguments.repeats, Path(name), arguments.size)
    about["load_average_at_end"] = os.getloadavg()
    summary = summarise(case, upstream)
    results = {
        "conditions": about,
        "size": arguments.size,
        "megabytes": case.megabytes,
        "summary": summary,
        "raw": json.loads(json.dumps({"ours": case, UPSTREAM_VERSION: upstream}, default=asdict)),
    }
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    for what, numbers in summary.items():
        print(f"{what:45} {json.dumps(numbers)}")


if __name__ == "__main__":
    if sys.argv[1:2] == [MAKE]:
        write_draft(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
