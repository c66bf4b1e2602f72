"""Where the time of a step goes at real size, compared with the time to read the weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from on_gpu.bench import (
    CHAINS,
    TREES,
    Bench,
    Output,
    compile_small,
    generate,
    in_turns,
    named,
    newest_recording,
    part_ms,
    speculate,
    timed,
)
from on_gpu.constructed_pair import SHAPES, ConstructedPair, construct
from speculators.format.config import ProposalMethod

ACCEPTANCE = 0.8
PROMPT_TOKENS = 16
LENGTHS = {"plain": (8, 40), "ours": (32, 128)}
"""Numbers of new tokens. The difference between the longer and the shorter generation is steps
alone: prefill and one-time costs cancel out. All stays within 256 slots."""

ROUNDS = 5
OVERHEAD_TARGET, DRAFT_TARGET = 0.05, 1.5
"""The largest share outside the passes, and the longest draft pass over its floor, allowed."""

PLAIN, COMPILED = "transformers", "greedy:3, norms and MLPs compiled"


@dataclass(frozen=True)
class Contestant:
    """A way of generating.

    Attributes:
        run: generates this many new tokens.
        lengths: the smaller and the larger number of new tokens.
        proposal: the proposal method, if any.

    """

    run: Callable[[int], Output]
    lengths: tuple[int, int]
    proposal: ProposalMethod | None = None


def size(bench: Bench, result: dict[str, Any], until: float) -> None:
    """Measure the constructed pair."""
    shape = SHAPES[bench.options.shape]
    pair = construct(shape, ACCEPTANCE, bench.device, bench.dtype)
    ids = torch.randint(shape.vocabulary, (1, PROMPT_TOKENS), device=bench.device)
    bandwidth = result["conditions"]["copy_bandwidth"]
    weights = weights_read(pair)
    result |= {
        "shape": bench.options.shape,
        "acceptance_rate_set": ACCEPTANCE,
        "weights": weights,
        "floor_ms": {name: 1000 * nbytes / bandwidth for name, nbytes in weights.items()},
        "targets": {"overhead": OVERHEAD_TARGET, "draft_over_floor": DRAFT_TARGET},
        "contestants": {},
    }

    def ours(proposal: ProposalMethod, *, graphs: bool = True) -> Contestant:
        def run(length: int) -> Output:
            return speculate(pair.draft, ids, length, proposal, cuda_graphs=graphs)

        return Contestant(run, LENGTHS["ours"], proposal)

    contestants = {named(proposal): ours(proposal) for proposal in (*CHAINS[:6], *TREES)}
    contestants["greedy:3 without graphs"] = ours(CHAINS[2], graphs=False)
    contestants[PLAIN] = Contestant(
        lambda length: generate(pair.verifier, ids, length), LENGTHS["plain"]
    )
    in_rounds(bench, pair, ids, contestants, result, until)
    if time.perf_counter() < until:
        pair.draft._workspace.clear()
        compile_small(pair.verifier, pair.draft)
        in_rounds(bench, pair, ids, {COMPILED: ours(CHAINS[2])}, result, until)
    summarise(result)
    show(result)


def weights_read(pair: ConstructedPair) -> dict[str, int]:
    """Bytes of weights that a pass reads: all but the embeddings, of which it reads a few rows.

    Keys and values are not counted; they are half a percent of that with this prompt.
    """
    head = pair.verifier.get_output_embeddings().weight

    def others(model: Any) -> int:
        return sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in model.named_parameters()
            if "embed_tokens" not in name and parameter is not head
        )

    head_bytes = head.numel() * head.element_size()
    return {
        "draft": others(pair.draft) + head_bytes,
        "verify": others(pair.verifier) + head_bytes,
    }


def in_rounds(
    bench: Bench,
    pair: ConstructedPair,
    ids: Tensor,
    contestants: dict[str, Contestant],
    result: dict[str, Any],
    until: float,
) -> None:
    """Measure ms per step on the host's clock, then of its graphs alone, in turns."""
    workspace = pair.draft._workspace
    longest = max(contestant.lengths[1] for contestant in contestants.values())
    walk = pair.walk(int(ids[0, -1]), longest)
    recordings: dict[str, Any] = {}
    for name, contestant in contestants.items():  # records the graphs and counts acceptance
        before = len(workspace.recordings)
        long = contestant.lengths[1]
        start = time.perf_counter()
        output = contestant.run(long)
        if len(workspace.recordings) > before:
            recordings[name] = newest_recording(pair.draft)
        said: dict[str, Any] = {
            "steps": output.steps,
            "acceptance_length": 1 + output.accepted / output.steps,
            "acceptance_rate": output.accepted / output.tried if output.tried else None,
            "walks_the_cycle": output.tokens == walk[:long],
            "first_s": time.perf_counter() - start,
            "step_ms": [],
        }
        if contestant.proposal is not None and name in recordings:
            said |= {"draft_passes": draft_passes(contestant.proposal), "graphs_ms": []}
        result["contestants"][name] = said
    for turn in range(ROUNDS):
        start = time.perf_counter()
        for name in in_turns(list(contestants), turn):
            contestant, said = contestants[name], result["contestants"][name]
            (short, short_s), (long_one, long_s) = (
                timed(lambda n=length, c=contestant: c.run(n), bench.device)  # type: ignore[misc]
                for length in contestant.lengths
            )
            said["step_ms"].append(1000 * (long_s - short_s) / (long_one.steps - short.steps))
            if name in recordings:
                said["graphs_ms"].append(part_ms(recordings[name], bench.device))
        bench.save()
        if 2 * time.perf_counter() - start > until:
            break


def summarise(result: dict[str, Any]) -> None:
    """Compare what was measured with the floors, by the median of all rounds."""
    plain_ms = median(result["contestants"][PLAIN]["step_ms"])
    for said in result["contestants"].values():
        said["ms"] = median(said["step_ms"])
        said["tokens_per_second"] = 1000 * said["acceptance_length"] / said["ms"]
        said["speedup"] = plain_ms * said["acceptance_length"] / said["ms"]
        if not (rounds := said.get("graphs_ms")):
            continue
        parts = {part: median(one[part] for one in rounds) for part in rounds[0]}
        pass_ms = parts["draft"] / said["draft_passes"]
        said |= {
            "parts_ms": parts,
            "overhead": median(
                1 - sum(one.values()) / ms for one, ms in zip(rounds, said["step_ms"], strict=True)
            ),
            "draft_pass_ms": pass_ms,
            "draft_over_floor": pass_ms / result["floor_ms"]["draft"],
            "verify_over_floor": parts["verify"] / result["floor_ms"]["verify"],
        }


def draft_passes(proposal: ProposalMethod) -> int:
    """How many times a step reads the draft's weights."""
    # EAGLE-1's tree has five levels; a dynamic tree has one more than its ``tree_depth``.
    deepest = {"static_tree": 5, "dynamic_tree": 1 + (proposal.tree_depth or 0)}
    return deepest.get(proposal.proposal_type, proposal.speculative_tokens)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    floors = ", ".join(f"{name} {ms:.2f} ms" for name, ms in result["floor_ms"].items())
    print(f"floors: {floors}")
    print(f"{'':24} ms/step   draft  verify  gather  rest     draft/floor verify/floor  accepted")
    for name, said in result["contestants"].items():
        parts = said.get("parts_ms")
        told = f"{name:24} {said['ms']:7.2f}"
        if parts:
            told += "".join(f" {ms:7.3f}" for ms in parts.values())
            told += f" {said['overhead']:7.1%} {said['draft_over_floor']:11.2f}"
            told += f" {said['verify_over_floor']:12.2f}"
        rate = said["acceptance_rate"]
        print(told, f" {said['acceptance_length']:.2f}", f" p {rate:.3f}" if rate else "")
