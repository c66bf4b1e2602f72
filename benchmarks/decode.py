"""Measure speculation against the verifier's own generate, and where a step's time goes.

    python benchmarks/decode.py DRAFT VERIFIER
    python benchmarks/decode.py DRAFT VERIFIER --proposal greedy:3 --proposal dynamic_tree
    python benchmarks/decode.py DRAFT VERIFIER --proposal sampling:3 --top-p 0.9

For every prompt, the verifier's own generate and each proposal method run one after the other, in
an order that rotates with each prompt. A speed-up is the median over the prompts of the ratio of
their seconds per token, so that a temporary slowdown of the machine affects both. Time spent
outside the forward passes of draft and verifier is the overhead. The raw seconds go into
benchmarks/results/decode.json.

Decoding is greedy, unless --temperature, --top-k or --top-p is given: then tokens are sampled, with
neutral values for those that are not given, and with the same seed for all methods.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from machine import cpu_name
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from speculators.decode import Generation
from speculators.format.config import ProposalMethod
from speculators.models.eagle import EagleSpeculator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "decode.json"

PROMPTS = (
    "Name three fruits and say what colour each of them is.",
    "Explain to a child why the sky is blue.",
    "Write a short story about a fox who learns to swim.",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take?",
    "Write a Python function that counts the words in a file.",
    "Summarise in two sentences what photosynthesis is.",
    "Write an email to a colleague to move a meeting to Thursday.",
    "List five ways to save electricity at home.",
)
DEFAULT_PROPOSALS = ("greedy:1", "greedy:2", "greedy:3", "greedy:5", "static_tree", "dynamic_tree")
TARGET = 0.10
"""The largest share of time that may be spent outside the forward passes."""


@dataclass
class Run:
    """One generation; times in seconds."""

    tokens: int
    total_s: float
    draft_s: float
    verifier_s: float
    steps: int = 0
    accepted: int = 0
    same: bool | None = None
    """Whether the output is the verifier's own; expected of greedy decoding only."""

    @property
    def s_per_token(self) -> float:
        """Seconds per new token."""
        return self.total_s / self.tokens

    @property
    def overhead_s(self) -> float:
        """Seconds spent in neither model."""
        return self.total_s - self.draft_s - self.verifier_s


@dataclass
class Clock:
    """Seconds spent in forward passes."""

    draft: float = 0.0
    verifier: float = 0.0

    @contextmanager
    def watching(self, owner: object, method: str, kind: str) -> Any:
        """Add up the time that calls of a method take."""
        called: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return called(*args, **kwargs)
            finally:
                setattr(self, kind, getattr(self, kind) + now() - start)

        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)


@dataclass
class Case:
    """A proposal method and its runs; the baseline of each run has the same index."""

    name: str
    method: ProposalMethod
    runs: list[Run] = field(default_factory=list)


def now() -> float:
    """The time in seconds, once the GPU has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def parse_proposal(text: str) -> Case:
    """Parse a proposal method: ``greedy:3`` is a chain of three tokens."""
    name, _, tokens = text.partition(":")
    sizes = {"speculative_tokens": int(tokens)} if tokens else {}
    return Case(text, ProposalMethod.model_validate({"proposal_type": name, **sizes}))


def sampling_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``generate`` that say how tokens are chosen."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    given = {name: value for name in neutral if (value := getattr(arguments, name)) is not None}
    return {"do_sample": True, **neutral, **given} if given else {"do_sample": False}


def run(
    model: EagleSpeculator, ids: Tensor, method: ProposalMethod | None, settings: dict[str, Any]
) -> tuple[Run, Tensor]:
    """Generate with these settings, and with the verifier alone if there is no method."""
    verifier = model.verifier
    assert isinstance(verifier, PreTrainedModel)
    clock = Clock()
    torch.manual_seed(0)
    with (
        clock.watching(model, "draft", "draft"),
        clock.watching(model, "logits", "draft"),
        clock.watching(verifier, "forward", "verifier"),
    ):
        start = now()
        if method is None:
            sequences = verifier.generate(ids, **settings)  # type: ignore[operator]
            accepted: list[int] = []
        else:
            result = model.generate(ids, proposal=method, return_dict_in_generate=True, **settings)
            assert isinstance(result, Generation)
            sequences, accepted = result.sequences, result.accepted[0]
        total = now() - start
    tokens = sequences.shape[1] - ids.shape[1]
    done = Run(tokens, total, clock.draft, clock.verifier, len(accepted), sum(accepted))
    return done, sequences


def summarise(case: Case, baseline: list[Run]) -> dict[str, Any]:
    """Reduce the runs of a case to the numbers that matter."""
    runs = case.runs
    steps = max(1, sum(one.steps for one in runs))
    share = sum(one.overhead_s for one in runs) / sum(one.total_s for one in runs)
    return {
        "speed-up": median(
            plain.s_per_token / ours.s_per_token for plain, ours in zip(baseline, runs, strict=True)
        ),
        "tokens per second": sum(one.tokens for one in runs) / sum(one.total_s for one in runs),
        "acceptance length": 1 + sum(one.accepted for one in runs) / steps,
        "ms per step": {
            "draft": 1000 * sum(one.draft_s for one in runs) / steps,
            "verifier": 1000 * sum(one.verifier_s for one in runs) / steps,
            "rest": 1000 * sum(one.overhead_s for one in runs) / steps,
        },
        "overhead": share,
        "target": TARGET,
        "met": share <= TARGET,
        "same as the verifier": None
        if any(one.same is None for one in runs)
        else f"{sum(bool(one.same) for one in runs)} of {len(runs)}",
    }


def conditions(arguments: argparse.Namespace, model: EagleSpeculator) -> dict[str, Any]:
    """The machine, how busy it is, and what is measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("speculators", "torch", "transformers")},
        "draft": arguments.draft.name,
        "verifier": arguments.verifier.name,
        "dtype": arguments.dtype,
        "prompts": arguments.prompts,
        "max_new_tokens": arguments.max_new_tokens,
        "decoding": sampling_settings(arguments),
        "load_average_at_start": os.getloadavg(),
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("draft", type=Path, help="a converted draft")
    parser.add_argument("verifier", type=Path)
    parser.add_argument("--proposal", action="append", help="greedy:3, dynamic_tree, ...")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the results."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    dtype = getattr(torch, arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.verifier)
    verifier = AutoModelForCausalLM.from_pretrained(arguments.verifier, dtype=dtype)
    verifier.to(arguments.device)
    model = EagleSpeculator.from_pretrained(arguments.draft, verifier=verifier, dtype=dtype)
    model.to(arguments.device)

    def tokens_of(prompt: str) -> Tensor:
        encoded: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids: Tensor = encoded["input_ids"].to(arguments.device)
        return ids

    about = conditions(arguments, model)
    decoding = sampling_settings(arguments)
    settings = decoding | {"max_new_tokens": arguments.max_new_tokens}
    cases = [parse_proposal(text) for text in arguments.proposal or DEFAULT_PROPOSALS]
    baseline: list[Run] = []
    for case in cases:  # warm up
        run(model, tokens_of(PROMPTS[0]), case.method, settings | {"max_new_tokens": 8})
    run(model, tokens_of(PROMPTS[0]), None, settings | {"max_new_tokens": 8})
    for index, prompt in enumerate(PROMPTS[: arguments.prompts]):
        ids = tokens_of(prompt)
        order: dict[str, ProposalMethod | None] = {"": None, **{c.name: c.method for c in cases}}
        turn = index % len(order)
        found = {
            name: run(model, ids, order[name], settings)
            for name in [*list(order)[turn:], *list(order)[:turn]]
        }
        plain, expected = found[""]
        baseline.append(plain)
        for case in cases:
            done, sequences = found[case.name]
            done.same = None if decoding["do_sample"] else torch.equal(sequences, expected)
            case.runs.append(done)
        print(f"prompt {index + 1}: {plain.tokens} tokens, {plain.total_s:.1f} s alone", flush=True)
    about["load_average_at_end"] = os.getloadavg()

    summary = {case.name: summarise(case, baseline) for case in cases}
    alone = {
        "tokens per second": sum(one.tokens for one in baseline)
        / sum(one.total_s for one in baseline),
        "overhead": mean(one.overhead_s / one.total_s for one in baseline),
    }
    results = {
        "conditions": about,
        "plain": alone,
        "summary": summary,
        "raw": {
            "plain": [asdict(one) for one in baseline],
            **{case.name: [asdict(one) for one in case.runs] for case in cases},
        },
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{'alone':14} {alone['tokens per second']:6.1f} tokens/s")
    for name, numbers in summary.items():
        step = numbers["ms per step"]
        print(
            f"{name:14} {numbers['tokens per second']:6.1f} tokens/s, "
            f"speed-up {numbers['speed-up']:.2f}, "
            f"acceptance length {numbers['acceptance length']:.2f}, "
            f"ms per step: draft {step['draft']:.1f}, verifier {step['verifier']:.1f}, "
            f"rest {step['rest']:.1f} ({numbers['overhead']:.1%}), "
            f"same output: {numbers['same as the verifier'] or 'not expected'}"
        )


if __name__ == "__main__":
    main()
