"""What is said about who serves a draft holds for that very draft, wherever it is said."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dflash
import eagle3
from helpers import GOLDEN, GOLDEN_NAMES, config_of, save_quietly, write_checkpoint
from speculators.convert.conversion import convert
from speculators.convert.export import export
from speculators.errors import ConversionError
from speculators.families.converted import open_converted
from speculators.families.serving import judge
from speculators.families.signature import ENGINES
from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.inspection.findings import Finding

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Pair:
    """A draft as it was published, and converted."""

    source: Path
    converted: Path


def verifier_like(source: Path, directory: Path, **keys: Any) -> Path:
    """What a conversion without validation needs of a verifier: a config."""
    config = config_of(source)
    sizes = {key: config[key] for key in ("hidden_size", "vocab_size")}
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], **sizes, **keys})
    )
    return directory


def made() -> dict[str, Any]:
    """DFlash drafts that some engine cannot compute, beside the golden ones."""
    return {
        "dflash, from the anchor": (dflash.native(sample_from_anchor=True), lambda tensors: None),
        "dflash, of rank 0": (
            dflash.deepspec(markov_rank=0, enable_confidence_head=False),
            lambda tensors: None,
        ),
        "dflash, sliding": (
            dflash.native(
                layer_types=dflash.sliding(True, False, True),
                sliding_window=16,
                use_sliding_window=True,
                is_causal=False,
            ),
            lambda tensors: None,
        ),
        "dflash, causal": (dflash.native(nested={"causal": True}), lambda tensors: None),
        "dflash, own matrices": (dflash.native(), dflash.with_own_matrices),
        "dflash, own vocabulary": (dflash.native(), dflash.with_vocabulary),
        "dflash, biased": (dflash.native(attention_bias=True), dflash.with_biases),
        "dspark, confident": (dflash.deepspec(), dflash.with_markov()),
    }


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """All golden and example drafts, and some more."""
    root = tmp_path_factory.mktemp("drafts")
    found: dict[str, tuple[Path, Path, dict[str, Any]]] = {}
    for source in [*(GOLDEN / name for name in GOLDEN_NAMES), *sorted(EXAMPLES.glob("smol*"))]:
        verifier = verifier_like(source, root / f"verifier of {source.name}", num_hidden_layers=30)
        found[source.name] = (source, verifier, {})
    narrow = save_quietly(eagle3.narrow_verifier(48), root / "narrow")
    for name in eagle3.NAMES:
        source = root / f"source of {name}"
        source.mkdir()
        for file in ("config.json", "model.safetensors"):
            (source / file).symlink_to(eagle3.GOLDEN3 / name / file)
        verifier = narrow if name == "target_hidden_48" else eagle3.TARGET
        found[name] = (source, verifier, eagle3.OPTIONS.get(name, {}))
    for path in sorted(dflash.GOLDEN_FAMILIES.glob("d*")):
        found[path.name] = (path, dflash.TARGET, {})
    for name, (config, edit) in made().items():
        source = dflash.write_draft(root / name, config, edit)
        found[name] = (source, dflash.TARGET, {})
    gelu = write_checkpoint(root / "gelu", config={"hidden_act": "gelu"})
    found["eagle, gelu"] = (gelu, verifier_like(gelu, root / "verifier of gelu"), {})
    return {
        name: Pair(
            source,
            convert(None, source, root / f"{name} out", verifier, options=options, validate=False),
        )
        for name, (source, verifier, options) in found.items()
    }


NAMES = [
    *GOLDEN_NAMES,
    *(path.name for path in sorted(EXAMPLES.glob("smol*"))),
    *eagle3.NAMES,
    *(path.name for path in sorted(dflash.GOLDEN_FAMILIES.glob("d*"))),
    *made(),
    "eagle, gelu",
]


def served_and_refused(found: Finding) -> tuple[set[str], set[str]]:
    """The engines that serve a draft, and the targets of exports that are refused."""
    assert found.serving is not None
    served = {it.engine for it in found.serving}
    return served, {it.export for it in found.not_serving if it.export}


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_serves_it_if_and_only_if_it_can_be_exported(
    tmp_path: Path, drafts: dict[str, Pair], name: str
) -> None:
    draft = drafts[name]
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
def test_the_card_and_the_conversion_say_the_same(drafts: dict[str, Pair], name: str) -> None:
    directory = drafts[name].converted
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


def test_norms_of_a_parallel_draft_get_lost_in_the_format(drafts: dict[str, Pair]) -> None:
    """vLLM's reader of peagle passes neither fc_norm nor norm_output on (0.32 and 0.33)."""
    draft = open_converted(drafts[eagle3.PARALLEL].converted)
    config = draft.config.model_copy(update={"norm_output": True})
    ways = judge(draft.family, config, draft.features).ways
    assert [(it.serving.engine, it.export) for it in ways] == [("vLLM", "vllm")]


def test_what_depends_on_a_verifier_elsewhere_is_said(
    tmp_path: Path, drafts: dict[str, Pair]
) -> None:
    """Nothing is asked for on the Hub; with the verifier here, it is known."""
    directory = tmp_path / "draft"
    directory.mkdir()
    for name in ("model.safetensors", "config.json"):
        (directory / name).write_bytes((drafts["sailab_llama"].converted / name).read_bytes())
    config = config_of(directory)
    config["speculators_config"]["verifier"]["name_or_path"] = "org/verifier"
    (directory / "config.json").write_text(json.dumps(config))
    notes = {it.engine: it.note for it in inspect_checkpoint(directory).serving or ()}
    assert notes == {
        "vLLM": None,
        "SGLang": "unless its verifier has 5 layers",
        "llama.cpp": "if its verifier has 8 layers",
        "TensorRT-LLM": None,
    }
    here = inspect_checkpoint(drafts["sailab_llama"].converted)
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
    assert any("by its kind alone" in note for note in found.notes)
    assert "Such drafts are served by vLLM" in str(found.conversion.why_not)
