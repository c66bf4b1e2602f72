"""`speculators evaluate` of an MTP, whose verifier has linear attention."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

from helpers import VOCABULARY, CommandLine, Tensors, config_of, save_quietly
from mtp_verifiers import GOLDEN_MTP, write_verifier
from speculators.evaluate.report import Report
from speculators.models.mtp import QwenMtp
from speculators.mtp.cut import cut
from speculators.mtp.graft import graft

QUESTION = "Rain in Spain?"
PROMPT = {"question_id": 1, "category": "writing", "turns": [QUESTION]}
DRAFTED, NEW_TOKENS = 2, 10


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, without a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({it: number for number, it in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-Next of two linear layers and one of attention, with the golden MTP."""
    root = tmp_path_factory.mktemp("qwen3-next")
    said = {k: v for k, v in config_of(GOLDEN_MTP).items() if k not in {"model_type"}}
    said |= {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**said))
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # the next token depends almost only on the last one
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "out_proj" in name or "down_proj" in name:
                parameter.mul_(0.02)
    save_quietly(model, root / "lost")
    tiny_tokenizer().save_pretrained(root / "lost")
    mtp = cut(GOLDEN_MTP, root / "mtp")
    (mtp / "config.json").write_text(json.dumps(config_of(mtp) | {"vocab_size": VOCABULARY}))
    save_file(often_right(load_file(mtp / "model.safetensors")), mtp / "model.safetensors")
    return graft(root / "lost", mtp, root / "verifier")


def often_right(tensors: Tensors) -> Tensors:
    """Pass the embedding on almost unchanged, as the verifier does."""
    hidden = len(tensors["mtp.fc.weight"])
    tensors["mtp.fc.weight"] = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), 1)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.02
        if name in {"mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight"}:
            tensors[name].zero_()
    return tensors


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text(json.dumps(PROMPT) + "\n")
    return tmp_path / "prompts.jsonl"


def arguments(*which: str | Path, prompts: Path) -> list[str | Path]:
    sizes = ["--max-new-tokens", str(NEW_TOKENS), "--num-draft-tokens", str(DRAFTED)]
    return ["evaluate", *which, "--prompts", prompts, *sizes]


@torch.no_grad()
def accepted_by_definition(directory: Path, tokens: list[int], start: int) -> list[int]:
    """What a greedy chain gets right along these tokens: every step from the whole prefix."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    draft = QwenMtp.load(directory, verifier=model)
    ids = torch.tensor([tokens])
    states = model.model(ids).last_hidden_state
    accepted, last = [], start
    while last < len(tokens) - 1:
        drafted, inputs = list[int](), states[:, :last]
        for _ in range(DRAFTED):
            following = torch.tensor([tokens[1 : last + 1] + drafted])
            output = draft.draft(following, inputs).last_hidden_state
            assert output is not None
            drafted.append(int(draft.logits(output[:, -1]).argmax()))
            inputs = torch.cat((inputs, output[:, -1:]), 1)
        count = 0
        while count < DRAFTED and tokens[last + 1 :][count : count + 1] == [drafted[count]]:
            count += 1
        accepted.append(count)
        last += count + 1
    return accepted


def test_it_is_decoded_and_compared(
    verifier: Path, prompts: Path, tmp_path: Path, speculators: CommandLine
) -> None:
    run = speculators(*arguments(verifier, prompts=prompts), "--output", tmp_path / "report")
    assert run.status == 0, run.stderr
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    overall = report.results[0].overall
    assert overall.tokens_per_second is not None
    assert overall.identical == 1
    model: Any = AutoModelForCausalLM.from_pretrained(verifier)
    ids = tiny_tokenizer()(QUESTION, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    expected = accepted_by_definition(verifier, output[0].tolist(), ids.shape[1])
    assert sum(expected) > 0
    measured = report.prompts[0].speculative[0].acceptance
    assert measured is not None
    assert measured.steps == len(expected)
    assert sum(measured.accepted) == sum(expected)


def test_a_cut_mtp_needs_its_verifier(
    verifier: Path, prompts: Path, tmp_path: Path, speculators: CommandLine
) -> None:
    mtp = cut(verifier, tmp_path / "mtp")
    run = speculators(*arguments(mtp, prompts=prompts), "--acceptance-only")
    assert run.errors == [f"{mtp} is an MTP without its verifier; give that with --verifier."]
    run = speculators(*arguments(mtp, "--verifier", verifier, prompts=prompts), "--acceptance-only")
    assert run.status == 0, run.stderr


def test_a_verifier_that_is_not_complete_is_not_made_up(
    verifier: Path, prompts: Path, tmp_path: Path, speculators: CommandLine
) -> None:
    """transformers gives random weights to what it does not find, and only warns."""
    mtp = cut(verifier, tmp_path / "mtp")
    tiny_tokenizer().save_pretrained(mtp)
    run = speculators(*arguments(mtp, "--verifier", mtp, prompts=prompts))
    assert run.status == 1
    assert re.fullmatch(
        rf"The verifier {mtp} lacks .*embed_tokens\.weight.* and \d+ more; give a complete "
        r"checkpoint of the language model\.",
        run.errors[-1],
    )


def test_what_cannot_be_measured_is_told_before_a_verifier_is_loaded(
    verifier: Path,
    prompts: Path,
    tmp_path: Path,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("speculators.evaluate.subject.loading.load_subject")
    run = speculators(*arguments(verifier, prompts=prompts), "--proposal", "static_tree")
    assert run.status == 1
    assert "cannot verify 'static_tree'; choose greedy or sampling" in run.errors[0]
    other = write_verifier(tmp_path / "deepseek", "deepseek_v3")
    run = speculators(*arguments(other, prompts=prompts))
    (error,) = run.errors
    assert error == (
        f"{other} has the MTP of DeepSeek's type, which cannot be run here, since it is for "
        "deepseek_v3: only those of qwen3_next, qwen3_5, qwen3_5_moe with one layer that is not "
        "quantized can; where vLLM serves it, `speculators evaluate` measures it with --server."
    )
