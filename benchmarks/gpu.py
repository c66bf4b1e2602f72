"""Measure on a GPU: decoding, the cost of a step at 8B size, loading, and correctness.

    python benchmarks/gpu.py VERIFIER
    python benchmarks/gpu.py VERIFIER --parts acceptance --device cpu
    python benchmarks/gpu.py --render benchmarks/results/gpu.json

VERIFIER is SmolLM2-135M-Instruct as made by `examples/make_verifier.py`, or, with --gguf, the
folder of the GGUF file that it is made from. The results of each part are written as soon as it
is done, with the conditions of the measurement; the results of other parts from earlier runs are
kept. If a part fails, its error is written and the next part runs. --render makes the tables and
plots of BENCHMARKS.md from the results.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = [ROOT / "examples" / f"smollm2-135m-{name}" for name in ("hass", "eagle1", "layernorms")]
DRAFTS = [path for path in EXAMPLES if path.is_dir()]
SECONDS = {
    "decoding": 240,
    "size": 120,
    "loading": 40,
    "correctness": 120,
    "static": 240,
    "kinds": 240,
    "acceptance": 1200,
}
"""The parts, and about how long each may take; it still finishes what it is measuring then."""
DEFAULT_PARTS = ("decoding", "size", "loading", "correctness")

Part = Callable[[Any, dict[str, Any], float], None]


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("verifier", type=Path, nargs="?", help="a directory with the model")
    parser.add_argument("--gguf", help="the verifier's weights, if they are a GGUF file in there")
    parser.add_argument("--tokenizer", type=Path, help="where it is, if not in there")
    parser.add_argument("--draft", type=Path, nargs="+", default=DRAFTS, help="as published")
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=list(DEFAULT_PARTS))
    parser.add_argument("--seconds", type=float, help="of each part, about")
    parser.add_argument("--prompts", type=int, help="by default, as many as each part takes")
    parser.add_argument("--max-new-tokens", type=int, help="likewise")
    parser.add_argument("--workers", type=int, default=12, help="that generate at a time")
    parser.add_argument("--shape", default="8b", help="of the constructed pair: 8b or tiny")
    parser.add_argument("--dtype", default="bfloat16", help="that speed is measured in")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="the results: gpu.json among the others")
    parser.add_argument("--render", type=Path, metavar="RESULTS", help="make tables and plots")
    options = parser.parse_args()
    if options.render is None and options.verifier is None:
        parser.error("give the verifier's directory, or --render")
    if options.output is None:
        on_cpu = options.device == "cpu"
        options.output = RESULTS / ("gpu-cpu-acceptance.json" if on_cpu else "gpu.json")
    return options


def main() -> int:
    """Measure or render; the exit status is the number of parts that failed."""
    options = parsed()
    if options.render is not None:
        from on_gpu.report import render

        render(json.loads(options.render.read_text(encoding="utf-8")), ROOT)
        return 0

    import torch
    from loguru import logger
    from on_gpu.bench import Bench, conditions, convert_drafts, free, prepare_verifier
    from on_gpu.correctness import acceptance, correctness
    from on_gpu.decoding import decoding, static
    from on_gpu.kinds import kinds
    from on_gpu.loading import loading
    from on_gpu.size import size
    from transformers.utils import logging as transformers_logging

    parts: dict[str, Part] = {
        "decoding": decoding,
        "size": size,
        "loading": loading,
        "correctness": correctness,
        "static": static,
        "kinds": kinds,
        "acceptance": acceptance,
    }
    logger.disable("speculators")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results: dict[str, Any] = {}
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))

    def save() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = options.output.with_suffix(".part")
        unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(options.output)

    device = torch.device(options.device)
    about = conditions(options, device)
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        verifier = prepare_verifier(options, Path(work))
        drafts = convert_drafts(options.draft, verifier, Path(work))
        bench = Bench(options, device, verifier, drafts, save)
        for name in options.parts:
            print(f"== {name}", flush=True)
            start = time.perf_counter()
            result: dict[str, Any] = {"conditions": about}
            results[name] = result
            try:
                parts[name](bench, result, start + (options.seconds or SECONDS[name]))
            except Exception as error:
                traceback.print_exc()
                result["error"] = f"{type(error).__name__}: {error}"
                failed += 1
            seconds = result["seconds"] = round(time.perf_counter() - start, 1)
            save()
            free(device)
            print(f"== {name}: {seconds} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
