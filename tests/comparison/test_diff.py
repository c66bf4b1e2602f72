"""`speculators diff`: whether a draft in one layout is the same as in another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash import (
    HIDDEN,
    Edit,
    deepspec,
    native,
    sliding,
    upstream,
    with_markov,
    write_draft,
)
from dflash import converted as dflash_converted
from eagle3 import CHAINS, GOLDEN3, PARALLEL, convert_golden3
from helpers import (
    GOLDEN,
    PLAIN,
    CommandLine,
    Run,
    config_of,
    source_tensors,
    write_checkpoint,
)
from hub_server import HubServer, patch_hub
from schemas import PRINTED
from speculators.comparison.computation import compute
from speculators.comparison.difference import Difference, compare
from speculators.comparison.side import open_sides
from speculators.convert.eagle import EagleConverter
from speculators.convert.export import export
from speculators.families.registry import family_named

NORMS = "ttt_layernorms"


def difference(one: Path, other: Path) -> Difference:
    return compare(*open_sides((one, other)))


def results(found: Difference) -> dict[str, str]:
    """The tensors that are not the same."""
    return {it.name: it.result for it in found.tensors if it.result != "same"}


def printed(run: Run) -> dict[str, Any]:
    PRINTED["diff"].model_validate_json(run.stdout)
    result: dict[str, Any] = json.loads(run.stdout)
    assert result["ok"] == (run.status == 0)
    return result


def edited(directory: Path, output: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(directory, output)
    tensors = load_file(output / "model.safetensors")
    edit(tensors)
    save_file(tensors, output / "model.safetensors")
    return output


# The same draft


@pytest.mark.parametrize("name", [PLAIN, NORMS, "qwen2_qkv_bias", "rope_linear"])
def test_a_trained_draft_and_its_conversion(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine, name: str
) -> None:
    """Also where the tensors have other names, and from a pickle."""
    source = write_checkpoint(tmp_path / "source", name=name, container="pytorch_model.bin")
    run = speculators("diff", source, converted[name])
    assert run.status == 0
    assert run.stdout.splitlines()[-1] == "They are the same draft."
    assert speculators("diff", converted[name], source, "--compute").status == 0


@pytest.mark.parametrize("name", [CHAINS[0], "modelopt_4aux", "target_hidden_48", PARALLEL])
def test_layouts_of_eagle3(tmp_path: Path, eagle3_drafts: dict[str, Path], name: str) -> None:
    """What a layout leaves open is read as the other side has it."""
    draft = eagle3_drafts[name]
    assert difference(GOLDEN3 / name, draft).same
    family = family_named("eagle3")
    assert family is not None
    exported = 0
    for target in family.targets:
        try:
            output = export(draft, tmp_path / target, target)
        except ValueError:
            continue  # a feature that it cannot express
        exported += 1
        found = difference(draft, output)
        assert (found.same, results(found)) == (True, {}), target
    assert exported > 0


def test_an_export_is_the_same(tmp_path: Path, converted: dict[str, Path]) -> None:
    export(converted[NORMS], tmp_path / "out", "eagle")
    assert difference(converted[NORMS], tmp_path / "out").same
    assert difference(GOLDEN / NORMS, tmp_path / "out").same


def test_other_metadata_is_no_other_draft(tmp_path: Path, converted: dict[str, Path]) -> None:
    """Who wrote a config, and how to speculate, are no part of the draft."""
    other = shutil.copytree(converted[PLAIN], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["speculators_version"] = "0.1.0"
    config["speculators_config"]["verifier"]["name_or_path"] = "org/verifier"
    config["transformer_layer_config"]["eos_token_id"] = 7
    (other / "config.json").write_text(json.dumps(config))
    found = difference(converted[PLAIN], other)
    assert found.same
    assert [(it.key, it.computed_with) for it in found.config] == [
        ("transformer_layer_config.eos_token_id", False)
    ]


def test_what_a_draft_does_not_compute_with(tmp_path: Path, eagle3_drafts: dict[str, Path]) -> None:
    """How it was trained, and how many layers its verifier has, which upstream does not write."""
    block = dflash_converted(write_draft(tmp_path / "source", native()), tmp_path / "out")
    for draft, key in (
        (eagle3_drafts[PARALLEL], "embed_requires_grad"),
        (block, "num_target_layers"),
    ):
        other = shutil.copytree(draft, tmp_path / key)
        config = config_of(other)
        del config[key]
        (other / "config.json").write_text(json.dumps(config))
        found = difference(draft, other)
        assert [(it.key, it.computed_with) for it in found.config] == [(key, False)]
        assert found.same


SLIDING: dict[str, Any] = {
    "layer_types": sliding(True, True, True),
    "sliding_window": 16,
    "use_sliding_window": True,
}

SAID_TWICE: dict[str, tuple[dict[str, Any], Edit, dict[str, Any], dict[str, Any]]] = {
    "no confidence head, and what it would take": (
        deepspec(enable_confidence_head=False, confidence_head_with_markov=None),
        with_markov(confidence=False),
        {"confidence_head_with_markov": True},
        {},
    ),
    "DFlash's layers that slide, and are causal": (
        native(**SLIDING),
        lambda tensors: None,
        {},
        {"is_causal": True},
    ),
    "DSpark's full layers, which never are": (
        deepspec(),
        with_markov(),
        {"sliding_window_non_causal": False},
        {},
    ),
    "DSpark's layers that slide, and are causal": (
        deepspec(**SLIDING),
        with_markov(),
        {},
        {"is_causal": True},
    ),
}
"""Config, changes of the tensors, and keys of the format, and of its layers, that add nothing."""


@pytest.mark.parametrize("case", SAID_TWICE)
def test_what_adds_nothing_is_no_difference(tmp_path: Path, case: str) -> None:
    """Upstream's directories have such keys, and exports of them are the same draft."""
    source, edit, keys, of_layers = SAID_TWICE[case]
    draft = dflash_converted(write_draft(tmp_path / "source", source, edit), tmp_path / "draft")
    other = shutil.copytree(draft, tmp_path / "other")
    config = config_of(other) | keys
    config["transformer_layer_config"] |= of_layers
    (other / "config.json").write_text(json.dumps(config))
    for two in (draft, export(other, tmp_path / "out", "vllm")):
        assert difference(other, two).config == []


def test_a_draft_on_the_hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted: dict[str, Path],
    speculators: CommandLine,
) -> None:
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        server.add_repo("org/draft", converted[PLAIN])
        run = speculators("diff", GOLDEN / PLAIN, "org/draft", "--json", "--quiet")
    assert run.status == 0
    assert printed(run)["difference"]["b"]["commit"] is not None


# Another draft


def test_one_changed_value(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["fc.weight"][3, 5] += 0.25

    other = edited(converted[PLAIN], tmp_path / "other", change)
    run = speculators("diff", GOLDEN / PLAIN, other, "--json", "--quiet")
    assert run.status == 1
    found = printed(run)["difference"]
    (tensor,) = [it for it in found["tensors"] if it["result"] != "same"]
    assert (tensor["name"], tensor["result"], tensor["differing"]) == (
        "fc.weight",
        "different",
        1,
    )
    assert tensor["largest_difference"] == pytest.approx(0.25)
    both = [source_tensors()["fc.weight"], load_file(other / "model.safetensors")["fc.weight"]]
    assert tensor["largest_value"] == pytest.approx(max(it.abs().max().item() for it in both))
    shown = speculators("diff", GOLDEN / PLAIN, other, "--compute").stdout
    assert "fc.weight  different  F32 (64, 128)  F32 (64, 128)  1 values, by up to 0.25" in shown
    assert "On random inputs they compute something else" in shown
    assert shown.splitlines()[-1] == "They are not the same draft."


def test_every_tensor_counts_for_what_is_computed(
    tmp_path: Path, converted: dict[str, Path]
) -> None:
    """Also the norm ahead of the head, which a draft takes from its verifier."""
    names = [it.name for it in difference(converted[NORMS], converted[NORMS]).tensors]
    assert "pre_lm_head_layernorm.weight" in names
    for name in names:

        def change(tensors: dict[str, Any], name: str = name) -> None:
            tensors[name] += 0.5

        other = edited(converted[NORMS], tmp_path / name, change)
        assert not compute(*open_sides((converted[NORMS], other))).same, name


def test_a_changed_key(tmp_path: Path, converted: dict[str, Path]) -> None:
    other = write_checkpoint(tmp_path / "other", config={"rms_norm_eps": 1e-6})
    found = difference(converted[PLAIN], other)
    assert not found.same
    assert results(found) == {}
    (key,) = found.config
    assert (key.key, key.a, key.b, key.computed_with) == (
        "transformer_layer_config.rms_norm_eps",
        1e-5,
        1e-6,
        True,
    )
    assert not compute(*open_sides((converted[PLAIN], other))).same
    assert compute(*open_sides((converted[PLAIN], GOLDEN / PLAIN))).same


def test_another_dtype(tmp_path: Path, verifier: Path, speculators: CommandLine) -> None:
    """Rounding is told from other values, in either order."""
    rounded = EagleConverter().convert(
        GOLDEN / PLAIN, tmp_path / "rounded", verifier, dtype="bf16", validate=False
    )
    for pair in ((GOLDEN / PLAIN, rounded), (rounded, GOLDEN / PLAIN)):
        assert {*results(difference(*pair)).values()} == {"rounded"}
    run = speculators("diff", rounded, GOLDEN / PLAIN)
    assert run.status == 1
    assert run.stdout.splitlines()[-1] == "They have the same tensors, rounded in one of them."

    # float32 holds all values of bfloat16.
    widened = EagleConverter().convert(
        export(rounded, tmp_path / "export", "eagle"), tmp_path / "wide", verifier, dtype="fp32"
    )
    assert {*results(difference(rounded, widened)).values()} == {"same values"}


def test_a_missing_tensor(tmp_path: Path, converted: dict[str, Path]) -> None:
    other = write_checkpoint(
        tmp_path / "other", edit=lambda it: it.pop("layers.0.self_attn.q_proj.weight")
    )
    found = difference(converted[PLAIN], other)
    assert results(found) == {"layers.0.self_attn.q_proj.weight": "only in a"}
    assert any("could not be converted" in note for note in found.notes)
    assert [it for it in found.config if it.computed_with] == []


def test_a_tensor_of_zeros_and_one_of_another_shape(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    out = export(converted[PLAIN], tmp_path / "sglang", "sglang")
    assert difference(converted[PLAIN], out).same
    config = config_of(out)
    del config["exported_zeros"]  # as if somebody else had added the zeros
    (out / "config.json").write_text(json.dumps(config))
    run = speculators("diff", converted[PLAIN], out, "--compute")
    assert run.status == 1
    assert re_squeezed("fc.bias only in b - F32 (64) all zeros") in re_squeezed(run.stdout)
    assert "On random inputs they compute the same" in run.stdout


def re_squeezed(text: str) -> str:
    return " ".join(text.split())


def test_what_one_leaves_open_is_told(tmp_path: Path) -> None:
    """The other one's answer is as good as any, but only an answer."""
    one = convert_golden3("sailab_llama", tmp_path / "one", validate=False, aux_layers=[1, 3, 5])
    other = tmp_path / "other"
    shutil.copytree(one, other)
    config = config_of(one) | {"eagle_aux_hidden_state_layer_ids": None}
    (other / "config.json").write_text(json.dumps(config))
    found = difference(one, other)
    assert any("since that was left open" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["eagle9", None])
def test_a_config_that_is_not_understood_is_never_the_same(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine, kind: str | None
) -> None:
    other = tmp_path / "other"
    shutil.copytree(converted[PLAIN], other)
    config = config_of(other)
    if kind is None:
        del config["speculators_model_type"]
    else:
        config["speculators_model_type"] = kind
    (other / "config.json").write_text(json.dumps(config))
    run = speculators("diff", converted[PLAIN], other)
    assert run.status == 1
    assert "The configs mean the same." not in run.stdout
    assert run.stdout.splitlines()[-1].startswith("They have the same tensors")


def test_a_head_that_conversions_leave_out(tmp_path: Path, converted: dict[str, Path]) -> None:
    other = write_checkpoint(
        tmp_path / "other", edit=lambda it: it.update({"lm_head.weight": torch.zeros(320, 64)})
    )
    found = difference(converted[PLAIN], other)
    assert found.same
    assert any("stores lm_head.weight, which is not compared" in note for note in found.notes)


def test_what_is_no_draft_is_compared_as_it_is(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"depth": value}))
        save_file({"a": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    found = difference(tmp_path / "one", tmp_path / "two")
    assert results(found) == {"a": "different"}
    assert [(it.key, it.a, it.b) for it in found.config] == [("depth", 1.0, 2.0)]
    assert found.a.title == "a checkpoint of no known kind"


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """NaN is NaN; a NaN and a number differ; integers and signs of zero are compared too."""
    one = {
        "nan": torch.tensor([float("nan"), 1.0]),
        "broken": torch.tensor([1.0, 1.0]),
        "zero": torch.tensor([0.0, 2.0]),
        "table": torch.tensor([1, 2, 1 << 40]),
    }
    other = {
        "nan": torch.tensor([float("nan"), 1.0]).half(),
        "broken": torch.tensor([float("nan"), 1.0]),
        "zero": torch.tensor([-0.0, 2.0]),
        "table": torch.tensor([1, 2, (1 << 40) + 3]),
    }
    for name, tensors in (("one", one), ("two", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = {it.name: it for it in difference(tmp_path / "one", tmp_path / "two").tensors}
    assert {name: it.result for name, it in found.items()} == {
        "nan": "same values",
        "broken": "different",
        "zero": "same values",
        "table": "different",
    }
    assert found["broken"].largest_difference is None
    assert found["table"].largest_difference == 3


def test_large_tensors_are_compared_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy on the whole; a tensor that is not contiguous is read in other pieces."""
    monkeypatch.setattr("speculators.comparison.numbers.ELEMENTS", 7)
    random = torch.Generator().manual_seed(0)
    one = torch.randn(30, 20, generator=random)
    other = one.clone()
    other[25, 3] += 2
    other[2, 2] -= 1
    for name, tensor in (("one", one), ("two", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        torch.save({"a": tensor.T.contiguous().T}, tmp_path / name / "pytorch_model.bin")
    save_file({"a": one}, tmp_path / "one" / "model.safetensors")
    (tensor_found,) = difference(tmp_path / "one", tmp_path / "two").tensors
    assert tensor_found.differing == 2
    assert tensor_found.largest_difference == np.abs((one - other).numpy()).max()
    assert tensor_found.largest_value == max(one.abs().max().item(), other.abs().max().item())


def test_what_cannot_be_read(tmp_path: Path, speculators: CommandLine) -> None:
    run = speculators("diff", GOLDEN / PLAIN, tmp_path / "none", "--json")
    assert run.status == 1
    result = printed(run)
    assert result["difference"] is None
    assert result["error"] == run.errors[0]
    run = speculators("diff", GOLDEN / PLAIN, GOLDEN3 / CHAINS[0], "--compute")
    assert run.status == 1


# DFlash


def test_layouts_of_dflash(tmp_path: Path) -> None:
    """Also of a draft whose mask token has its embedding in a file beside the weights."""
    source = write_draft(tmp_path / "source", native())
    torch.save(torch.ones(HIDDEN), source / "mask_embedding.pt")
    out = dflash_converted(source, tmp_path / "out")
    for other in (source, export(out, tmp_path / "vllm", "vllm")):
        found = difference(other, out)
        assert (found.same, results(found)) == (True, {})
        assert "mask_embedding.pt" in [it.name for it in found.tensors]
    assert compute(*open_sides((source, out))).same


def test_another_mask_embedding(tmp_path: Path) -> None:
    drafts = []
    for name, vector in (("a", torch.ones(HIDDEN)), ("b", torch.zeros(HIDDEN)), ("c", None)):
        drafts.append(write_draft(tmp_path / name, native()))
        if vector is not None:
            torch.save(vector, drafts[-1] / "mask_embedding.pt")
    found = difference(drafts[0], drafts[1])
    assert (found.same, results(found)) == (False, {"mask_embedding.pt": "different"})
    found = difference(drafts[0], drafts[2])
    assert (found.same, results(found)) == (False, {"mask_embedding.pt": "only in a"})
    assert [it.key for it in found.config] == ["mask_embedding"]


def test_upstreams_dflash_and_its_conversion(tmp_path: Path) -> None:
    """Its config has two meanings: the one that the other side was converted with is taken."""
    source = write_draft(tmp_path / "source", upstream())
    for causal in (True, False):
        out = dflash_converted(source, tmp_path / f"{causal}", causal=causal)
        assert difference(source, out).same
        (out / "conversion.json").unlink()
        assert difference(source, out).same
