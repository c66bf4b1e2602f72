"""What is said about who serves a draft holds for that very draft, wherever it is said."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dflash
import eagle3
from all_drafts import NAMES, Pair
from helpers import config_of, write_checkpoint
from speculators.convert.export import export
from speculators.errors import ConversionError
from speculators.families.converted import open_converted
from speculators.families.serving import judge
from speculators.families.signature import ENGINES
from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.inspection.findings import Finding


def served_and_refused(found: Finding) -> tuple[set[str], set[str]]:
    """The engines that serve a draft, and the targets of exports that are refused."""
    assert found.serving is not None
    served = {it.engine for it in found.serving}
    return served, {it.export for it in found.not_serving if it.export}


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_serves_it_if_and_only_if_it_can_be_exported(
    tmp_path: Path, all_drafts: dict[str, Pair], name: str
) -> None:
    draft = all_drafts[name]
    found = inspect_checkpoint(draft.converted)
    before = inspect_checkpoint(draft.source)
    served, refused = served_and_refused(found)
    for to, target in open_converted(draft.converted).family.targets.items():
        why = None
        try:
            export(draft.converted, tmp_path / to, to)
        except ConversionError as error:
            why = str(error)
        assert (to in (found.exports or ())) == (why is None)
        if target.serving is None:
            continue
        engine = target.serving.engine
        assert (to in refused) == (why is not None)
        assert why is not None or engine in served
        # Of a draft that is not converted, all is known but the verifier.
        known = served_and_refused(before)[1]
        depends = [it.note for it in before.serving or () if it.export == to]
        assert (to in known) == (why is not None) or "unless its verifier" in str(depends)
        if why is not None:
            (told,) = (it for it in found.not_serving if it.export == to)
            assert told.why.removeprefix("the draft ") in why
            if engine not in served:
                assert engine not in {it.engine for it in found.serving or ()}
    without = {it.engine for it in found.not_serving}
    assert served | without == set(ENGINES)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_and_the_conversion_say_the_same(all_drafts: dict[str, Pair], name: str) -> None:
    directory = all_drafts[name].converted
    found = inspect_checkpoint(directory)
    as_it_is = [it for it in found.serving or () if it.export is None]
    card = (directory / "README.md").read_text()
    assert ("vllm serve" in card) == bool(as_it_is)
    record = json.loads((directory / "conversion.json").read_text())
    told = [it for it in record["discrepancies"] if "vLLM does not serve it as it is" in it]
    assert len(told) == (not as_it_is)
    if as_it_is:
        (settings,) = re.findall(r"--speculative-config '(.*)'", card)
        assert f'method "{json.loads(settings)["method"]}"' == as_it_is[0].option
        parallel = name == eagle3.PARALLEL
        assert json.loads(settings).get("parallel_drafting", False) == parallel
    else:
        assert "does not serve it as it is: the draft " in card


def test_norms_of_a_parallel_draft_get_lost_in_the_format(all_drafts: dict[str, Pair]) -> None:
    """vLLM's reader of peagle passes neither fc_norm nor norm_output on (0.32 and 0.33)."""
    draft = open_converted(all_drafts[eagle3.PARALLEL].converted)
    config = draft.config.model_copy(update={"norm_output": True})
    ways = judge(draft.family, config, draft.features).ways
    assert [(it.serving.engine, it.export) for it in ways] == [("vLLM", "vllm")]


def test_what_depends_on_a_verifier_elsewhere_is_said(
    tmp_path: Path, all_drafts: dict[str, Pair]
) -> None:
    """Nothing is asked for on the Hub; with the verifier here, it is known."""
    directory = tmp_path / "draft"
    directory.mkdir()
    for name in ("model.safetensors", "config.json"):
        (directory / name).write_bytes((all_drafts["sailab_llama"].converted / name).read_bytes())
    config = config_of(directory)
    config["speculators_config"]["verifier"]["name_or_path"] = "org/verifier"
    (directory / "config.json").write_text(json.dumps(config))
    notes = {it.engine: it.note for it in inspect_checkpoint(directory).serving or ()}
    assert notes == {
        "vLLM": None,
        "SGLang": "unless its verifier has 5 layers",
        "llama.cpp": "unless its verifier has 5 layers",
        "TensorRT-LLM": None,
    }
    config = dflash.native(num_target_layers=None, nested={"target_layer_ids": [1, 3, 7]})
    last = inspect_checkpoint(dflash.write_draft(tmp_path / "last", config))
    notes = {it.engine: it.note for it in last.serving or ()}
    assert notes["llama.cpp"] == "unless its verifier has 8 layers"
    assert notes["TensorRT-LLM"] is None
    here = inspect_checkpoint(all_drafts["sailab_llama"].converted)
    assert {it.note for it in here.serving or ()} == {None}


@pytest.mark.parametrize(
    ("config", "served"),
    [
        (
            dflash.native(
                layer_types=dflash.sliding(True, False, True),
                sliding_window=16,
                use_sliding_window=True,
            ),
            ["vLLM", "SGLang"],
        ),
        (dflash.native(architectures=["Qwen3OmniDSparkModel"]), ["vLLM"]),
    ],
)
def test_what_the_format_cannot_say_is_served_as_published(
    tmp_path: Path, config: dict[str, Any], served: list[str]
) -> None:
    found = inspect_checkpoint(dflash.write_draft(tmp_path / "draft", config))
    assert not found.conversion.possible
    assert [it.engine for it in found.serving or ()] == served
    assert {it.engine for it in found.not_serving} == {*ENGINES} - {*served}


@pytest.mark.parametrize("name", ["LingDSparkModel", "Lfm2DSparkDraftModel"])
def test_other_names_of_the_same_model_are_converted(tmp_path: Path, name: str) -> None:
    config = dflash.deepspec(architectures=[name], is_neox_style=name == "LingDSparkModel")
    found = inspect_checkpoint(dflash.write_draft(tmp_path / "draft", config, dflash.with_markov()))
    assert found.conversion.possible
    assert [it.engine for it in found.serving or ()][:2] == ["vLLM", "SGLang"]


def test_of_what_cannot_be_read_only_the_kind_is_known(tmp_path: Path) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors["fc.weight_scale"] = torch.ones(1)

    found = inspect_checkpoint(write_checkpoint(tmp_path / "draft", edit=quantize))
    assert [it.engine for it in found.serving or ()] == ["vLLM", "SGLang"]
    assert found.not_serving == []
    assert any("those that serve its kind" in note for note in found.notes)
    assert "Such drafts are served by vLLM" in str(found.conversion.why_not)


def test_why_a_draft_of_a_served_kind_is_not_is_said(tmp_path: Path) -> None:
    """As the trainer names them, which nothing renames."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["refiner_head.readout.weight"] = torch.ones(dflash.VOCABULARY, dflash.RANK)

    found = inspect_checkpoint(dflash.write_draft(tmp_path / "draft", dflash.native(), add))
    assert found.serving == []
    assert "served as published" not in str(found.conversion.why_not)
    assert str(found.conversion.why_not).endswith(
        "No engine serves it (vLLM does not: it has the names refiner_head.* of its trainer)."
    )
