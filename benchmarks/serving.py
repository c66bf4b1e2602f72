"""Compare vLLM with our plugin with vLLM's own EAGLE path, on the same plain EAGLE-1 draft.

    .venv-vllm/bin/python benchmarks/serving.py            as in `make bench-vllm`

Two engines are started: one without any plugin, with the draft that `speculators export --to vllm`
writes, and one with the plugin and the converted draft. They answer the same prompts in turns; the
ratio of their speeds is taken within each turn, so that a temporary slowdown of the machine affects
both. The raw seconds go into benchmarks/results/serving.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
DRAFT = ROOT / "examples" / "smollm2-135m-eagle1"
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"

TARGET = 0.97
DRAFT_TOKENS = 3
MAX_TOKENS = 64
THINGS = ("rain", "bread", "chess", "rivers", "trains", "honey", "maps", "bridges")
PROMPTS = [f"Tell me about {thing}, {how}." for thing in THINGS for how in ("briefly", "at length")]


def answer_in_turns(draft: str) -> None:
    """Run one of the engines: for every line of standard input, answer all prompts once.

    Prints a line of JSON for each turn, with seconds, tokens, and the accepted tokens so far.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(VERIFIER),
        dtype="float32",  # so that rounding does not change which tokens are accepted
        max_model_len=256,
        max_num_seqs=len(PROMPTS),
        kv_cache_memory_bytes=128 << 20,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={
            "method": "eagle",
            "model": draft,
            "num_speculative_tokens": DRAFT_TOKENS,
        },
    )
    chats: Any = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    for _ in sys.stdin:
        start = time.perf_counter()
        answers = llm.chat(chats, sampling, use_tqdm=False)
        turn = {
            "seconds": time.perf_counter() - start,
            "tokens": sum(len(answer.outputs[0].token_ids) for answer in answers),
            "accepted": next(
                metric.value
                for metric in llm.get_metrics()
                if metric.name == "vllm:spec_decode_num_accepted_tokens"
            ),
        }
        print("TURN " + json.dumps(turn), flush=True)


@dataclass
class Engine:
    """A process that answers on request."""

    process: subprocess.Popen[str]

    def turn(self) -> dict[str, float]:
        """Have it answer all prompts once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("TURN "):
                turn: dict[str, float] = json.loads(line.removeprefix("TURN "))
                return turn
        raise SystemExit("An engine stopped; run this again with its output shown: --verbose")


def start(draft: Path, *, plugins: str | None, verbose: bool) -> Engine:
    """Start an engine, without waiting for it to load."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
    }
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    return Engine(
        subprocess.Popen(
            [sys.executable, __file__, "--engine", str(draft)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
    )


def main() -> None:
    """Measure, print, and write the results; exit status 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--verbose", action="store_true", help="show what vLLM logs")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        answer_in_turns(arguments.engine)
        return

    from speculators.convert.eagle import EagleConverter
    from speculators.convert.export import export

    with tempfile.TemporaryDirectory() as name:
        converted = EagleConverter().convert(DRAFT, Path(name) / "converted", VERIFIER)
        exported = export(converted, Path(name) / "exported", "vllm")
        engines = {
            "native": start(exported, plugins="", verbose=arguments.verbose),
            "plugin": start(converted, plugins=None, verbose=arguments.verbose),
        }
        try:
            for engine in engines.values():
                engine.turn()  # to warm up
            turns: list[dict[str, dict[str, float]]] = []
            for number in range(arguments.turns):
                order = list(engines) if number % 2 else list(reversed(engines))
                turns.append({name: engines[name].turn() for name in order})
                print(turns[-1], flush=True)
        finally:
            for engine in engines.values():
                engine.process.terminate()
                engine.process.wait()

    speed = {
        name: [turn[name]["tokens"] / turn[name]["seconds"] for turn in turns] for name in engines
    }
    ratios = [ours / theirs for ours, theirs in zip(speed["plugin"], speed["native"], strict=True)]
    summary = {
        "plugin over native": {
            "median": median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "target": TARGET,
        },
        "tokens per second": {name: median(speeds) for name, speeds in speed.items()},
        "accepted alike": all(
            turn["plugin"]["accepted"] == turn["native"]["accepted"] for turn in turns
        ),
    }
    conditions = {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(
        json.dumps({"conditions": conditions, "summary": summary, "turns": turns}, indent=1) + "\n"
    )
    print(json.dumps(summary, indent=1))
    if median(ratios) < TARGET:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
