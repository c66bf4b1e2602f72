"""Measure vLLM on a GPU: our plugin against vLLM's own EAGLE model, and what drafts gain.

    python benchmarks/serving_gpu.py VERIFIER native:4 drafts:2 fp8:1
    python benchmarks/serving_gpu.py --render

VERIFIER is SmolLM2-135M-Instruct as made by `examples/make_verifier.py`. The engines of all
COMPARISONS that are named start first, each in a process with a directory of its own for vLLM's
cache. Then those of one comparison answer the same prompts, for as many rounds as are named: 16
prompts one at a time, and 480, of which up to 80 are answered at once. They take turns after every
four prompts, or every 160: while one engine answers, the others wait. Ratios are taken within each
turn. Every run is added to benchmarks/results/serving-gpu.json, round by round; --render makes the
tables and the plot of BENCHMARKS.md from it. To start again, delete that file.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import cpu_name
from on_gpu.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serving-gpu.json"
WORK = ROOT / ".cache" / "serving-gpu"

AT_ONCE = 80
"""Sequences in a batch, and the number of prompts."""
MAX_TOKENS = 256
TURNS = {
    "1": [[[number] for number in range(first, AT_ONCE, 20)] for first in (0, 5, 10, 15)],
    "80": [[[*range(AT_ONCE)] * 2]] * 3,
}
"""The batch size → turns → groups of prompts that are answered at once."""


@dataclass(frozen=True)
class Contestant:
    """An engine: the verifier with a draft, or alone.

    Attributes:
        draft: the last word of an example's name.
        tokens: how many it drafts at a time.
        native: served without the plugin, as written by `speculators export --to vllm`.
        quantization: of the verifier, as it is loaded.

    """

    draft: str | None = None
    tokens: int = 0
    native: bool = False
    quantization: str | None = None

    @property
    def name(self) -> str:
        """Such as ``eagle1:3`` or ``eagle1:3, vLLM's own``."""
        if self.draft is None:
            return "no draft"
        return f"{self.draft}:{self.tokens}" + (", vLLM's own" if self.native else "")

    @property
    def directory(self) -> str:
        """The name of its cache's directory."""
        return f"{self.draft}-{self.tokens}-{self.native}-{self.quantization}"


EAGLE1 = (Contestant("eagle1", 3, native=True), Contestant("eagle1", 3))
COMPARISONS = {
    "native": EAGLE1,
    "drafts": (
        Contestant(),
        Contestant("eagle1", 3),
        Contestant("layernorms", 3),
        *(Contestant("hass", tokens) for tokens in range(1, 6)),
    ),
    "fp8": tuple(
        Contestant(draft, tokens, native, "fp8")
        for draft, tokens, native in (
            (None, 0, False),
            ("eagle1", 3, False),
            ("hass", 3, False),
        )
    ),
}


def prepare(draft: str, verifier: Path, work: Path, *, native: bool) -> Path:
    """Convert an example, unless that was done, and export it for vLLM alone."""
    from speculators.convert.eagle import EagleConverter
    from speculators.convert.export import export

    converted, exported = work / draft, work / f"{draft}-exported"
    if not converted.exists():
        source = ROOT / "examples" / f"smollm2-135m-{draft}"
        EagleConverter().convert(source, converted, verifier, validate=False)
    if native and not exported.exists():
        export(converted, exported, "vllm")
    return exported if native else converted


def start(contestant: Contestant, verifier: Path, work: Path, chats: list[Any]) -> Engine:
    """Start an engine, without waiting for it."""
    arguments: dict[str, Any] = {
        "model": str(verifier),
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": AT_ONCE,
        "kv_cache_memory_bytes": 3 << 30,
        "gpu_memory_utilization": 0.02,  # which is not looked at, but has to be free
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    if contestant.quantization is not None:
        arguments["quantization"] = contestant.quantization
    if contestant.draft is not None:
        draft = prepare(contestant.draft, verifier, work, native=contestant.native)
        arguments["speculative_config"] = {
            "method": "eagle",
            "model": str(draft),
            "num_speculative_tokens": contestant.tokens,
        }
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(work / "caches" / contestant.directory),
    }
    if contestant.native or contestant.draft is None:
        environment["VLLM_PLUGINS"] = ""
    log = work / "logs" / f"{contestant.directory}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return Engine(arguments, chats, MAX_TOKENS, environment, log)


def conditions() -> dict[str, Any]:
    """The machine and the software."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    device, driver = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "driver": driver,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers")},
        "max_tokens": MAX_TOKENS,
    }


def compare(options: argparse.Namespace) -> None:
    """Make comparisons, and add them to the results."""
    from loguru import logger

    from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts

    logger.disable("speculators")
    chats = [
        [{"role": message.role, "content": message.content} for message in prompt.messages]
        for prompt in read_prompts(OWN_PROMPTS)
    ]
    results: dict[str, Any] = {"runs": []}
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))

    def save() -> None:
        unfinished = options.output.with_suffix(".part")
        unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(options.output)

    about = conditions()
    engines: dict[Contestant, Engine] = {}
    try:
        started = start_all(options, chats, engines)
        for comparison, rounds in options.comparisons:
            contestants = {it.name: engines[it] for it in COMPARISONS[comparison]}
            run: dict[str, Any] = {
                "comparison": comparison,
                "conditions": about,
                "started": "one by one" if options.one_by_one else "together",
                "engines": {it.name: started[it] for it in COMPARISONS[comparison]},
                "rounds": [],
            }
            results["runs"].append(run)
            for engine in contestants.values():  # to warm up
                for turns in TURNS.values():
                    engine.answer(turns[0])
            for number in range(rounds):
                one = answer_in_turns(contestants)
                answers = taken_answers(one)
                run.setdefault("answers", answers)  # later rounds give the same
                run["rounds"].append(one)
                save()
                print(comparison, number, told(one), flush=True)
        for run in results["runs"][-len(options.comparisons) :]:
            if run["comparison"] == "native":
                run["kernels"] = {it.name: kernels(engines[it]) for it in EAGLE1}
                save()
    finally:
        for engine in engines.values():
            engine.stop()


def start_all(
    options: argparse.Namespace, chats: list[Any], engines: dict[Contestant, Engine]
) -> dict[Contestant, dict[str, Any]]:
    """Start the engines of all comparisons, and say how long each took."""
    contestants = dict.fromkeys(
        it for comparison, _ in options.comparisons for it in COMPARISONS[comparison]
    )
    started: dict[Contestant, dict[str, Any]] = {}
    for it in contestants:
        cached = (options.work / "caches" / it.directory).exists()
        started[it] = {"cache": "filled" if cached else "empty"}
        engines[it] = start(it, options.verifier, options.work, chats)
        if options.one_by_one:
            started[it]["start_s"] = engines[it].wait()
    for it, engine in engines.items():
        if not options.one_by_one:
            started[it]["start_s"] = engine.wait()
        print(it, started[it], flush=True)
    return started


def answer_in_turns(engines: dict[str, Engine]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Have all engines answer all prompts; what was measured of each, by batch size and turn."""
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {size: [] for size in TURNS} for name in engines
    }
    for size, turns in TURNS.items():
        for number, groups in enumerate(turns):
            for name in list(engines) if number % 2 else list(reversed(engines)):
                measured[name][size].append(engines[name].answer(groups))
    return measured


def kernels(engine: Engine) -> dict[str, dict[str, Any]]:
    """What runs on the GPU for a few tokens, by batch size."""
    groups = {"1": [[0]], "80": [[*range(AT_ONCE)]]}
    return {size: engine.answer(it, profiled=True) for size, it in groups.items()}


def taken_answers(one: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, str]]:
    """Take the digests of the answers out of a round; those of each engine, by batch size."""
    return {
        name: {
            size: " ".join(answer for measured in turns for answer in measured.pop("answers"))
            for size, turns in sizes.items()
        }
        for name, sizes in one.items()
    }


def told(one: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, list[int]]:
    """Tokens per second, for the screen."""
    return {
        name: [
            round(sum(it["tokens"] for it in turns) / sum(it["seconds"] for it in turns))
            for turns in sizes.values()
        ]
        for name, sizes in one.items()
    }


def comparison(text: str) -> tuple[str, int]:
    """A comparison and its number of rounds, from the command line."""
    name, _, rounds = text.partition(":")
    if name not in COMPARISONS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(COMPARISONS)}")
    return name, int(rounds or 4)


def main() -> None:
    """Measure or render."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("verifier", nargs="?", type=Path)
    parser.add_argument("comparisons", nargs="*", type=comparison, metavar="COMPARISON[:ROUNDS]")
    parser.add_argument("--one-by-one", action="store_true", help="start one engine at a time")
    parser.add_argument("--work", type=Path, default=WORK, help="for drafts, caches and logs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="make the tables and the plot")
    options = parser.parse_args()
    if options.render:
        from on_gpu.serving_report import render

        render(json.loads(options.output.read_text(encoding="utf-8"))["runs"], ROOT)
    elif not options.comparisons:
        parser.error("name the verifier's directory and comparisons, or give --render")
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        compare(options)


if __name__ == "__main__":
    main()
