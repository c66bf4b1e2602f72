"""Where the time of a step goes at real size, against the floors that reading the weights sets."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from on_gpu.bench import (
    CHAINS,
    TREES,
    Bench,
    Output,
    generate,
    in_turns,
    named,
    part_ms,
    recorded_alone,
    speculate,
    timed,
)
from on_gpu.constructed_pair import SHAPES, ConstructedPair, construct
from speculators.format.config import ProposalMethod

ACCEPTANCE = 0.8
PROMPT_TOKENS = 16
LENGTHS = {"plain": (8, 40), "ours": (32, 128)}
"""Numbers of new tokens. What the longer generation takes more than the shorter one is steps
alone: the passes over the prompt and what is done once fall out. All stays within 256 slots."""

ROUNDS = 5
OVERHEAD_TARGET, DRAFT_TARGET = 0.05, 1.5
"""The greatest share outside the passes; the longest draft pass over its floor."""


def size(bench: Bench, result: dict[str, Any], until: float) -> None:
    """Measure the constructed pair."""
    shape = SHAPES[bench.options.shape]
    pair = construct(shape, ACCEPTANCE, bench.device, bench.dtype)
    ids = torch.randint(shape.vocabulary, (1, PROMPT_TOKENS), device=bench.device)
    proposals = {named(proposal): proposal for proposal in (*CHAINS[:6], *TREES)}
    bandwidth = result["conditions"]["copy_bandwidth"]
    weights = weights_read(pair)
    result |= {
        "shape": bench.options.shape,
        "acceptance_rate_set": ACCEPTANCE,
        "weights": weights,
        "floor_ms": {name: 1000 * nbytes / bandwidth for name, nbytes in weights.items()},
        "targets": {"overhead": OVERHEAD_TARGET, "draft_over_floor": DRAFT_TARGET},
        "graphs_ms": {},
    }
    for name, proposal in proposals.items():
        recording = recorded_alone(pair.draft, ids, proposal)
        if recording is not None:
            result["graphs_ms"][name] = part_ms(recording, bench.device)
    pair.draft._workspace.clear()
    bench.save()
    walls(bench, pair, ids, proposals, result, until)
    summarise(result, proposals)
    show(result)


def weights_read(pair: ConstructedPair) -> dict[str, int]:
    """Bytes of weights that a pass reads: all but the embeddings, of which it reads a few rows.

    Keys and values, half a percent of it with this prompt, are not counted.
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


def walls(
    bench: Bench,
    pair: ConstructedPair,
    ids: Tensor,
    proposals: dict[str, ProposalMethod],
    result: dict[str, Any],
    until: float,
) -> None:
    """Milliseconds a step by the host's clock, all contestants in turns."""

    def plain(length: int) -> Output:
        return generate(pair.verifier, ids, length)

    def ours(proposal: ProposalMethod, graphs: bool) -> Callable[[int], Output]:
        return lambda length: speculate(pair.draft, ids, length, proposal, cuda_graphs=graphs)

    runs: dict[str, tuple[Callable[[int], Output], tuple[int, int]]] = {
        name: (ours(proposal, True), LENGTHS["ours"]) for name, proposal in proposals.items()
    }
    runs["greedy:3 without graphs"] = (ours(CHAINS[2], False), LENGTHS["ours"])
    runs["transformers"] = (plain, LENGTHS["plain"])
    walk = pair.walk(int(ids[0, -1]), max(max(lengths) for _, lengths in runs.values()))
    result["contestants"] = {name: {"step_ms": []} for name in runs}
    for name, (run, (_, long)) in runs.items():  # records the graphs, and shows the acceptance
        output = run(long)
        result["contestants"][name] |= {
            "steps": output.steps,
            "acceptance_length": 1 + output.accepted / output.steps,
            "acceptance_rate": output.accepted / output.tried if output.tried else None,
            "walks_the_cycle": output.tokens == walk[:long],
        }
    for turn in range(ROUNDS):
        start = time.perf_counter()
        for name in in_turns(list(runs), turn):
            run, lengths = runs[name]
            (short, short_s), (long_one, long_s) = (
                timed(lambda n=length, r=run: r(n), bench.device)  # type: ignore[misc]
                for length in lengths
            )
            step_ms = 1000 * (long_s - short_s) / (long_one.steps - short.steps)
            result["contestants"][name]["step_ms"].append(step_ms)
        bench.save()
        if 2 * time.perf_counter() - start > until:
            break


def summarise(result: dict[str, Any], proposals: dict[str, ProposalMethod]) -> None:
    """Set what was measured against the floors."""
    plain_ms = median(result["contestants"]["transformers"]["step_ms"])
    for name, said in result["contestants"].items():
        said["ms"] = median(said["step_ms"])
        said["tokens_per_second"] = 1000 * said["acceptance_length"] / said["ms"]
        said["speedup"] = plain_ms * said["acceptance_length"] / said["ms"]
        if (parts := result["graphs_ms"].get(name)) is None:
            continue
        passes = draft_passes(proposals[name])
        said |= {
            "overhead": 1 - sum(parts.values()) / said["ms"],
            "draft_passes": passes,
            "draft_pass_ms": parts["draft"] / passes,
            "draft_over_floor": parts["draft"] / passes / result["floor_ms"]["draft"],
            "verify_over_floor": parts["verify"] / result["floor_ms"]["verify"],
        }
        result["contestants"][name] = said


def draft_passes(proposal: ProposalMethod) -> int:
    """How often a step reads the draft's weights."""
    # EAGLE-1's tree has five levels; a dynamic one has one level more than it is grown.
    deepest = {"static_tree": 5, "dynamic_tree": 1 + (proposal.tree_depth or 0)}
    return deepest.get(proposal.proposal_type, proposal.speculative_tokens)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    floors = ", ".join(f"{name} {ms:.2f} ms" for name, ms in result["floor_ms"].items())
    print(f"floors: {floors}")
    print(f"{'':24} ms/step   draft  verify  gather  rest     draft/floor verify/floor  accepted")
    for name, said in result["contestants"].items():
        parts = result["graphs_ms"].get(name)
        told = f"{name:24} {said['ms']:7.2f}"
        if parts:
            told += "".join(f" {ms:7.3f}" for ms in parts.values())
            told += f" {said['overhead']:7.1%} {said['draft_over_floor']:11.2f}"
            told += f" {said['verify_over_floor']:12.2f}"
        rate = said["acceptance_rate"]
        print(told, f" {said['acceptance_length']:.2f}", f" p {rate:.3f}" if rate else "")
