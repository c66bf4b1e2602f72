"""Speed of the real pair, in turns with transformers' own ways of generating."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from on_gpu.bench import (
    CHAINS,
    TREES,
    Bench,
    OutOfTimeError,
    Output,
    compile_small,
    generate,
    in_turns,
    look_up,
    named,
    part_ms,
    recorded_alone,
    speculate,
    timed,
)
from speculators.evaluate.prompts import Prompt
from speculators.format.config import ProposalMethod
from speculators.models.speculator import Speculator

PLAIN = "transformers"
LOOKED_UP = (3, 10)
"""The most tokens that transformers' prompt lookup may propose."""

USUAL = CHAINS[2]
"""The proposal that every draft is measured with."""

PROMPTS, NEW_TOKENS, WARM_UP_TOKENS = 8, 128, 16


@dataclass(frozen=True)
class Contestant:
    """A way of generating.

    Attributes:
        run: generates from a prompt's tokens, given the number of new tokens.
        about: describes it in the results.
        draft: the draft whose graphs it may record.

    """

    run: Callable[[Tensor, int], Output]
    about: dict[str, Any]
    draft: Speculator | None = None

    def recordings(self) -> set[Any]:
        """The graphs recorded so far."""
        return set(self.draft._workspace.recordings.values()) if self.draft else set()


def contestants_of(bench: Bench, verifier: Any) -> dict[str, Contestant]:
    """All ways of generating, by name; only the first draft is run with every proposal method."""
    found = {PLAIN: Contestant(partial(generate, verifier), {"kind": "plain"})}
    for tokens in LOOKED_UP:
        found[f"{PLAIN}, prompt lookup {tokens}"] = Contestant(
            partial(look_up, verifier, tokens=tokens),
            {"kind": "prompt lookup", "tokens": tokens},
        )
    for name in bench.drafts:
        draft = bench.load_draft(name, verifier)
        first = name == next(iter(bench.drafts))
        for proposal in (*CHAINS, *TREES) if first else (USUAL,):
            found[f"{name} {named(proposal)}"] = ours(name, draft, proposal)
        if first:
            found[f"{name} {named(USUAL)} without graphs"] = ours(
                name, draft, USUAL, cuda_graphs=False
            )
    return found


def ours(
    name: str, draft: Speculator, proposal: ProposalMethod, *, cuda_graphs: bool = True
) -> Contestant:
    """A draft with a proposal method."""

    def run(ids: Tensor, max_new_tokens: int) -> Output:
        return speculate(draft, ids, max_new_tokens, proposal, cuda_graphs=cuda_graphs)

    about = {
        "kind": "ours",
        "draft": name,
        "proposal": proposal.proposal_type,
        "tokens": proposal.speculative_tokens,
        "graphs": cuda_graphs,
    }
    return Contestant(run, about, draft)


def measure(
    bench: Bench, contestant: Contestant, ids: Tensor, max_new_tokens: int
) -> tuple[Output, float]:
    """Generate once, and again if that recorded graphs, since recording is a one-time cost.

    A few tokens are generated first, so that the clocks of host and GPU have settled on this
    contestant's kind of work, not on that of the one before it.
    """
    contestant.run(ids, min(WARM_UP_TOKENS, max_new_tokens))
    for _ in range(4):
        before = contestant.recordings()
        output, seconds = timed(lambda: contestant.run(ids, max_new_tokens), bench.device)
        if contestant.recordings() == before:
            break
    return output, seconds


def one_round(
    bench: Bench,
    contestants: dict[str, Contestant],
    asked: tuple[Prompt, Tensor],
    max_new_tokens: int,
    turn: int,
) -> list[dict[str, Any]]:
    """Have every contestant generate for a prompt, in an order that rotates with each turn."""
    prompt, ids = asked
    outputs = {
        name: measure(bench, contestants[name], ids, max_new_tokens)
        for name in in_turns(list(contestants), turn)
    }
    expected = outputs[PLAIN][0].tokens
    return [
        {
            "contestant": name,
            "prompt": prompt.id,
            "category": prompt.category,
            "tokens": len(outputs[name][0].tokens),
            "seconds": outputs[name][1],
            "steps": outputs[name][0].steps,
            "accepted": outputs[name][0].accepted,
            "same": outputs[name][0].tokens == expected,
        }
        for name in contestants
    ]


def decoding(bench: Bench, result: dict[str, Any], until: float) -> None:
    """Measure every contestant, and the parts of a step."""
    verifier = bench.load_verifier(bench.dtype)
    longest = take_turns(bench, contestants_of(bench, verifier), result, until)
    result["step_ms"] = steps_of(bench, verifier, longest)
    show(result)


def take_turns(
    bench: Bench, contestants: dict[str, Contestant], result: dict[str, Any], until: float
) -> Tensor:
    """Measure every contestant prompt by prompt, until time is up.

    Returns:
        the tokens of the longest prompt.

    """
    count = bench.options.prompts or PROMPTS
    length = bench.options.max_new_tokens or NEW_TOKENS
    result["prompts"], result["max_new_tokens"], result["raw"] = count, length, []
    prompts = bench.encoded(count)
    # The longest first, so that no cache has to grow later, which would drop its graphs.
    longest = max((ids for _, ids in prompts), key=lambda ids: ids.shape[1])
    for contestant in contestants.values():
        contestant.run(longest, length if contestant.draft else min(WARM_UP_TOKENS, length))
    print(f"warmed up, {until - time.perf_counter():.0f} s left", flush=True)

    slowest = 0.0
    for turn, asked in enumerate(prompts):
        start = time.perf_counter()
        if start + slowest > until:
            break
        result["raw"] += one_round(bench, contestants, asked, length, turn)
        result["contestants"] = summarise(contestants, result["raw"])
        bench.save()
        slowest = max(slowest, time.perf_counter() - start)
        print(f"prompt {turn + 1} of {count}: {time.perf_counter() - start:.1f} s", flush=True)
    if not result["raw"]:
        raise OutOfTimeError("The time was over before the first prompt.")
    return longest


def summarise(contestants: dict[str, Contestant], raw: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals by contestant: sums of tokens over sums of seconds."""
    summary: dict[str, Any] = {}
    for name, contestant in contestants.items():
        runs = [run for run in raw if run["contestant"] == name]
        tokens, seconds, steps, accepted, same = (
            sum(run[key] for run in runs)
            for key in ("tokens", "seconds", "steps", "accepted", "same")
        )
        summary[name] = contestant.about | {
            "tokens_per_second": tokens / seconds,
            "acceptance_length": 1 + accepted / steps if steps else None,
            "ms_per_step": 1000 * seconds / steps if steps else None,
            "same_as_transformers": same,
            "prompts": len(runs),
        }
    for said in summary.values():
        said["speedup"] = said["tokens_per_second"] / summary[PLAIN]["tokens_per_second"]
    return summary


def steps_of(bench: Bench, verifier: Any, ids: Tensor) -> dict[str, dict[str, float]]:
    """GPU time of the parts of a step of the first draft; empty if nothing is recorded."""
    draft = bench.load_draft(next(iter(bench.drafts)), verifier)
    found = {}
    for proposal in (*CHAINS, *TREES):
        recording = recorded_alone(draft, ids[:, :64], proposal)
        if recording is not None:
            found[named(proposal)] = part_ms(recording, bench.device)
    return found


def static(bench: Bench, result: dict[str, Any], until: float) -> None:
    """Measure transformers' static cache, which it compiles for, in turns with speculation.

    Speculation runs with plain models, and with norms and MLPs compiled. Compiling is reported
    separately, as the extra time of the first generation over the third.
    """
    count = bench.options.prompts or PROMPTS
    length = bench.options.max_new_tokens or NEW_TOKENS
    result["prompts"], result["max_new_tokens"], result["raw"] = count, length, []
    result["first_s"] = {}
    name = next(iter(bench.drafts))
    # One for each contestant, so that none runs code that was compiled for another.
    verifiers = [bench.load_verifier(bench.dtype) for _ in range(3)]
    compiled = bench.load_draft(name, verifiers[2])
    compile_small(verifiers[2], compiled)
    contestants = {
        PLAIN: Contestant(
            partial(generate, verifiers[0], cache_implementation="static"), {"kind": "static cache"}
        ),
        f"{name} {named(USUAL)}": ours(name, bench.load_draft(name, verifiers[1]), USUAL),
        f"{name} {named(USUAL)}, norms and MLPs compiled": ours(name, compiled, USUAL),
    }
    # The longest first, so that the static cache keeps its size.
    prompts = sorted(bench.encoded(count), key=lambda one: -one[1].shape[1])
    with alarm(until - time.perf_counter()):
        for one, contestant in contestants.items():
            result["first_s"][one] = [
                timed(partial(contestant.run, prompts[0][1], length), bench.device)[1]
                for _ in range(3)
            ]
        for turn, asked in enumerate(prompts):
            result["raw"] += one_round(bench, contestants, asked, length, turn)
            result["contestants"] = summarise(contestants, result["raw"])
            bench.save()
    for one, said in result["contestants"].items():
        print(f"{one:40} {said['tokens_per_second']:8.1f} tokens/s")


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTimeError`` in the block after this many seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTimeError(f"{seconds:.0f} seconds were over.")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'':34} tokens/s  speed-up  accepted  ms/step  same")
    for name, said in result["contestants"].items():
        print(
            f"{name:34} {said['tokens_per_second']:8.1f}  {said['speedup']:8.2f}  "
            f"{said['acceptance_length'] or 0:8.2f}  {said['ms_per_step'] or 0:7.2f}  "
            f"{said['same_as_transformers']}/{said['prompts']}"
        )
    for name, parts in result["step_ms"].items():
        print(f"{name:34} " + ", ".join(f"{key} {ms:.3f} ms" for key, ms in parts.items()))
