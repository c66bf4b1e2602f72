"""Converting DFlash, DFlash 2 and DSpark: every publisher's layout, what upstream's converter gets
wrong, and what the format cannot say.

What readers' own code does with exports, by which limits are set:

| reader | version | what was run | result |
| --- | --- | --- | --- |
| llama.cpp | b11434 | convert_hf_to_gguf.py and llama-server, on these drafts | the reference's tokens, as likely within 0.001 |
| SGLang | 0.5.23 | srt/models/dflash.py: model and loader, over plain layers and attention | golden outputs, within 7e-6 |
"""  # noqa: E501

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash import (
    DRAFTED,
    GOLDEN_FAMILIES,
    LAYERS,
    PLAIN,
    RANK,
    SELECTING,
    TARGET,
    VOCABULARY,
    Config,
    Edit,
    Tensors,
    both,
    config_of,
    converted,
    deepspec,
    native,
    sliding,
    tensors_of,
    upstream,
    with_biases,
    with_markov,
    with_own_matrices,
    with_vocabulary,
    write_draft,
)
from helpers import CommandLine, write_shards
from llamacpp_reads import check_against_the_record
from speculators.convert.conversion import convert, plan
from speculators.convert.export import export
from speculators.errors import ConversionError, FormatError, ValidationError, VerifierError
from speculators.families.converted import open_converted
from speculators.families.dflash import DFLASH, DSPARK
from speculators.families.dflash.config import MASK_FILE, DFlashConfig, DSparkConfig
from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.models.dflash import DFlashSpeculator


def nothing(tensors: Tensors) -> None:
    """Changes nothing."""


WINDOW: dict[str, Any] = {"sliding_window": 4, "use_sliding_window": True}
DRAFTS: dict[str, tuple[Config, Edit]] = {
    "z-lab": (native(), nothing),
    "z-lab, newer": (native(block_size=None, nested={"block_size": 8}), nothing),
    "DeepSpec without a Markov head": (
        deepspec(markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=None),
        nothing,
    ),
    "ModelOpt": (native(nested={"causal": False}, num_anchors=4), nothing),
    "JetSpec": (native(nested={"causal": True}), nothing),
    "causal": (native(is_causal=True), nothing),
    "all layers slide": (native(layer_types=sliding(True, True, True), **WINDOW), nothing),
    "all slide and see both ways": (
        native(layer_types=sliding(True, True, True), is_causal=False, **WINDOW),
        nothing,
    ),
    "some slide, all see both ways": (
        native(layer_types=sliding(True, False, True), is_causal=False, **WINDOW),
        nothing,
    ),
    "use_swa": (native(nested={"use_swa": True, "swa_window_size": 4}), nothing),
    "own matrices": (native(), with_own_matrices),
    "own vocabulary": (native(draft_vocab_size=DRAFTED), with_vocabulary),
    "biases": (native(attention_bias=True), with_biases),
    "paired RoPE": (native(is_neox_style=False), nothing),
    "scaled RoPE": (native(rope_scaling={"type": "linear", "factor": 2.0}), nothing),
    "llama3's RoPE": (
        native(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        ),
        nothing,
    ),
    "transformers 5": (
        native(
            rope_theta=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000},
            dtype="float32",
            torch_dtype=None,
        ),
        nothing,
    ),
    "DFlash 2": (native(SELECTING), nothing),
    "DFlash 2 with scales": (
        native(
            SELECTING,
            nested={
                "input_embedding_scale": 2.0,
                "output_multiplier": 0.5,
                "final_logit_softcapping": 30.0,
            },
        ),
        nothing,
    ),
    "DSpark": (deepspec(), with_markov()),
    "DSpark, some layers slide": (
        deepspec(layer_types=sliding(True, False, True), **WINDOW),
        with_markov(),
    ),
    "DSpark, causal": (deepspec(is_causal=True), with_markov()),
    "DSpark, gated": (deepspec(markov_head_type="gated"), with_markov("gated")),
    "DSpark, rnn": (deepspec(markov_head_type="rnn"), with_markov("rnn")),
    "DSpark without confidence": (
        deepspec(enable_confidence_head=False, confidence_head_with_markov=None),
        with_markov(confidence=False),
    ),
    "DSpark, confidence by itself": (
        deepspec(confidence_head_with_markov=False),
        both(
            with_markov(),
            lambda tensors: tensors.update({"confidence_head.proj.weight": torch.ones(1, 64)}),
        ),
    ),
    "DSpark, own vocabulary": (
        deepspec(draft_vocab_size=DRAFTED),
        both(with_markov(drafted=DRAFTED), with_vocabulary),
    ),
    "DSpark as DFlash": (deepspec(sample_from_anchor=False), with_markov()),
}
"""Drafts in native layouts that the format can say."""

FOR_LLAMACPP = (
    "z-lab",
    "JetSpec",
    "all layers slide",
    "paired RoPE",
    "scaled RoPE",
    "DFlash 2",
    "DFlash 2 with scales",
    "DSpark",
    "DSpark without confidence",
    "DSpark, own vocabulary",
    "DSpark as DFlash",
)
"""Those of which a run of llama.cpp's converter is recorded."""


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Path]]:
    """Each of ``DRAFTS``: as published, and converted with validation."""
    root = tmp_path_factory.mktemp("drafts")
    found = {}
    for number, (name, (config, edit)) in enumerate(DRAFTS.items()):
        golden = SELECTING if "2" in name and "DFlash" in name else PLAIN
        source = write_draft(root / f"source{number}", config, edit, golden)
        found[name] = (source, convert(source, root / f"out{number}", TARGET))
    return found


def config_in(directory: Path) -> Config:
    config: Config = json.loads((directory / "config.json").read_text())
    return config


def bytes_of(directory: Path) -> dict[str, bytes]:
    tensors = load_file(directory / "model.safetensors")
    return {name: it.flatten().view(torch.uint8).numpy().tobytes() for name, it in tensors.items()}


@pytest.mark.parametrize("name", DRAFTS)
def test_no_byte_of_a_tensor_changes(drafts: Mapping[str, tuple[Path, Path]], name: str) -> None:
    source, out = drafts[name]
    assert bytes_of(out) == bytes_of(source)


CAUSAL, MIXED = (True,) * LAYERS, (True, False, True)
SAID: dict[str, dict[str, Any]] = {
    "z-lab": {"causal": (False,) * LAYERS, "sample_from_anchor": False, "block_size": 8},
    "z-lab, newer": {"block_size": 8},
    "DeepSpec without a Markov head": {
        "speculators_model_type": "dflash",
        "sample_from_anchor": True,
        "drafted_per_block": 8,
    },
    "ModelOpt": {"causal": (False,) * LAYERS},
    "JetSpec": {"causal": CAUSAL, "sliding_window_non_causal": False},
    "causal": {"causal": CAUSAL},
    "all layers slide": {"causal": CAUSAL, "sliding_window_non_causal": False},
    "all slide and see both ways": {"causal": (False,) * LAYERS},
    "use_swa": {"causal": (False,) * LAYERS},
    "own vocabulary": {"draft_vocab_size": DRAFTED},
    "DFlash 2": {"conv_kernel_size": 2, "conv_group_size": 16, "selector_top_k": 4},
    "DFlash 2 with scales": {"input_embedding_scale": 2.0, "final_logit_softcapping": 30.0},
    "DSpark": {
        "speculators_model_type": "dspark",
        "sample_from_anchor": True,
        "drafted_per_block": 8,
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "confidence_head_with_markov": True,
        "causal": (False,) * LAYERS,
    },
    "DSpark, some layers slide": {"causal": MIXED},
    "DSpark, causal": {"causal": CAUSAL},
    "DSpark, gated": {"markov_head_type": "gated"},
    "DSpark without confidence": {"enable_confidence_head": False},
    "DSpark as DFlash": {"sample_from_anchor": False, "drafted_per_block": 7},
}


@pytest.mark.parametrize("name", SAID)
def test_the_config_says_it(drafts: Mapping[str, tuple[Path, Path]], name: str) -> None:
    config = open_converted(drafts[name][1]).config
    assert isinstance(config, DFlashConfig)
    assert config.aux_hidden_state_layer_ids == [2, 4, 6]
    assert config.mask_token_id == 319
    assert {key: getattr(config, key) for key in SAID[name]} == SAID[name]


def test_the_speculators_config_proposes_what_a_block_drafts(
    drafts: Mapping[str, tuple[Path, Path]],
) -> None:
    for name, tokens in (("z-lab", 7), ("DSpark", 8), ("DSpark as DFlash", 7)):
        (method,) = config_in(drafts[name][1])["speculators_config"]["proposal_methods"]
        assert (method["proposal_type"], method["speculative_tokens"]) == ("greedy", tokens)


def test_windows_are_kept(drafts: Mapping[str, tuple[Path, Path]]) -> None:
    for name in ("all layers slide", "all slide and see both ways", "use_swa"):
        layer = open_converted(drafts[name][1]).config.transformer_layer_config
        assert layer.windows == (4,) * LAYERS, name  # type: ignore[attr-defined]


THERE_AND_BACK = [
    (name, target)
    for name, (config, _) in DRAFTS.items()
    for target in ("dflash", "vllm", "sglang", "llamacpp", "trtllm")
    if not (target in {"dflash", "trtllm"} and name.startswith("DSpark"))
]


@pytest.mark.parametrize(("name", "target"), THERE_AND_BACK)
def test_there_and_back_is_the_same(
    drafts: Mapping[str, tuple[Path, Path]], tmp_path: Path, name: str, target: str
) -> None:
    """What a target can say, it says: converted again, its layout gives the same directory."""
    source, out = drafts[name]
    if target not in (inspect_checkpoint(out).exports or ()):
        family = open_converted(out).family
        known = target in family.targets
        with pytest.raises(ConversionError, match="cannot" if known else "can be exported to"):
            export(out, tmp_path / "native", target)
        assert not (tmp_path / "native").exists()
        return
    exported = export(out, tmp_path / "native", target)
    assert bytes_of(exported) == bytes_of(source)
    again = converted(exported, tmp_path / "again")
    assert config_in(again) == config_in(out)
    assert bytes_of(again) == bytes_of(out)


REFUSED: dict[str, tuple[Config, Edit, str]] = {
    "some layers slide": (
        native(layer_types=sliding(True, False, True), **WINDOW),
        nothing,
        r"layers 0, 2 slide and are causal, .* cannot express for a DFlash draft.*Keep the native",
    ),
    "attention sinks": (
        native(nested={"attention_sink_bias": True}),
        nothing,
        r"says attention_sink_bias True: the draft has attention sinks",
    ),
    "tensors of attention sinks": (
        native(),
        lambda tensors: tensors.update({"layers.0.self_attn.attention_sink_bias": torch.ones(4)}),
        r"with attention sinks \(it has layers.0.self_attn.attention_sink_bias\)",
    ),
    "scaled values": (
        native(nested={"attention_value_scale": 2.0}),
        nothing,
        "says attention_value_scale 2.0: the draft has scaled values",
    ),
    "another projector": (
        native(nested={"projector_type": "domino"}),
        nothing,
        "says projector_type 'domino'",
    ),
    "norms of Gemma": (native(use_gemma_norm=True), nothing, "multiply by 1 . weight"),
    "an unknown architecture": (
        deepspec(architectures=["Gemma4DSparkModel"]),
        with_markov(),
        "says architectures Gemma4DSparkModel, whose layers are not",
    ),
    "no block size": (native(block_size=None), nothing, "lacks block_size"),
    "no mask token": (
        native(nested={"mask_token_id": None}),
        nothing,
        "which token stands for .* Specify it with --mask-token-id",
    ),
    "two mask tokens": (
        native(mask_token_id=318),
        nothing,
        "says mask_token_id 318 and dflash_config.mask_token_id 319, which mean the same",
    ),
    "a mask token outside": (
        native(nested={"mask_token_id": VOCABULARY}),
        nothing,
        "the mask token 320 is not a token of the vocabulary of 320",
    ),
    "layers outside": (
        native(nested={"target_layer_ids": [1, 3, 8]}),
        nothing,
        r"the layers \[1, 3, 8\] .*do not all lie in the verifier, which has 8 layers",
    ),
    "layers out of order": (
        native(nested={"target_layer_ids": [3, 1, 5]}),
        nothing,
        "not distinct and in ascending order",
    ),
    "too few layers": (
        native(nested={"target_layer_ids": [1, 3]}),
        nothing,
        r"the layers \[1, 3\], which are 2, but fc.weight .* takes 3",
    ),
    "layers that are no list": (
        native(nested={"target_layer_ids": "1,3,5"}),
        nothing,
        "is not a list of layers",
    ),
    "the verifier's depth": (
        native(num_target_layers=9),
        nothing,
        "num_target_layers 9, but the verifier .* has 8 layers",
    ),
    "no window": (
        native(layer_types=sliding(True, True, True), use_sliding_window=True),
        nothing,
        "has layers that slide, but no sliding_window",
    ),
    "a window that is off": (
        native(layer_types=sliding(True, True, True), sliding_window=4, use_sliding_window=False),
        nothing,
        "use_sliding_window false, but layer_types",
    ),
    "types of other layers": (
        native(layer_types=sliding(False)),
        nothing,
        r"\['full_attention'\] are not the types of 3 layers",
    ),
    "no rope_theta": (
        native(rope_theta=None),
        nothing,
        "lacks rope_theta, which vLLM takes to be 1000000 and transformers to be 10000",
    ),
    "a head size": (native(head_dim=32), nothing, r"says head_dim 32, but"),
    "the number of layers": (
        native(num_hidden_layers=4, layer_types=None),
        nothing,
        "num_hidden_layers 4, but the tensors are those of 3",
    ),
    "biases that are not there": (
        native(attention_bias=True),
        nothing,
        "attention_bias true, but the tensors have no biases",
    ),
    "a layer that is not there": (
        native(),
        lambda tensors: tensors.pop("layers.1.mlp.up_proj.weight"),
        "lacks layers.1.mlp.up_proj.weight; missing tensors are not made up",
    ),
    "a tensor too many": (
        native(),
        lambda tensors: tensors.update({"layers.1.gate": torch.ones(3)}),
        "has unknown layers.1.gate; no tensor is dropped",
    ),
    "tokens without a head": (
        native(),
        both(with_vocabulary, lambda tensors: tensors.pop("lm_head.weight")),
        "drafts a part of the vocabulary, but no lm_head.weight",
    ),
    "a head without tokens": (
        native(),
        both(
            with_vocabulary, lambda tensors: tensors.pop("d2t"), lambda tensors: tensors.pop("t2d")
        ),
        "its head has 40 tokens of 320, but neither d2t nor t2d is there",
    ),
    "a Markov head that is not there": (
        deepspec(),
        nothing,
        "says markov_rank 8, but the tensors have no Markov head",
    ),
    "another Markov head": (
        deepspec(markov_head_type="rnn"),
        with_markov("gated"),
        "markov_head_type rnn, but the tensors are those of gated",
    ),
    "no confidence head": (
        deepspec(enable_confidence_head=False),
        with_markov(),
        "enable_confidence_head false, but the tensors have one",
    ),
    "a narrow confidence head": (
        deepspec(confidence_head_with_markov=False),
        with_markov(),
        "confidence_head_with_markov false, but confidence_head.proj.weight has the shape",
    ),
    "another selector": (
        native(SELECTING, nested={"selector_rank": 9}),
        nothing,
        "selector_rank 9, but the tensors have 8",
    ),
    "scales of DFlash": (
        native(nested={"output_multiplier": 2.0}),
        nothing,
        "says output_multiplier 2.0, which readers disagree on",
    ),
    "contradicting anchors": (
        deepspec(sample_from_anchor=True, dspark_bonus_anchor=True),
        with_markov(),
        "contradict each other",
    ),
    "partial RoPE": (
        native(rope_parameters={"rope_theta": 1000000, "partial_rotary_factor": 0.25}),
        nothing,
        "partial_rotary_factor 0.25, with which the draft would compute",
    ),
}
"""What is refused: config, changes of the tensors, and why."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused(tmp_path: Path, case: str) -> None:
    config, edit, message = REFUSED[case]
    golden = SELECTING if case == "another selector" else PLAIN
    source = write_draft(tmp_path / "source", config, edit, golden)
    with pytest.raises(ConversionError, match=message) as caught:
        converted(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("lacking", "name"), [("embedding", "embed_tokens"), ("head", "lm_head")])
def test_matrices_of_another_width_are_not_borrowed(
    tmp_path: Path, lacking: str, name: str
) -> None:
    """Without validation, too: such a directory would not load."""

    def edit(tensors: Tensors) -> None:
        with_own_matrices(tensors)
        del tensors[f"{name}.weight"]
        tensors["fc.weight"] = tensors["fc.weight"][:, : 3 * 48].contiguous()

    narrow = tmp_path / "verifier"
    narrow.mkdir()
    config = json.loads((TARGET / "config.json").read_text()) | {"hidden_size": 48}
    (narrow / "config.json").write_text(json.dumps(config))
    source = write_draft(tmp_path / "source", native(target_hidden_size=48), edit)
    with pytest.raises(ConversionError, match=rf"no {lacking} of its own, .* width is 48, not 64"):
        converted(source, tmp_path / "out", narrow)


# What upstream's 0.9.0 gets wrong, by its source and by running it.


def test_a_bidirectional_draft_stays_one(drafts: Mapping[str, tuple[Path, Path]]) -> None:
    """Upstream writes ``sliding_window_non_causal: false``, which vLLM makes causal."""
    assert config_in(drafts["z-lab"][1])["sliding_window_non_causal"] is True


def test_nothing_of_dflash_config_vanishes(tmp_path: Path) -> None:
    source = write_draft(tmp_path / "source", native(nested={"temperature_of_masks": 3}))
    planned = plan(source, TARGET)
    assert any("dflash_config.temperature_of_masks" in it for it in planned.discrepancies)
    assert planned.config_left_out["dflash_config.temperature_of_masks"]


def test_a_verifier_of_several_parts(tmp_path: Path) -> None:
    """Qwen3.5 and Gemma 4 nest the language model's keys in ``text_config``."""
    verifier = tmp_path / "verifier"
    verifier.mkdir()
    text = json.loads((TARGET / "config.json").read_text())
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    (verifier / "config.json").write_text(json.dumps(config))
    out = converted(write_draft(tmp_path / "source", native()), tmp_path / "out", verifier)
    assert config_in(out)["speculators_config"]["verifier"]["architectures"] == [
        "Qwen3_5ForConditionalGeneration"
    ]


def test_the_last_layer_can_be_read(tmp_path: Path) -> None:
    source = write_draft(tmp_path / "source", native(nested={"target_layer_ids": [1, 3, 7]}))
    assert config_in(converted(source, tmp_path / "out"))["aux_hidden_state_layer_ids"] == [2, 4, 8]


def test_the_embeddings_can_be_read(tmp_path: Path) -> None:
    """DeepSpec numbers them -1, and here they are 0."""
    config = deepspec(target_layer_ids=[-1, 3, 5])
    out = converted(write_draft(tmp_path / "source", config, with_markov()), tmp_path / "out")
    assert config_in(out)["aux_hidden_state_layer_ids"] == [0, 4, 6]
    assert export(out, tmp_path / "vllm", "vllm")
    with pytest.raises(ConversionError, match=r"reads the verifier's embeddings \(numbered 0\)"):
        export(out, tmp_path / "sglang", "sglang")


def test_layers_that_are_not_said_are_the_references(tmp_path: Path) -> None:
    """As z-lab's code and SGLang count: 1 to the fourth-last of 8 layers, evenly."""
    source = write_draft(tmp_path / "source", native(nested={"target_layer_ids": None}))
    planned = plan(source, TARGET)
    assert planned.config.aux_hidden_state_layer_ids == [2, 4, 6]  # type: ignore[attr-defined]
    assert any("no target_layer_ids" in clause for clause in planned.discrepancies)


def test_only_the_config_of_the_verifier_is_needed(tmp_path: Path) -> None:
    verifier = tmp_path / "verifier"
    verifier.mkdir()
    (verifier / "config.json").write_text((TARGET / "config.json").read_text())
    assert converted(GOLDEN_FAMILIES / PLAIN, tmp_path / "out", verifier).is_dir()


def test_a_verifier_of_another_size_is_refused(tmp_path: Path) -> None:
    verifier = tmp_path / "verifier"
    verifier.mkdir()
    config = json.loads((TARGET / "config.json").read_text())
    (verifier / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(VerifierError, match="its vocabulary is 320, but the verifier's is 400"):
        converted(GOLDEN_FAMILIES / PLAIN, tmp_path / "out", verifier)
    (verifier / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(ConversionError, match="whose hidden size is 128"):
        converted(GOLDEN_FAMILIES / PLAIN, tmp_path / "out", verifier)


def test_shards_are_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(native()))
    tensors = list(tensors_of().items())
    parts = {f"model-0000{n}-of-00002.safetensors": dict(tensors[n - 1 :: 2]) for n in (1, 2)}
    write_shards(source, parts)
    out = converted(source, tmp_path / "out")
    assert bytes_of(out) == bytes_of(GOLDEN_FAMILIES / PLAIN)


def test_every_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    def mix(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float32 if "norm" in name else torch.bfloat16)

    source = write_draft(tmp_path / "source", native(), mix)
    out = converted(source, tmp_path / "out")
    assert bytes_of(out) == bytes_of(source)
    dtypes = {name: it.dtype for name, it in load_file(out / "model.safetensors").items()}
    assert dtypes == {
        name: it.dtype for name, it in load_file(source / "model.safetensors").items()
    }


def test_nan_is_refused(tmp_path: Path) -> None:
    """Upstream looks for it on request only, and then in three matrices."""

    def spoil(tensors: Tensors) -> None:
        tensors["layers.1.mlp.up_proj.weight"][0, 0] = torch.nan

    source = write_draft(tmp_path / "source", native(), spoil)
    with pytest.raises(ValidationError, match=r"layers.1.mlp.up_proj.weight .* not finite"):
        convert(source, tmp_path / "out", TARGET)
    assert not (tmp_path / "out").exists()


def test_rope_is_compared_where_it_turns_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its scaling for long contexts were left out, which a short context hardly shows."""
    load = DFlashSpeculator.from_converted.__func__  # type: ignore[attr-defined]

    def spoilt(cls: type[DFlashSpeculator], *arguments: Any, **options: Any) -> DFlashSpeculator:
        model: DFlashSpeculator = load(cls, *arguments, **options)
        model.rotary_emb.inv_freq[-1] /= 8  # type: ignore[index, operator]
        return model

    monkeypatch.setattr(DFlashSpeculator, "from_converted", classmethod(spoilt))
    source = write_draft(tmp_path / "source", native(rope_theta=4000000))
    with pytest.raises(ValidationError, match="The angles of RoPE are not those of the config"):
        convert(source, tmp_path / "out", TARGET)


def test_fused_projections_are_taken_apart(tmp_path: Path) -> None:
    """Where all else is DFlash; with Laguna's gates, it is another draft."""

    def fuse(tensors: Tensors) -> None:
        for layer in range(LAYERS):
            module = f"layers.{layer}.self_attn"
            parts = [tensors.pop(f"{module}.{it}_proj.weight") for it in ("q", "k", "v")]
            tensors[f"{module}.qkv_proj.weight"] = torch.cat(parts)

    out = converted(write_draft(tmp_path / "source", native(), fuse), tmp_path / "out")
    assert bytes_of(out) == bytes_of(GOLDEN_FAMILIES / PLAIN)

    def gate(tensors: Tensors) -> None:
        fuse(tensors)
        tensors["layers.0.self_attn.g_proj.weight"] = torch.ones(4, 64)

    laguna = write_draft(tmp_path / "laguna", native(), gate)
    with pytest.raises(ConversionError, match=r"holds a Laguna DFlash draft .* served by vLLM"):
        converted(laguna, tmp_path / "none")


def test_a_prefix_is_taken_off(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    out = converted(write_draft(tmp_path / "source", native(), rename), tmp_path / "out")
    assert bytes_of(out) == bytes_of(GOLDEN_FAMILIES / PLAIN)


def test_names_of_modelopt_and_upstream_are_those_of_the_format(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        with_markov()(tensors)
        for name in list(tensors):
            flat = name.removeprefix("markov_head.").replace(
                "confidence_head.proj", "confidence_proj"
            )
            tensors[flat] = tensors.pop(name)

    config = native(
        nested={
            "projector_type": "dspark",
            "shift_label": True,
            "causal": False,
            "markov_rank": RANK,
            "markov_head_type": "vanilla",
            "use_confidence_head": True,
        }
    )
    out = converted(write_draft(tmp_path / "source", config, rename), tmp_path / "out")
    found = open_converted(out).config
    assert isinstance(found, DSparkConfig)
    assert found.sample_from_anchor
    assert found.enable_confidence_head

    def suffix(tensors: Tensors) -> None:
        for name in ("predecessor", "successor"):
            book = f"candidate_selector.{name}_codebook"
            tensors[f"{book}.weight"] = tensors.pop(book)

    source = write_draft(tmp_path / "two", native(SELECTING), suffix, SELECTING)
    assert bytes_of(converted(source, tmp_path / "out2")) == bytes_of(GOLDEN_FAMILIES / SELECTING)


def test_the_anchor_of_specforge(tmp_path: Path) -> None:
    """Its DSpark drafts predict as DFlash's do; its config does not say so."""
    config = native(
        architectures=["DSparkDraftModel"],
        nested={
            "projector_type": "dspark",
            "attention_mode": "gqa",
            "markov_rank": RANK,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        },
    )
    source = write_draft(tmp_path / "source", config, with_markov())
    planned = plan(source, TARGET)
    assert planned.config.sample_from_anchor is False  # type: ignore[attr-defined]
    assert any("as SpecForge trains" in clause for clause in planned.discrepancies)


@pytest.mark.parametrize(
    ("types", "base"),
    [(None, 1e6), ("full_attention", 1e6), ("sliding_attention", 1e4), ("mixed", None)],
)
def test_rope_by_the_type_of_the_layers(
    tmp_path: Path, types: str | None, base: float | None
) -> None:
    """As transformers 5 writes it; the layers of a DFlash draft have one RoPE."""
    named = ["full_attention", "sliding_attention", "full_attention"]
    config = native(
        rope_theta=None,
        rope_parameters={
            "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        layer_types=named if types == "mixed" else [types] * LAYERS if types else None,
        use_sliding_window=types not in (None, "full_attention"),
        sliding_window=64,
        is_causal=False,
    )
    source = write_draft(tmp_path / "source", config)
    if base is None:
        with pytest.raises(ConversionError, match="gives RoPE by the type of a layer"):
            converted(source, tmp_path / "out")
    else:
        out = converted(source, tmp_path / "out")
        assert config_in(out)["transformer_layer_config"]["rope_theta"] == base


def test_rope_copied_from_a_verifier_is_not_used(tmp_path: Path) -> None:
    """``rope_dim`` says what the training rotated (SGLang); the rest was the verifier's."""
    copied = {
        "rope_theta": 1000000,
        "rope_type": "default",
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
        "rope_dim": 16,
    }
    source = write_draft(tmp_path / "source", native(rope_parameters=copied))
    out = converted(source, tmp_path / "out")
    layer = config_in(out)["transformer_layer_config"]
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000}


# Upstream's format.


def test_upstreams_bidirectional_draft_is_asked_about(
    tmp_path: Path, speculators: CommandLine
) -> None:
    source = write_draft(tmp_path / "source", upstream())
    with pytest.raises(ConversionError, match=r"two meanings .* --causal or --no-causal"):
        converted(source, tmp_path / "out")
    assert "attention" not in inspect_checkpoint(source).facts
    with pytest.raises(FormatError, match=r"convert the draft again with --causal or --no-causal"):
        open_converted(source)
    for answer in (True, False):
        out = converted(source, tmp_path / f"out-{answer}", causal=answer)
        config = open_converted(out).config
        assert isinstance(config, DFlashConfig)
        assert config.causal == (answer,) * LAYERS
    run = speculators(
        "convert", "dflash", source, tmp_path / "cli", TARGET, "--no-causal", "--no-validate"
    )
    assert run.status == 0
    assert config_in(tmp_path / "cli")["sliding_window_non_causal"] is True
    record = json.loads((tmp_path / "cli" / "conversion.json").read_text())
    assert record["options"] == {"causal": False}


def test_a_manifest_can_answer(tmp_path: Path, speculators: CommandLine) -> None:
    write_draft(tmp_path / "source", upstream())
    entry = {"input": "source", "output": "out", "base_model": str(TARGET), "causal": False}
    manifest = tmp_path / "batch.json"
    manifest.write_text(json.dumps([entry | {"validate": False}]))
    assert speculators("convert", "auto", "--manifest", manifest).status == 0
    assert config_in(tmp_path / "out")["sliding_window_non_causal"] is True
    beside = speculators("convert", "dflash", "--manifest", manifest, "--no-causal")
    assert beside.status == 2
    assert "--causal belongs in the manifest" in beside.stderr


def test_upstreams_draft_of_mixed_layers(tmp_path: Path) -> None:
    """It means that some layers are causal, and vLLM makes all of them so."""
    layer = {"layer_types": sliding(True, False, True), **WINDOW}
    source = write_draft(tmp_path / "source", upstream(layer=layer))
    with pytest.raises(ConversionError, match="--causal or --no-causal"):
        converted(source, tmp_path / "out")
    with pytest.raises(ConversionError, match="layers 0, 2 slide and are causal"):
        converted(source, tmp_path / "out", causal=False)
    out = converted(source, tmp_path / "out", causal=True)
    assert open_converted(out).config.causal == CAUSAL  # type: ignore[attr-defined]


@pytest.mark.parametrize("non_causal", [True, False])
def test_upstreams_draft_of_sliding_layers_is_clear(tmp_path: Path, *, non_causal: bool) -> None:
    layer = {"layer_types": sliding(True, True, True), **WINDOW}
    source = write_draft(
        tmp_path / "source", upstream(layer=layer, sliding_window_non_causal=non_causal)
    )
    config = open_converted(converted(source, tmp_path / "out")).config
    assert config.causal == (not non_causal,) * LAYERS  # type: ignore[attr-defined]
    with pytest.raises(ConversionError, match="contradicts"):
        converted(source, tmp_path / "none", causal=non_causal)


@pytest.mark.parametrize("non_causal", [True, False])
def test_upstreams_dspark_is_clear(tmp_path: Path, *, non_causal: bool) -> None:
    """vLLM does not read the key there, and takes sliding layers to be causal."""
    layer = {"layer_types": sliding(True, False, True), **WINDOW}
    source = write_draft(
        tmp_path / "source",
        upstream("dspark", layer=layer, sliding_window_non_causal=non_causal),
        with_markov(),
    )
    out = converted(source, tmp_path / "out")
    config = open_converted(out).config
    assert isinstance(config, DSparkConfig)
    assert config.causal == ((False,) * LAYERS if non_causal else MIXED)
    assert config.transformer_layer_config.is_causal is (False if non_causal else None)


def test_upstreams_missing_layers_are_asked_for(tmp_path: Path) -> None:
    source = write_draft(tmp_path / "source", upstream(aux_hidden_state_layer_ids=None))
    with pytest.raises(ConversionError, match=r"which of the verifier's states .* --aux-layers"):
        converted(source, tmp_path / "out", causal=False)
    assert "reads" not in inspect_checkpoint(source).facts
    out = converted(source, tmp_path / "out", causal=False, aux_layers=[2, 4, 8])
    assert config_in(out)["aux_hidden_state_layer_ids"] == [2, 4, 8]


@pytest.mark.parametrize("index", [0, 1], ids=["published", "converted"])
def test_inspect_numbers_layers_as_record_does(
    drafts: Mapping[str, tuple[Path, Path]], index: int
) -> None:
    """By the states that enter them, also of native configs, which say those that they leave."""
    for name, pair in drafts.items():
        reads = inspect_checkpoint(pair[index]).facts["reads"]
        layers = config_in(pair[1])["aux_hidden_state_layer_ids"]
        assert reads.endswith(f"entering its layers {', '.join(map(str, layers))}"), name


def test_other_layers_than_the_configs_are_told(tmp_path: Path, log: list[str]) -> None:
    out = converted(GOLDEN_FAMILIES / PLAIN, tmp_path / "out", aux_layers=[2, 4, 8])
    assert config_in(out)["aux_hidden_state_layer_ids"] == [2, 4, 8]
    assert "enter the layers [2, 4, 8], as --aux-layers says; by its config.json " in str(log)
    assert "they would be [2, 4, 6]" in str(log)
    with pytest.raises(ConversionError, match=r"^--aux-layers: .* that enter the layers \[2, 4\]"):
        converted(GOLDEN_FAMILIES / PLAIN, tmp_path / "short", aux_layers=[2, 4])


def test_what_was_converted_is_not_converted_again(
    drafts: Mapping[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match="it is converted already"):
        converted(drafts["z-lab"][1], tmp_path / "out")


def test_a_command_refuses_the_others(tmp_path: Path) -> None:
    source = write_draft(tmp_path / "source", deepspec(), with_markov())
    with pytest.raises(ConversionError, match="convert it with: speculators convert dspark"):
        convert(source, tmp_path / "out", TARGET, family=DFLASH)
    with pytest.raises(ConversionError, match="convert it with: speculators convert dflash"):
        convert(GOLDEN_FAMILIES / PLAIN, tmp_path / "out", TARGET, family=DSPARK)


# A mask token's own embedding.


def save_mask(directory: Path, value: object) -> None:
    torch.save(value, directory / MASK_FILE)


@pytest.mark.parametrize("alone", [True, False])
def test_a_mask_embedding_is_carried_along(tmp_path: Path, *, alone: bool) -> None:
    source = write_draft(tmp_path / "source", native())
    vector = torch.randn(64)
    save_mask(source, vector if alone else {"embedding": vector, "mask_token_id": 319})
    out = converted(source, tmp_path / "out")
    assert (out / MASK_FILE).read_bytes() == (source / MASK_FILE).read_bytes()
    assert config_in(out)["mask_embedding"] is True
    record = json.loads((out / "conversion.json").read_text())
    assert MASK_FILE in record["files"]
    assert MASK_FILE in record["source"]["files"]
    exported = export(out, tmp_path / "vllm", "vllm")
    assert (exported / MASK_FILE).read_bytes() == (source / MASK_FILE).read_bytes()
    with pytest.raises(ConversionError, match=r"mask embedding of its own .*z-lab's dflash cannot"):
        export(out, tmp_path / "dflash", "dflash")
    assert inspect_checkpoint(source).facts["mask token"] == "319, with an embedding of its own"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"embedding": torch.ones(64), "mask_token_id": 7}, "belongs to the mask token 7"),
        ({"embedding": torch.ones(32)}, r"the embedding has the shape \(32\)"),
        ({"embedding": torch.ones(64), "per_position": True}, "for each position"),
        ({"weight": torch.ones(64)}, "does not hold an embedding"),
    ],
)
def test_another_mask_embedding_is_refused(tmp_path: Path, value: object, message: str) -> None:
    source = write_draft(tmp_path / "source", native())
    save_mask(source, value)
    with pytest.raises(ConversionError, match=message):
        converted(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lost_mask_embedding_is_missed(tmp_path: Path) -> None:
    source = write_draft(tmp_path / "source", native())
    save_mask(source, torch.ones(64))
    out = converted(source, tmp_path / "out")
    (out / MASK_FILE).unlink()
    with pytest.raises(FormatError, match=r"lacks mask_embedding.pt, which its config.json names"):
        open_converted(out)


def test_no_engine_reads_a_mask_embedding_of_dspark(tmp_path: Path) -> None:
    source = write_draft(tmp_path / "source", deepspec(), with_markov())
    save_mask(source, torch.ones(64))
    with pytest.raises(ConversionError, match="no engine reads for a DSpark draft"):
        converted(source, tmp_path / "out")

    # A directory in the format may have one that convert did not write: it is not exported either.
    (source / MASK_FILE).unlink()
    out = converted(source, tmp_path / "out")
    save_mask(out, torch.ones(64))
    (out / "config.json").write_text(json.dumps(config_in(out) | {"mask_embedding": True}))
    for target in DSPARK.targets:
        with pytest.raises(ConversionError, match=r"has a mask embedding .* cannot comp"):
            export(out, tmp_path / target, target)
    found = inspect_checkpoint(out)
    assert (found.serving, found.exports) == ([], [])


# Exports.


def test_a_causal_draft_is_causal_to_every_reader(
    drafts: Mapping[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """SGLang and z-lab's code do not read ``dflash_config.causal``."""
    for target in ("dflash", "vllm", "sglang"):
        config = config_in(export(drafts["JetSpec"][1], tmp_path / target, target))
        assert config["is_causal"] is True
        assert "causal" not in config["dflash_config"]


@pytest.mark.parametrize("name", FOR_LLAMACPP)
def test_llamacpp_reads_what_it_read_when_it_was_run(
    drafts: Mapping[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    draft = drafts[name][1]
    check_against_the_record(name, export(draft, tmp_path / "out", "llamacpp"), config_in(draft))


def test_a_draft_that_samples_from_the_anchor_is_served_as_dspark(
    drafts: Mapping[str, tuple[Path, Path]], tmp_path: Path, log: list[str]
) -> None:
    """Which is said, but not of a draft that is DSpark's anyway."""
    export(drafts["DSpark"][1], tmp_path / "dspark", "vllm")
    assert "WARNING" not in "".join(log)
    out = drafts["DeepSpec without a Markov head"][1]
    config = config_in(export(out, tmp_path / "vllm", "vllm"))
    assert "a DSpark draft with a Markov head of rank 0" in "".join(log)
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert (config["markov_rank"], config["sample_from_anchor"]) == (0, True)
    for target in ("sglang", "dflash", "llamacpp"):
        with pytest.raises(ConversionError, match="samples from the anchor"):
            export(out, tmp_path / target, target)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("DSpark, gated", "vllm", "has a gated Markov head, which vLLM cannot compute"),
        ("DSpark, rnn", "llamacpp", "has a recurrent (rnn) Markov head"),
        ("own vocabulary", "sglang", "has a vocabulary of its own, which SGLang cannot compute"),
        ("own matrices", "dflash", "has an embedding of its own and a head of its own"),
        ("paired RoPE", "dflash", "RoPE that pairs neighbouring channels"),
        ("all layers slide", "trtllm", "has layers that slide"),
        ("JetSpec", "trtllm", "unlike others of their type"),
        ("DSpark, some layers slide", "llamacpp", "layers that are causal, and others that are"),
        ("all slide and see both ways", "llamacpp", "windows that are shorter than its blocks"),
        ("DSpark, confidence by itself", "llamacpp", "confidence head without the Markov"),
        (
            "llama3's RoPE",
            "llamacpp",
            "has llama3 RoPE scaling, which llama.cpp's convert_hf_to_gguf.py cannot compute",
        ),
    ],
)
def test_what_a_target_cannot_say_is_named(
    drafts: Mapping[str, tuple[Path, Path]], tmp_path: Path, name: str, target: str, message: str
) -> None:
    with pytest.raises(ConversionError, match=re.escape(message)):
        export(drafts[name][1], tmp_path / "out", target)


def test_config_json_is_complete(drafts: Mapping[str, tuple[Path, Path]]) -> None:
    """No reader has to guess: every key of upstream's that has a value is written."""
    config = config_in(drafts["DSpark"][1])
    known = upstream("dspark")
    assert {key for key, value in known.items() if value is not None} <= config.keys()
    assert config_of()["vocab_size"] == config["transformer_layer_config"]["vocab_size"]


def test_save_and_load_of_a_zero_wide_head(tmp_path: Path) -> None:
    """A Markov head of rank 0 that is stored all the same is none."""
    source = write_draft(
        tmp_path / "source",
        deepspec(markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=None),
    )
    tensors = tensors_of() | {
        f"markov_head.markov_w{number}.weight": torch.zeros(VOCABULARY, 0) for number in (1, 2)
    }
    save_file(tensors, source / "model.safetensors")
    found = inspect_checkpoint(source)
    assert (found.kind, found.conversion.possible) == ("dflash", True)
    assert bytes_of(converted(source, tmp_path / "out")) == bytes_of(GOLDEN_FAMILIES / PLAIN)
