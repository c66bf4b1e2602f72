"""Correctness on the GPU: golden vectors, acceptance, losslessness."""

import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
)
from transformers.utils import logging as transformers_logging

from on_gpu.bench import Bench, OutOfTimeError, free, generate, speculate
from speculators.convert.eagle import EagleConverter
from speculators.decode.cache import BlockCache
from speculators.decode.proposals import drafter_of
from speculators.decode.sampling import warp_of
from speculators.format.config import ProposalMethod
from speculators.models.eagle import EagleSpeculator

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_TOLERANCE = 1e-4
"""The largest absolute difference allowed in float32, the same as in the tests on the CPU."""
GOLDEN_TREE = ProposalMethod(
    proposal_type="dynamic_tree", speculative_tokens=25, tree_depth=5, tree_top_k=4
)
"""``total_tokens=26, depth=5, top_k=4`` in the reference, which counts the root."""

CPU_ACCEPTANCE = ROOT / "benchmarks" / "results" / "gpu-cpu-acceptance.json"
CHAIN = ProposalMethod(speculative_tokens=3)
ACCEPTANCE_PROMPTS, ACCEPTANCE_TOKENS, ACCEPTANCE_TOLERANCE = 32, 64, 0.05

LOSSLESS_PROMPTS, LOSSLESS_TOKENS = 80, 128
TIE = 2
"""Two logits are a tie if their gap in float32 is at most this many times the rounding: both
outputs were computed in bfloat16. The rounding is measured: it is the 99th percentile over all
positions of the change, from float32 to bfloat16, in the gap between the best and the second token,
in spacings of bfloat16 at the size of the larger logit."""


def correctness(bench: Bench, result: dict[str, Any], until: float) -> None:
    """Measure all three, while plain generations run in processes of their own."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with plain_generations(bench) as plain:
        for name, part in (("golden", golden), ("acceptance", acceptances)):
            try:
                result[name] = part(bench)
            except Exception as error:
                result[name] = {"error": f"{type(error).__name__}: {error}"}
                print(f"{name}: {result[name]['error']}", flush=True)
            free(bench.device)
            bench.save()
        result["losslessness"] = losslessness(bench, plain, until)
    show(result)


# Golden vectors


def golden(bench: Bench) -> dict[str, Any]:
    """By checkpoint, how far float32 outputs are from the reference, and whether trees agree."""
    found = {}
    for source in sorted(path for path in GOLDEN.iterdir() if path.is_dir()):
        vectors = {
            name: tensor.to(bench.device)
            for name, tensor in load_file(source / "golden.safetensors").items()
        }
        with TemporaryDirectory() as folder:
            draft = golden_draft(source, vectors["lm_head.weight"], Path(folder))
        draft.to(bench.device)  # type: ignore[arg-type]
        differences = dict(compared(draft, vectors))
        found[source.name] = {
            "differences": differences,
            "within": max(one["absolute"] for one in differences.values()) <= GOLDEN_TOLERANCE,
            "same_tree": same_tree(draft, vectors) if "tree_mask" in vectors else None,
        }
    return {"tolerance": GOLDEN_TOLERANCE, "checkpoints": found}


def golden_draft(source: Path, head: Tensor, work: Path) -> EagleSpeculator:
    """A golden checkpoint, converted, with its head attached as that of a verifier."""
    vocabulary, hidden = head.shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    verifier = LlamaForCausalLM(config).to(head.device)  # type: ignore[arg-type]
    verifier.lm_head.weight.data.copy_(head)
    verifier.save_pretrained(work / "verifier")
    converted = EagleConverter().convert(source, work / "draft", work / "verifier", validate=False)
    draft = EagleSpeculator.from_pretrained(converted, verifier=verifier, dtype=torch.float32)
    nn.Module.eval(draft)
    return draft


@torch.inference_mode()
def compared(
    draft: EagleSpeculator, vectors: dict[str, Tensor]
) -> Iterator[tuple[str, dict[str, float]]]:
    """The largest differences from the reference: absolute, and relative to its largest value."""
    for prefix in ("", "long_"):
        if f"{prefix}input_ids" not in vectors:
            continue
        output: Any = draft(vectors[f"{prefix}input_ids"], vectors[f"{prefix}hidden_states"])
        outputs = {"output_hidden": output.last_hidden_state, "logits": output.logits}
        for name, given in outputs.items():
            if (expected := vectors.get(f"{prefix}{name}")) is not None:
                absolute = float((given - expected).abs().max())
                relative = absolute / float(expected.abs().max())
                yield f"{prefix}{name}", {"absolute": absolute, "relative": relative}


@torch.inference_mode()
def same_tree(draft: EagleSpeculator, vectors: dict[str, Tensor]) -> bool:
    """Whether the dynamic tree is the reference's."""
    tokens, states = vectors["tree_input_ids"][:, 1:], vectors["tree_hidden_states"]
    drafter = drafter_of(draft, BlockCache([0]), GOLDEN_TREE, warp_of(LogitsProcessorList()))
    tree = drafter.propose(tokens, states, [tokens.shape[1]])
    return (
        torch.equal(tree.tokens, vectors["tree_draft_tokens"])
        and torch.equal(tree.depths[0], vectors["tree_position_ids"])
        and torch.equal(tree.ancestors[None].float(), vectors["tree_mask"].float())
    )


# Acceptance


def acceptance(bench: Bench, result: dict[str, Any], until: float) -> None:
    """Measure acceptance lengths in float32; this part runs on a CPU too."""
    result |= acceptance_settings(bench) | {"drafts": {}}
    verifier = bench.load_verifier(torch.float32)
    for name in bench.drafts:
        result["drafts"][name] = acceptance_of(bench, name, verifier, result)
        print(f"{name}: {result['drafts'][name]['acceptance_length']:.3f}", flush=True)
        bench.save()
        if time.perf_counter() > until:
            break


def acceptance_settings(bench: Bench) -> dict[str, Any]:
    """The number of prompts, and of new tokens for each."""
    return {
        "prompts": bench.options.prompts or ACCEPTANCE_PROMPTS,
        "max_new_tokens": bench.options.max_new_tokens or ACCEPTANCE_TOKENS,
    }


def acceptance_of(
    bench: Bench, name: str, verifier: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """Steps and accepted tokens of a chain of three, over all prompts."""
    draft = bench.load_draft(name, verifier)
    outputs = [
        speculate(draft, ids, settings["max_new_tokens"], CHAIN)
        for _, ids in bench.encoded(settings["prompts"])
    ]
    steps = [output.steps for output in outputs]
    accepted = [output.accepted for output in outputs]
    return {
        "acceptance_length": 1 + sum(accepted) / sum(steps),
        "steps": steps,
        "accepted": accepted,
    }


def acceptances(bench: Bench) -> dict[str, Any]:
    """Compare bfloat16 and float32 here with float32 on a CPU, if that was measured.

    The prompts and numbers of tokens are then the same as on the CPU.
    """
    measured: dict[str, Any] = {}
    if CPU_ACCEPTANCE.exists():
        measured = json.loads(CPU_ACCEPTANCE.read_text(encoding="utf-8")).get("acceptance", {})
    settings = acceptance_settings(bench) | {
        key: measured[key] for key in ("prompts", "max_new_tokens") if key in measured
    }
    lengths: dict[str, dict[str, Any]] = {name: {} for name in bench.drafts}
    for dtype in (torch.float32, torch.bfloat16):
        verifier = bench.load_verifier(dtype)
        for name in bench.drafts:
            given = acceptance_of(bench, name, verifier, settings)
            lengths[name][str(dtype).removeprefix("torch.")] = given["acceptance_length"]
            print(f"{name} {dtype}: {given['acceptance_length']:.3f}", flush=True)
    for name, said in lengths.items():
        cpu = measured.get("drafts", {}).get(name)
        if cpu is not None:
            said["cpu"] = cpu["acceptance_length"]
            said["difference"] = abs(said["bfloat16"] - said["cpu"])
            said["within"] = said["difference"] <= ACCEPTANCE_TOLERANCE
    return settings | {"tolerance": ACCEPTANCE_TOLERANCE, "drafts": lengths}


# Losslessness


@dataclass
class Plain:
    """The verifier's own generations, as they are completed.

    Attributes:
        prompts: with their tokens.
        outputs: an iterator over the index of a prompt and the tokens generated for it.
        max_new_tokens: for each.

    """

    prompts: list[tuple[Any, Tensor]]
    outputs: Any
    max_new_tokens: int


WORKER: dict[str, Any] = {}
"""The state of a worker process: the verifier and the number of new tokens."""


def start_worker(verifier: Path, dtype: torch.dtype, device: str, max_new_tokens: int) -> None:
    """Load the verifier into this process."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(verifier, dtype=dtype)
    WORKER["verifier"] = model.to(device).eval()
    WORKER["max_new_tokens"] = max_new_tokens


def generate_plainly(numbered: tuple[int, list[int]]) -> tuple[int, list[int]]:
    """Generate for one prompt in a worker."""
    number, tokens = numbered
    verifier = WORKER["verifier"]
    ids = torch.tensor([tokens], device=verifier.device)
    return number, generate(verifier, ids, WORKER["max_new_tokens"]).tokens


@contextmanager
def plain_generations(bench: Bench) -> Iterator[Plain]:
    """Start generating with transformers, one prompt at a time in each of several processes.

    Several processes can share the GPU, since the host takes much longer per token than the GPU.
    """
    prompts = bench.encoded(min(bench.options.prompts or LOSSLESS_PROMPTS, LOSSLESS_PROMPTS))
    length = bench.options.max_new_tokens or LOSSLESS_TOKENS
    settings = (bench.verifier, bench.dtype, str(bench.device), length)
    context = multiprocessing.get_context("spawn")
    with context.Pool(bench.options.workers, start_worker, settings) as pool:
        numbered = [(number, ids[0].tolist()) for number, (_, ids) in enumerate(prompts)]
        yield Plain(prompts, pool.imap_unordered(generate_plainly, numbered), length)


def losslessness(bench: Bench, plain: Plain, until: float) -> dict[str, Any]:
    """Compare with our outputs, and examine the first difference of each."""
    verifier = bench.load_verifier(bench.dtype)
    name = next(iter(bench.drafts))
    draft = bench.load_draft(name, verifier)
    ours = [speculate(draft, ids, plain.max_new_tokens, CHAIN).tokens for _, ids in plain.prompts]
    print(f"ours done, {until - time.perf_counter():.0f} s left for the plain ones", flush=True)
    theirs: dict[int, list[int]] = {}
    try:
        for _ in plain.prompts:
            number, tokens = plain.outputs.next(max(1.0, until - time.perf_counter()))
            theirs[number] = tokens
    except multiprocessing.TimeoutError:
        print(f"the time is over with {len(theirs)} prompts", flush=True)
    if not theirs:
        raise OutOfTimeError("The time was over before the first plain generation.")

    exact = bench.load_verifier(torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(bench.verifier)
    differences, changes = [], []
    for number, tokens in sorted(theirs.items()):
        prompt, ids = plain.prompts[number]
        logits, rounded = logits_at(exact, ids, tokens), logits_at(verifier, ids, tokens)
        changes.append(change_of_lead(logits, rounded))
        at = first_difference(tokens, ours[number])
        if at is not None:
            pair = [one[at] if at < len(one) else None for one in (tokens, ours[number])]
            differences.append(
                {"prompt": prompt.id, "position": at, "plain": pair[0], "ours": pair[1]}
                | {"texts": [None if it is None else tokenizer.decode([it]) for it in pair]}
                | gap(logits[at], rounded[at], pair)
            )
    change = torch.cat(changes).double()
    rounding = float(change.quantile(0.99))
    for one in differences:
        # There is no gap where one output ends and the other continues.
        one["tie"] = one.get("gap_in_spacings", math.inf) <= TIE * rounding
    return {
        "draft": name,
        "proposal": CHAIN.model_dump(exclude_none=True),
        "max_new_tokens": plain.max_new_tokens,
        "prompts": len(theirs),
        "asked": len(plain.prompts),
        "new_tokens": sum(map(len, theirs.values())),
        "identical": len(theirs) - len(differences),
        "tie_in_spacings": TIE * rounding,
        "ties": sum(bool(one["tie"]) for one in differences),
        "differences": differences,
        "rounding": {
            "positions": len(change),
            "median": float(change.quantile(0.5)),
            "99 %": rounding,
            "largest": float(change.max()),
        },
    }


@torch.inference_mode()
def logits_at(verifier: Any, ids: Tensor, tokens: list[int]) -> Tensor:
    """The logits, (tokens, vocabulary) in float32, that predict each of the tokens of an output."""
    whole = torch.cat((ids, torch.tensor([tokens], device=ids.device)), 1)
    logits: Tensor = verifier(whole[:, :-1], logits_to_keep=len(tokens)).logits[0]
    return logits.float()


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Where two outputs first differ, if they do."""
    pairs = enumerate(zip_longest(one, other))
    return next((at for at, (mine, yours) in pairs if mine != yours), None)


def change_of_lead(exact: Tensor, rounded: Tensor) -> Tensor:
    """How bfloat16 changes the gap between the best and the second token, in its spacings."""
    best = exact.topk(2)
    leads = [logits.gather(1, best.indices) for logits in (exact, rounded)]
    change = leads[0].diff(dim=1)[:, 0] - leads[1].diff(dim=1)[:, 0]
    sizes = best.values[:, 0].abs().log2().floor()
    return (change.abs() / 2 ** (sizes - 7)).cpu()


def gap(exact: Tensor, rounded: Tensor, pair: list[int | None]) -> dict[str, Any]:
    """How close two tokens were, by logits in float32 and in bfloat16, (vocabulary).

    The result is empty where one output ends and the other continues.
    """
    if None in pair:
        return {}
    one, other = (float(exact[token]) for token in pair)
    apart, spacing = abs(one - other), bfloat16_spacing(max(abs(one), abs(other)))
    return {
        "logits": [one, other],
        "gap": apart,
        "spacing": spacing,
        "gap_in_spacings": apart / spacing,
        "gap_in_bfloat16": abs(float(rounded[pair[0]] - rounded[pair[1]])),
        "best_two": sorted(exact.topk(2).indices.tolist()) == sorted(map(int, pair)),  # type: ignore[arg-type]
    }


def bfloat16_spacing(value: float) -> float:
    """The distance between bfloat16 numbers near a value: they have eight significant bits."""
    return math.ldexp(1.0, math.frexp(value)[1] - 8)


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    for name, said in result["golden"].get("checkpoints", {}).items():
        worst = max(one["absolute"] for one in said["differences"].values())
        print(
            f"{name:22} {worst:.1e} {'ok' if said['within'] else 'FAR'}, tree {said['same_tree']}"
        )
    for name, said in result["acceptance"].get("drafts", {}).items():
        told = ", ".join(f"{key} {said[key]:.3f}" for key in said if key != "within")
        print(f"{name:22} {told}")
    said = result["losslessness"]
    rounding = ", ".join(f"{key} {value:.2f}" for key, value in said["rounding"].items())
    print(
        f"{said['identical']} of {said['prompts']} outputs identical, {said['ties']} of "
        f"{len(said['differences'])} differences are ties; rounding in spacings: {rounding}"
    )
    for one in said["differences"]:
        print(
            f"  prompt {one['prompt']}, position {one['position']}, {one['texts']}: "
            f"{one.get('gap_in_spacings', math.inf):.2f} spacings"
        )
