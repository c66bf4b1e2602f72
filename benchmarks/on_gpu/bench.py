"""What the parts share: models, prompts, timing, and a description of the machine."""

import argparse
import datetime
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from machine import cpu_name
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama import modeling_llama

from speculators.convert.conversion import convert
from speculators.decode import Generation
from speculators.evaluate.prompts import OWN_PROMPTS, Prompt, read_prompts
from speculators.format.config import ProposalMethod
from speculators.models import load_draft
from speculators.models.speculator import Speculator

T = TypeVar("T")

CHAINS = tuple(ProposalMethod(speculative_tokens=tokens) for tokens in range(1, 9))
TREES = tuple(ProposalMethod(proposal_type=name) for name in ("static_tree", "dynamic_tree"))


class OutOfTimeError(Exception):
    """A part does not have enough time left to measure anything."""


@dataclass(frozen=True)
class Bench:
    """The input of every part.

    Attributes:
        options: of the command line.
        device: where everything runs.
        verifier: a transformers directory.
        drafts: the converted drafts, by name.
        save: writes the results so far.

    """

    options: argparse.Namespace
    device: torch.device
    verifier: Path
    drafts: Mapping[str, Path]
    save: Callable[[], None]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that speed is measured in."""
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        return dtype

    def load_verifier(self, dtype: torch.dtype) -> Any:
        """The verifier on the device; ``Any``, since ``generate`` has no usable types."""
        verifier: Any = AutoModelForCausalLM.from_pretrained(self.verifier, dtype=dtype)
        return verifier.to(self.device).eval()

    def load_draft(self, name: str, verifier: PreTrainedModel) -> Speculator:
        """A draft in the verifier's dtype, with the verifier attached."""
        draft = load_draft(self.drafts[name], verifier=verifier, dtype=verifier.dtype)
        draft.to(self.device)  # type: ignore[arg-type]
        nn.Module.eval(draft)
        return draft

    def encoded(self, count: int) -> list[tuple[Prompt, Tensor]]:
        """The first prompts, whose categories rotate, with their tokens, (1, length)."""
        tokenizer: Any = AutoTokenizer.from_pretrained(self.verifier)

        def tokens_of(prompt: Prompt) -> Tensor:
            encoded = tokenizer.apply_chat_template(
                [message.model_dump() for message in prompt.messages],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
            ids: Tensor = encoded["input_ids"].to(self.device)
            return ids

        return [(prompt, tokens_of(prompt)) for prompt in read_prompts(OWN_PROMPTS)[:count]]


def prepare_verifier(options: argparse.Namespace, work: Path) -> Path:
    """The verifier as a transformers directory; weights from a GGUF file are dequantized.

    The converter, the workers and the tokenizer all read such a directory.
    """
    if options.gguf is None:
        return Path(options.verifier)
    where = {"pretrained_model_name_or_path": options.verifier, "gguf_file": options.gguf}
    dequantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers counts a model from a GGUF file as quantized, so a plain copy is saved instead.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where))
    model.load_state_dict(dequantized.state_dict())
    directory = work / Path(options.gguf).stem
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(options.tokenizer or options.verifier).save_pretrained(directory)
    return directory


def convert_drafts(drafts: list[Path], verifier: Path, work: Path) -> dict[str, Path]:
    """Convert published drafts; each is named by the last word of its folder's name."""
    converted = {}
    for source in drafts:
        name = source.name.rpartition("-")[2]
        converted[name] = convert(source, work / name, verifier, validate=False)
    return converted


# Generating


@dataclass(frozen=True)
class Output:
    """The outcome of one generation.

    Attributes:
        tokens: the new tokens.
        steps: verifier passes, without the prefill.
        accepted: drafted tokens that were accepted in them.
        tried: drafted tokens that the verifier decided on: the accepted ones, and in each step the
            first rejected one, if there was one.

    """

    tokens: list[int]
    steps: int
    accepted: int
    tried: int


def speculate(
    draft: Speculator,
    ids: Tensor,
    max_new_tokens: int,
    proposal: ProposalMethod,
    *,
    cuda_graphs: bool = True,
    **settings: Any,
) -> Output:
    """Generate greedily with a draft."""
    result = draft.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        proposal=proposal,
        cuda_graphs=cuda_graphs,
        return_dict_in_generate=True,
        **settings,
    )
    assert isinstance(result, Generation)
    accepted, offered = result.accepted[0], result.offered[0]
    return Output(
        tokens=result.sequences[0, ids.shape[1] :].tolist(),
        steps=len(accepted),
        accepted=sum(accepted),
        tried=sum(n + (n < most) for n, most in zip(accepted, offered, strict=True)),
    )


def generate(verifier: Any, ids: Tensor, max_new_tokens: int, **settings: Any) -> Output:
    """Generate greedily with transformers, one token per step."""
    sequences = verifier.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **settings,
    )
    tokens = sequences[0, ids.shape[1] :].tolist()
    return Output(tokens, steps=len(tokens) - 1, accepted=0, tried=0)


def look_up(verifier: Any, ids: Tensor, max_new_tokens: int, tokens: int) -> Output:
    """Generate with transformers' prompt lookup.

    It does not report its passes, so a hook counts them; how many tokens were tried is unknown.
    """
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = verifier.register_forward_pre_hook(count)
    try:
        output = generate(verifier, ids, max_new_tokens, prompt_lookup_num_tokens=tokens)
    finally:
        hook.remove()
    return replace(output, steps=passes - 1, accepted=output.steps - (passes - 1))


def recorded_alone(draft: Speculator, ids: Tensor, proposal: ProposalMethod) -> Any:
    """The graphs of a step with this proposal, recorded anew; ``None`` if there are none."""
    draft._workspace.clear()
    speculate(draft, ids, 4, proposal, eos_token_id=None)
    return newest_recording(draft)


def newest_recording(draft: Speculator) -> Any:
    """The most recently used graphs; ``None`` if there are none."""
    return next(reversed(draft._workspace.recordings.values()), None)


def compile_small(*models: nn.Module) -> None:
    """Compile the norms and MLPs of Llama models in place.

    They account for half of a pass's kernels. Nothing in them depends on a cache, so all layers
    share the compiled code, and compiling takes seconds. What is compiled is not fused any more.
    """
    for model in models:
        for module in model.modules():
            if isinstance(module, modeling_llama.LlamaRMSNorm | modeling_llama.LlamaMLP):
                module.compile()


def part_ms(recording: Any, device: torch.device) -> dict[str, float]:
    """GPU time of a step's graphs in milliseconds."""
    graphs = {
        "draft": recording.proposing,
        "verify": recording.verifying,
        "gather": recording.gathering,
    }
    return {
        name: 0.0 if graph is None else device_ms(graph.replay, device)
        for name, graph in graphs.items()
    }


def named(proposal: ProposalMethod) -> str:
    """A name for a proposal: ``greedy:3``, ``dynamic_tree``."""
    kind = proposal.proposal_type
    return f"{kind}:{proposal.speculative_tokens}" if kind == "greedy" else kind


# Timing


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """A call's result, and the seconds until the device has finished all of it."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def device_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call on the device: the median of three runs of about 50 ms of calls."""
    for _ in range(2):
        call()
    _, seconds = timed(call, device)
    calls = max(2, min(20, round(0.05 / seconds)))
    return median(_in_a_row(call, device, calls) / calls for _ in range(3))


def _in_a_row(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        return 1000 * timed(lambda: [call() for _ in range(calls)], device)[1]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(names: list[str], turn: int) -> Iterator[str]:
    """All names, rotated by one with each turn."""
    first = turn % len(names)
    yield from (*names[first:], *names[:first])


def free(device: torch.device) -> None:
    """Release unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy on the device reads plus writes."""
    nbytes = (2 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    seconds: float = device_ms(lambda: to.copy_(source), device) / 1000
    return 2 * nbytes / seconds


# The machine


def conditions(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The machine, the software, and the settings of the measurement."""
    told: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "copy_bandwidth": copy_bandwidth(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "speculators")},
        "settings": {
            name: value.name
            if isinstance(value, Path)
            else [one.name for one in value]
            if name == "draft"
            else value
            for name, value in vars(options).items()
            if name not in {"render", "parts"}
        },
    }
    free(device)
    return told


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip()
