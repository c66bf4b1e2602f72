"""A family that is defined in the tests works everywhere, without any change to the package."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import toy_family
from helpers import (
    HIDDEN,
    VOCABULARY,
    CommandLine,
    Tensors,
    config_of,
    save_quietly,
    stored_tensors,
    tiny_llama,
)
from speculators.convert import conversion
from speculators.convert.export import export
from speculators.errors import ConversionError, FormatError, ValidationError
from speculators.families import registry
from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.models import load_draft
from toy_family import TOY, ToySpeculator

DRAFTED, DEPTH = 40, 2


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of the registry."""
    converted, *others = registry.KNOWN
    monkeypatch.setattr(registry, "KNOWN", (converted, TOY, *others))


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(num_hidden_layers=3)
    return save_quietly(model, tmp_path_factory.mktemp("toy") / "verifier")


def toy_tensors(*, bias: bool = True) -> Tensors:
    random = torch.Generator().manual_seed(5)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) / 4

    ids = torch.randperm(VOCABULARY, generator=random)[:DRAFTED].sort().values
    tensors = {
        "projection.weight": weights(HIDDEN, 2 * HIDDEN),
        "in.weight": weights(HIDDEN, 2 * HIDDEN),
        "in.bias": weights(HIDDEN),
        **{f"layers.{number}.gain": weights(HIDDEN) for number in range(DEPTH)},
        "lm_head.weight": weights(DRAFTED, HIDDEN),
        "offsets": ids - torch.arange(DRAFTED),
        "step": weights(1),
    }
    if not bias:
        del tensors["in.bias"]
    return tensors


def write_toy(directory: Path, *, bias: bool = True) -> Path:
    directory.mkdir()
    save_file(toy_tensors(bias=bias), directory / "model.safetensors")
    config = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "depth": DEPTH}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "source")


@pytest.fixture
def converted(tmp_path: Path, source: Path, verifier: Path) -> Path:
    return conversion.convert(source, tmp_path / "converted", verifier, family=TOY)


def test_it_is_recognised(source: Path) -> None:
    finding = inspect_checkpoint(source)
    assert (finding.kind, finding.family) == ("toy", "toy")
    assert finding.title == "a toy draft with a bias on fc"
    assert finding.conversion.command == f"speculators convert toy {source} OUTPUT BASE_MODEL"
    becomes = {tensor.name: tensor.target or tensor.left_out for tensor in finding.tensors}
    assert becomes["in.weight"] == "fc.weight"
    assert becomes["step"] == "it counts training steps"


def test_another_family_refuses_it(source: Path, tmp_path: Path, verifier: Path) -> None:
    with pytest.raises(ConversionError, match=r"holds a toy draft .*: speculators convert toy"):
        conversion.convert(source, tmp_path / "out", verifier, family=registry.families()[-1])


def test_the_command_line_converts_it(
    tmp_path: Path, source: Path, verifier: Path, speculators: CommandLine
) -> None:
    assert "toy" in speculators("convert", "--help").stdout
    assert "--bias" in speculators("convert", "toy", "--help").stdout
    run = speculators("convert", "toy", source, tmp_path / "out", verifier, "--bias")
    assert (run.status, run.errors) == (0, [])
    assert run.messages[0] == f"Converting Toy checkpoint: {source}"
    assert speculators("inspect", tmp_path / "out").status == 0
    assert speculators("validate", tmp_path / "out", "--source", source).status == 0
    plain = write_toy(tmp_path / "plain", bias=False)
    refused = speculators("convert", "toy", plain, tmp_path / "none", verifier, "--bias")
    assert refused.status == 1
    assert "has no bias on fc" in refused.errors[0]


def test_its_tables_are_never_rounded(tmp_path: Path, source: Path, verifier: Path) -> None:
    out = conversion.convert(source, tmp_path / "out", verifier, family=TOY, dtype="bfloat16")
    stored, expected = stored_tensors(out), toy_tensors()
    assert torch.equal(stored["offsets"], expected["offsets"])
    assert torch.equal(stored["fc.weight"], expected["in.weight"].to(torch.bfloat16))
    assert "step" not in stored
    assert config_of(out)["torch_dtype"] == "bfloat16"


def test_a_wrong_computation_is_found(
    tmp_path: Path, source: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToySpeculator, "project", lambda self, states: -self.projection(states))
    with pytest.raises(ValidationError, match="not what the source's tensors compute"):
        conversion.convert(source, tmp_path / "out", verifier, family=TOY)


def test_a_layer_too_many_is_refused(tmp_path: Path, converted: Path) -> None:
    config = config_of(converted)
    config["transformer_layer_config"]["num_hidden_layers"] = DEPTH + 1
    (converted / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=rf"lacks layers\.{DEPTH}\.gain"):
        load_draft(converted)


def test_it_is_loaded_with_its_own_class(converted: Path) -> None:
    draft = load_draft(converted)
    assert isinstance(draft, ToySpeculator)
    assert torch.equal(draft.offsets, toy_tensors()["offsets"])


def test_it_is_exported_under_its_research_names(tmp_path: Path, converted: Path) -> None:
    out = export(converted, tmp_path / "out", "vllm")
    expected = {name: t for name, t in toy_tensors().items() if name != "step"}
    assert stored_tensors(out).keys() == expected.keys()
    assert config_of(out) == {"made_for": "vLLM"}
    with pytest.raises(ConversionError, match="can be exported to vllm, not to sglang"):
        export(converted, tmp_path / "other", "sglang")


def test_it_is_saved_as_it_was_converted(tmp_path: Path, converted: Path) -> None:
    load_draft(converted).save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(converted)
    saved, before = stored_tensors(tmp_path / "saved"), stored_tensors(converted)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "A toy draft for a LlamaForCausalLM, in" in card
    assert f"from {toy_family.__name__} import ToySpeculator" in card


@pytest.mark.parametrize("proposal", ["greedy", "dynamic_tree"])
def test_it_drafts(converted: Path, verifier: Path, proposal: str) -> None:
    draft = load_draft(converted, verifier=verifier)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    assert draft.verifier is not None
    expected = draft.verifier.generate(prompt, max_new_tokens=20, do_sample=False)  # type: ignore[operator]
    found = draft.generate(prompt, max_new_tokens=20, do_sample=False, proposal=proposal)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)
