"""Drafts of different kinds, in turns: one token after the other, or a block in one pass."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from on_gpu.bench import (
    Bench,
    Output,
    convert_drafts,
    free,
    generate,
    named,
    part_ms,
    recorded_alone,
    speculate,
)
from on_gpu.correctness import TIE, change_of_lead, first_difference, gap, logits_at
from on_gpu.decoding import PLAIN, PROMPTS, Contestant, ours, take_turns
from speculators.format.config import ProposalMethod

ROOT = Path(__file__).resolve().parents[2]
KINDS = [ROOT / "examples" / f"smollm2-135m-{name}" for name in ("hass", "eagle3", "dflash")]
ONE_PASS = "dflash"
CHAINS = [ProposalMethod(speculative_tokens=tokens) for tokens in (3, 5, 7)]
TREE = ProposalMethod(proposal_type="dynamic_tree")
COMPARED_TOKENS = 64
"""The most new tokens of each prompt where outputs are compared: as in examples/README.md, whose
acceptance lengths are from a CPU."""


def kinds(bench: Bench, result: dict[str, Any], until: float) -> None:
    """Measure speed, the parts of a step, and whether outputs are the verifier's."""
    with TemporaryDirectory() as work:
        drafts = convert_drafts(KINDS, bench.verifier, Path(work))
        bench = replace(bench, drafts=drafts)
        verifier = bench.load_verifier(bench.dtype)
        longest = take_turns(bench, contestants_of(bench, verifier), result, until)
        result["step_ms"] = steps_of(bench, verifier, longest)
        del verifier
        free(bench.device)
        bench.save()
        result["outputs"] = outputs_of(bench)
    show(result)


def proposals_of(name: str) -> list[ProposalMethod]:
    """What a draft can propose, of what is measured."""
    return CHAINS if name == ONE_PASS else [*CHAINS, TREE]


def contestants_of(bench: Bench, verifier: Any) -> dict[str, Contestant]:
    """All ways of generating, by name."""
    found = {PLAIN: Contestant(partial(generate, verifier), {"kind": "plain"})}
    for name in bench.drafts:
        draft = bench.load_draft(name, verifier)
        for proposal in proposals_of(name):
            found[f"{name} {named(proposal)}"] = ours(name, draft, proposal)
        if name == ONE_PASS:
            whole = CHAINS[-1]
            found[f"{name} {named(whole)} without graphs"] = ours(
                name, draft, whole, cuda_graphs=False
            )
    return found


def steps_of(bench: Bench, verifier: Any, ids: Tensor) -> dict[str, dict[str, float]]:
    """GPU time of the parts of a step, by draft and proposal; without those not recorded."""
    found = {}
    for name in bench.drafts:
        draft = bench.load_draft(name, verifier)
        for proposal in proposals_of(name):
            recording = recorded_alone(draft, ids[:, :64], proposal)
            if recording is not None:
                found[f"{name} {named(proposal)}"] = part_ms(recording, bench.device)
    return found


def outputs_of(bench: Bench) -> dict[str, Any]:
    """Compare outputs with transformers', and count what is accepted, in two dtypes.

    The first difference of each output is examined as for losslessness.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    length = bench.options.max_new_tokens or COMPARED_TOKENS
    prompts = bench.encoded(bench.options.prompts or PROMPTS)
    exact = bench.load_verifier(torch.float32)
    found: dict[str, Any] = {"prompts": len(prompts), "max_new_tokens": length, "dtypes": {}}
    for dtype in (torch.float32, torch.bfloat16):
        verifier = exact if dtype == torch.float32 else bench.load_verifier(dtype)
        theirs = [generate(verifier, ids, length).tokens for _, ids in prompts]
        pairs = [
            (logits_at(exact, ids, tokens), logits_at(verifier, ids, tokens))
            for (_, ids), tokens in zip(prompts, theirs, strict=True)
        ]
        changes = torch.cat([change_of_lead(*pair) for pair in pairs]).double()
        tie = TIE * float(changes.quantile(0.99))
        said: dict[str, Any] = {"tie_in_spacings": tie}
        found["dtypes"][str(dtype).removeprefix("torch.")] = said
        for name in bench.drafts:
            draft = bench.load_draft(name, verifier)
            for proposal in (CHAINS[0], CHAINS[-1]):
                outputs = [speculate(draft, ids, length, proposal) for _, ids in prompts]
                said[f"{name} {named(proposal)}"] = compared(theirs, outputs, pairs, tie)
    return found


def compared(
    theirs: list[list[int]],
    outputs: list[Output],
    pairs: list[tuple[Tensor, Tensor]],
    tie: float,
) -> dict[str, Any]:
    """What was accepted, and where outputs differ.

    Args:
        theirs: the verifier's own tokens, by prompt.
        outputs: likewise, with a draft.
        pairs: by prompt, the verifier's logits along its own tokens, in float32 and rounded.
        tie: the gap that counts as a tie, in spacings.

    """
    differences = []
    for number, (tokens, output, (logits, rounded)) in enumerate(
        zip(theirs, outputs, pairs, strict=True)
    ):
        at = first_difference(tokens, output.tokens)
        if at is not None:
            two = [one[at] if at < len(one) else None for one in (tokens, output.tokens)]
            told = gap(logits[at], rounded[at], two) if at < len(logits) else {}
            differences.append({"prompt": number, "position": at} | told)
    steps, accepted = ([getattr(one, key) for one in outputs] for key in ("steps", "accepted"))
    return {
        "acceptance_length": 1 + sum(accepted) / sum(steps),
        "steps": steps,
        "accepted": accepted,
        "identical": len(outputs) - len(differences),
        "ties": sum(one.get("gap_in_spacings", tie + 1) <= tie for one in differences),
        "differences": differences,
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    for name, said in result["contestants"].items():
        print(
            f"{name:34} {said['tokens_per_second']:8.1f} tokens/s {said['speedup']:8.2f}  "
            f"{said['acceptance_length'] or 0:8.2f} {said['ms_per_step'] or 0:7.2f} ms/step "
            f"{said['same_as_transformers']}/{said['prompts']}"
        )
    for name, parts in result["step_ms"].items():
        print(f"{name:34} " + ", ".join(f"{key} {ms:.3f} ms" for key, ms in parts.items()))
    for dtype, said in result["outputs"]["dtypes"].items():
        for name, one in said.items():
            if name == "tie_in_spacings":
                continue
            print(
                f"{dtype} {name:20} {one['acceptance_length']:.3f}, {sum(one['steps'])} steps, "
                f"{sum(one['accepted'])} accepted, {one['identical']} identical, "
                f"{one['ties']} of {len(one['differences'])} differences are ties"
            )
