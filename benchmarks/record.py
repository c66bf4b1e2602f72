"""Measure scoring on a recording against decoding with the draft.

    python benchmarks/record.py DRAFT OTHER_DRAFT VERIFIER
    python benchmarks/record.py DRAFT OTHER_DRAFT VERIFIER --limit 4 --max-new-tokens 32

Chains of 1 to 8 tokens, or as many as a block of the draft has, and the dynamic tree, if it drafts
trees, are measured in one process, one after the other: by decoding with the first draft, as
`evaluate --acceptance-only` does; by recording the verifier's texts and scoring the first draft on
them; and by scoring the other draft on the same recording. Imports and loading models are not
counted, nor is the warm-up of decoding. With --commands, the whole commands are timed too, in
processes of their own. That both ways count the same steps is checked. The raw seconds go into
benchmarks/results/record.json.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from loguru import logger
from machine import cpu_name

from speculators.evaluate.defaults import LONGEST_DRAFT
from speculators.evaluate.evaluation import Evaluation
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.evaluate.recording.manifest import identify
from speculators.evaluate.recording.opening import open_scored
from speculators.evaluate.recording.recorder import record
from speculators.evaluate.recording.scoring import Scoring, load_scored
from speculators.evaluate.report import Settings
from speculators.evaluate.subject.loading import load_subject
from speculators.evaluate.subject.opening import Opened, open_draft
from speculators.format.config import ProposalMethod

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "record.json"
LONGEST = 8
TARGETS = {"recording and one draft": 8.0, "a further draft": 25.0}
"""How many times as fast as decoding it should be."""


@contextmanager
def timed(seconds: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Note the wall and CPU seconds that a block takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    seconds[name] = {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
    }
    print(f"{name}: {seconds[name]['wall']:.1f} s, {seconds[name]['cpu']:.1f} CPU s", flush=True)


def methods_of(opened: Opened) -> list[ProposalMethod]:
    """The proposal methods to measure a draft with."""
    config = opened.converted.config
    lengths = range(1, 1 + min(LONGEST, config.drafted_per_block or LONGEST))
    trees = [] if config.parallel else [ProposalMethod(proposal_type="dynamic_tree")]
    return [*(ProposalMethod(speculative_tokens=length) for length in lengths), *trees]


def commands(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The wall seconds of the whole commands, for drafts that draft chains of 8 and trees."""
    run = [sys.executable, "-m", "speculators"]
    verifier = ["--verifier", arguments.verifier]
    size = [f"--limit={arguments.limit}", f"--max-new-tokens={arguments.max_new_tokens}"]
    recording = folder / "recorded"
    chains, tree = ["--proposal=greedy", "--num-draft-tokens=1..8"], ["--proposal=dynamic_tree"]
    decoding = ["evaluate", arguments.draft, *verifier, *size, "--acceptance-only"]
    scoring = ["evaluate", arguments.draft, arguments.other, f"--recording={recording}"]
    called = {
        "decode chains": [*decoding, *chains],
        "decode trees": [*decoding, *tree],
        "record": ["record", arguments.verifier, str(recording), *size],
        "score chains of both drafts": [*scoring, *chains],
        "score trees of both drafts": [*scoring, *tree],
    }
    seconds = {}
    for name, command in called.items():
        start = time.perf_counter()
        subprocess.run([*run, *command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
        seconds[name] = time.perf_counter() - start
        print(f"command, {name}: {seconds[name]:.1f} s", flush=True)
    return seconds


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Decode, record and score; the seconds and what was counted."""
    seconds: dict[str, dict[str, float]] = {}
    opened = open_draft(arguments.draft, verifier=arguments.verifier)
    subject = load_subject(opened, dtype="float32")
    prompts = read_prompts(OWN_PROMPTS)[: arguments.limit]
    settings = Settings(
        prompts_total=len(prompts),
        max_new_tokens=arguments.max_new_tokens,
        acceptance_only=True,
    )

    drafts = {"score": arguments.draft, "score other": arguments.other}
    layers = sorted(
        {
            layer
            for directory in drafts.values()
            for layer in open_draft(
                directory, verifier=arguments.verifier
            ).converted.config.verifier_layers
        }
    )

    with timed(seconds, "record"):
        recording = record(
            subject.verifier,
            identify(opened.verifier),
            prompts,
            settings,
            folder / "recording",
            layers=layers,
            longest_draft=LONGEST_DRAFT,
        )
    reports = {}
    for name, directory in drafts.items():
        scored = open_scored(directory, recording, verifier=arguments.verifier)
        draft = load_scored(scored, recording)
        with timed(seconds, name):
            scoring = Scoring(scored, draft, recording, methods_of(scored))
            for _ in scoring.run():
                pass
        reports[name] = scoring.report()

    evaluation = Evaluation(subject, prompts, methods_of(opened), settings)
    with timed(seconds, "decode with warm-up"):
        for _ in evaluation.run():
            pass
    decoded = evaluation.report()
    decoding = sum(run.seconds or 0.0 for prompt in decoded.prompts for run in prompt.speculative)
    print(f"decode: {decoding:.1f} s", flush=True)
    ratios = {
        "recording and one draft": decoding
        / (seconds["record"]["wall"] + seconds["score"]["wall"]),
        "a further draft": decoding / seconds["score other"]["wall"],
    }
    return {
        "seconds": seconds,
        "decode_seconds": decoding,
        "times_as_fast": ratios,
        "targets": TARGETS,
        "equal": [one.acceptance for one in _runs(decoded)]
        == [one.acceptance for one in _runs(reports["score"])],
        "acceptance_lengths": {
            f"{it.proposal.proposal_type}:{it.proposal.speculative_tokens}": (
                it.overall.acceptance_length
            )
            for it in decoded.results
        },
    }


def _runs(report: Any) -> list[Any]:
    return [run for prompt in report.prompts for run in prompt.speculative]


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("draft")
    parser.add_argument("other")
    parser.add_argument("verifier")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logger.remove()
    with TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
        if arguments.commands:
            result["command_seconds"] = commands(arguments, Path(folder))
    result |= {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "prompts": arguments.limit,
        "max_new_tokens": arguments.max_new_tokens,
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }
    arguments.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, ratio in result["times_as_fast"].items():
        print(f"{name}: {ratio:.1f} times as fast as decoding (target: {TARGETS[name]:g})")
    print(f"the same steps counted: {result['equal']}")


if __name__ == "__main__":
    main()
