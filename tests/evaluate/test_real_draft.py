"""The real drafts in examples/, converted and evaluated: their acceptance must not change."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import measure_drafts
from helpers import CommandLine
from plain_draft import plain_draft, plain_norm
from speculators.convert.conversion import convert
from speculators.decode import Generation
from speculators.evaluate import evaluation
from speculators.evaluate.defaults import LONGEST_DRAFT
from speculators.evaluate.metrics import count_steps
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.evaluate.recording.manifest import Recording, identify
from speculators.evaluate.recording.recorder import record
from speculators.evaluate.recording.scoring import Scoring, load_scored
from speculators.evaluate.report import Report, Settings
from speculators.evaluate.subject.loading import LoadedVerifier
from speculators.evaluate.subject.opening import open_draft
from speculators.format.config import ProposalMethod
from speculators.models.loading import load_draft

ROOT = Path(__file__).parents[2]
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
"""``make test`` creates this before the tests run."""

DRAFT_TOKENS = 3

OF_OTHER_FAMILIES = [
    name for name in ("eagle3", "dflash") if (ROOT / "examples" / f"smollm2-135m-{name}").is_dir()
]


def published_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint as published, read by torch or safetensors."""
    weights = directory / "pytorch_model.bin"
    if weights.exists():
        tensors: dict[str, Tensor] = torch.load(weights, weights_only=True)
        return tensors
    return load_file(directory / "model.safetensors")


@dataclass(frozen=True)
class Continuation:
    """The verifier's greedy tokens after a prompt, and its states at all of them."""

    tokens: list[int]
    states: Tensor


Continue = Callable[[list[int], int], Continuation]


@torch.inference_mode()
def plain_acceptance(
    verifier: Any,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    known: Continuation,
    prompt_tokens: int,
    new: int,
) -> list[int]:
    """The number of drafted tokens accepted in each step to ``new`` tokens, without any cache.

    It shares no code with the product: the published tensors are evaluated by ``plain_draft``. A
    drafted token is accepted if it is the verifier's own.
    """
    tensors = tensors | {"embed_tokens.weight": verifier.model.embed_tokens.weight}
    tensors = {name: tensor.double() for name, tensor in tensors.items()}  # once
    accepted, end = list[int](), prompt_tokens + 1
    while end < prompt_tokens + new:
        tokens, fed = known.tokens[:end], known.states[: end - 1].double()
        right = 0
        for _ in range(DRAFT_TOKENS):
            fed = torch.cat([fed, plain_draft(tensors, config, torch.tensor(tokens[1:]), fed)[-1:]])
            state = plain_norm(tensors, config, "lm_head_layernorm", fed[-1])
            tokens = [*tokens, best(verifier, state)]
            if tokens != known.tokens[: len(tokens)]:
                break
            right += 1
        accepted.append(right)
        end += right + 1
    return accepted


def best(verifier: Any, state: Tensor) -> int:
    head = verifier.lm_head.weight
    return int((head @ state.to(head.dtype)).argmax())


@pytest.fixture(scope="module")
def verifier() -> Any:
    return AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)


@pytest.fixture(scope="module")
def continued(verifier: Any) -> Continue:
    """Continues a prompt, for all drafts once: by the verifier's own ``generate``."""

    @cache
    @torch.inference_mode()
    def continuation(prompt: tuple[int, ...], new: int) -> Continuation:
        ids = torch.tensor([prompt])
        longer = {"max_new_tokens": new + DRAFT_TOKENS, "eos_token_id": None}
        tokens = verifier.generate(ids, do_sample=False, pad_token_id=0, **longer)
        states = verifier.model(tokens).last_hidden_state[0]
        # One pass over all of them finds the same tokens.
        after = [best(verifier, state) for state in states[len(prompt) - 1 : -1]]
        assert after == tokens[0, len(prompt) :].tolist()
        return Continuation(tokens[0].tolist(), states)

    return lambda prompt, new: continuation(tuple(prompt), new)


@pytest.mark.parametrize(
    ("name", "prompts", "compared", "tokens"),
    [
        ("layernorms", 1, 1, 16),
        *(
            pytest.param(name, 4, 2, 24, marks=pytest.mark.exhaustive)
            for name in ("eagle1", "hass", "layernorms")
        ),
    ],
)
def test_a_trained_draft_is_accepted_as_often_as_before_conversion(
    tmp_path: Path,
    speculators: CommandLine,
    verifier: Any,
    continued: Continue,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    prompts: int,
    compared: int,
    tokens: int,
) -> None:
    """The draft with most features, and one prompt, which is compared.

    Exhaustive: every trained one, and four longer prompts, of which two are compared.
    """
    monkeypatch.setattr(evaluation, "WARM_UP_TOKENS", 1)  # no time is measured here
    published = ROOT / "examples" / f"smollm2-135m-{name}"
    draft, report = tmp_path / "draft", tmp_path / "report"
    converting = ("convert", "eagle", published, draft, VERIFIER, "--no-validate")
    assert speculators(*converting).status == 0
    run = speculators(
        "evaluate", draft, f"--limit={prompts}", f"--max-new-tokens={tokens}",
        f"--num-draft-tokens={DRAFT_TOKENS}", "--output", report,
    )  # fmt: skip
    assert run.status == 0, run.stderr
    measured = Report.model_validate_json((report / "report.json").read_text())
    result = measured.results[0].overall
    assert result.identical == prompts
    assert result.acceptance_length is not None
    assert result.acceptance_length > 1.8  # 1 is a draft that never guesses right

    tensors = published_tensors(published)
    config = json.loads((published / "config.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(VERIFIER)
    asked = read_prompts(OWN_PROMPTS)[:compared]
    for prompt, found in zip(asked, measured.prompts[:compared], strict=True):
        ids = tokenizer.apply_chat_template(
            [message.model_dump() for message in prompt.messages],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        known = continued(ids, tokens)
        expected = plain_acceptance(verifier, tensors, config, known, len(ids), tokens)
        acceptance = found.speculative[0].acceptance
        assert acceptance is not None
        assert (acceptance.steps, sum(acceptance.accepted)) == (len(expected), sum(expected))


@pytest.mark.parametrize("name", OF_OTHER_FAMILIES)
def test_a_draft_is_accepted_as_often_as_by_its_training_code(
    tmp_path: Path, speculators: CommandLine, verifier: Any, name: str
) -> None:
    """``examples/measure_drafts.py`` drafts with the published tensors, without a cache."""
    published = ROOT / "examples" / f"smollm2-135m-{name}"
    draft, report = tmp_path / "draft", tmp_path / "report"
    converting = ("convert", name, published, draft, VERIFIER, "--no-validate")
    assert speculators(*converting).status == 0
    run = speculators(
        "evaluate", draft, "--limit=1", "--max-new-tokens=16", "--acceptance-only",
        f"--num-draft-tokens={DRAFT_TOKENS}", "--output", report,
    )  # fmt: skip
    assert run.status == 0, run.stderr
    measured = Report.model_validate_json((report / "report.json").read_text())
    acceptance = measured.prompts[0].speculative[0].acceptance
    assert acceptance is not None

    tokenizer: Any = AutoTokenizer.from_pretrained(VERIFIER)
    ids = tokenizer.apply_chat_template(
        [message.model_dump() for message in read_prompts(OWN_PROMPTS)[0].messages],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    accepted = measure_drafts.accepted_by_step(
        measure_drafts.load(published, verifier),
        verifier,
        ids,
        16,
        DRAFT_TOKENS,
        tokenizer.eos_token_id,
    )
    assert (acceptance.steps, sum(acceptance.accepted)) == (len(accepted), sum(accepted))
    assert sum(accepted) > len(accepted) / 2


RECURRENT = ("eagle1", "hass", "layernorms", "eagle3")
NAMES = (*RECURRENT, "dflash")
CHAINS = {
    "one token": ProposalMethod(speculative_tokens=1),
    "chain": ProposalMethod(speculative_tokens=4),
}
METHODS = CHAINS | {
    "static tree": ProposalMethod(proposal_type="static_tree"),
    "dynamic tree": ProposalMethod(proposal_type="dynamic_tree"),
}
OF_BLOCKS = CHAINS | {"whole block": ProposalMethod(speculative_tokens=7)}
SOME = {
    *zip(RECURRENT, ("static tree", "one token", "dynamic tree", "chain"), strict=True),
    ("dflash", "chain"),
    ("dflash", "whole block"),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    return {
        name: convert(
            ROOT / "examples" / f"smollm2-135m-{name}", root / name, VERIFIER, validate=False
        )
        for name in NAMES
    }


@pytest.fixture(
    scope="module", params=[(2, 16), pytest.param((8, 48), marks=pytest.mark.exhaustive)]
)
def recording(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    converted: dict[str, Path],
    verifier: Any,
) -> Recording:
    """Two short texts; exhaustive: more of them, and longer."""
    number, tokens = request.param
    tokenizer: Any = AutoTokenizer.from_pretrained(VERIFIER)
    opened = [open_draft(path) for path in converted.values()]
    layers = {layer for it in opened for layer in it.converted.config.verifier_layers}
    return record(
        LoadedVerifier(str(VERIFIER), verifier, tokenizer),
        identify(opened[0].verifier),
        read_prompts(OWN_PROMPTS)[:number],
        Settings(prompts_total=number, max_new_tokens=tokens),
        tmp_path_factory.mktemp("recorded") / "recording",
        layers=sorted(layers),
        longest_draft=LONGEST_DRAFT,
    )


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(
            name,
            (METHODS | OF_BLOCKS)[method],
            id=f"{name}-{method}",
            marks=() if (name, method) in SOME else pytest.mark.exhaustive,
        )
        for name, method in (
            *itertools.product(RECURRENT, METHODS),
            *itertools.product(("dflash",), OF_BLOCKS),
        )
    ],
)
def test_a_score_is_what_decoding_counts(
    converted: dict[str, Path],
    recording: Recording,
    verifier: Any,
    name: str,
    method: ProposalMethod,
) -> None:
    """Each draft with a method, and each method with a draft; exhaustive: each with all.

    ``test_drafting`` has more of them, with tiny models.
    """
    opened = open_draft(converted[name])
    scoring = Scoring(opened, load_scored(opened, recording, "cpu"), recording, [method])
    scored = [[run.acceptance for run in prompt.speculative] for prompt in scoring.run()]
    settings = recording.manifest.settings
    assert len(scored) == settings.prompts_total

    draft = load_draft(converted[name], verifier=verifier, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(VERIFIER, padding_side="left")
    together = tokenizer.apply_chat_template(
        [
            [message.model_dump() for message in prompt.messages]
            for prompt in read_prompts(OWN_PROMPTS)[: len(scored)]
        ],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    generation = draft.generate(
        **together,
        proposal=method,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert isinstance(generation, Generation)
    expected = map(count_steps, generation.accepted, generation.offered)
    assert scored == [[counts] for counts in expected]
