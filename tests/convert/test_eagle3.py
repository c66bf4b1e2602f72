"""Converting EAGLE-3 and P-EAGLE: every publisher's layout, and what each leaves open."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3 import GOLDEN3, NAMES, PARALLEL, TARGET
from helpers import CommandLine, Tensors, config_of, entries, stored_tensors, write_shards
from speculators.batch.manifest import read_manifest
from speculators.batch.state import is_done
from speculators.convert.conversion import convert, validate
from speculators.convert.eagle3 import Eagle3Converter
from speculators.errors import (
    ConversionError,
    ManifestError,
    ValidationError,
    VerifierError,
)
from speculators.families.eagle import EAGLE
from speculators.families.eagle3 import EAGLE3
from speculators.inspection.checkpoint import inspect_checkpoint

SAILAB, SPECFORGE, MODELOPT = "sailab_llama", "qwen3_specforge", "modelopt_4aux"
NEWER, UPSTREAM, FULL = "eagle31_specforge", "speculators_norm_before_residual_true", "fullvocab"
QWEN3 = "speculators_qwen3_2layer"

Edit = Callable[[Tensors], object]


def write(
    directory: Path,
    name: str = SAILAB,
    config: Mapping[str, Any] | None = None,
    edit: Edit = lambda _: None,
    without: tuple[str, ...] = (),
) -> Path:
    """Write a golden draft with changes to its config and its tensors."""
    directory.mkdir(parents=True)
    keys = config_of(GOLDEN3 / name) | dict(config or {})
    keys = {key: value for key, value in keys.items() if key not in without}
    (directory / "config.json").write_text(json.dumps(keys))
    tensors = stored_tensors(GOLDEN3 / name)
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def converted(source: Path, output: Path, verifier: Path = TARGET, **options: Any) -> Path:
    return convert(source, output, verifier, family=EAGLE3, options=options, validate=False)


def verifier(directory: Path, **config: Any) -> Path:
    """The config of a verifier; its weights are not read without validation."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(TARGET) | config))
    return directory


def drop(*names: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return edit


def put(**named: Tensor) -> Edit:
    """Add or replace tensors; ``__`` stands for a dot."""
    return lambda tensors: tensors.update({k.replace("__", "."): v for k, v in named.items()})


def renamed(old: str, new: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        for name in [*tensors]:
            tensors[re.sub(old, new, name)] = tensors.pop(name)

    return edit


# What is written


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_there_byte_for_byte(eagle3_drafts: dict[str, Path], name: str) -> None:
    source, found = (
        load_file(GOLDEN3 / name / "model.safetensors"),
        stored_tensors(eagle3_drafts[name]),
    )
    for stored, tensor in source.items():
        copy = found.pop(stored.replace("midlayer.", "layers.0."))
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor), stored
    assert [*found] == (["t2d"] if name == MODELOPT else [])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_guess(eagle3_drafts: dict[str, Path], name: str) -> None:
    config = config_of(eagle3_drafts[name])
    layer = config["transformer_layer_config"]
    switches = {"norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"}
    assert switches | {"draft_vocab_size", "embed_requires_grad"} <= config.keys()
    assert config["tie_word_embeddings"] is False
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert layer["rope_theta"] == layer["rope_parameters"]["rope_theta"]
    assert config["eagle_aux_hidden_state_layer_ids"] == {
        MODELOPT: [2, 4, 5, 7],
        "norm_before_fc": [4, 6, 8],
    }.get(name, [2, 4, 5])
    assert layer.get("num_aux_hidden_states") == {MODELOPT: 4}.get(name)
    kind = "peagle" if name == PARALLEL else "eagle3"
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == kind
    assert config.get("mask_token_id") == {PARALLEL: 317}.get(name)
    assert config.get("target_hidden_size") == {"target_hidden_48": 48}.get(name)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("spec", "norm", "peagle"))])
def test_what_upstream_wrote_keeps_its_meaning(eagle3_drafts: dict[str, Path], name: str) -> None:
    theirs, ours = config_of(GOLDEN3 / name), config_of(eagle3_drafts[name])
    own = {"architectures", "auto_map", "speculators_version", "transformers_version"}
    for key in theirs.keys() - own - {"transformer_layer_config", "speculators_config"}:
        assert ours.get(key) == theirs[key], key
    methods = theirs["speculators_config"]["proposal_methods"]
    assert ours["speculators_config"]["proposal_methods"] == methods
    layer = ours["transformer_layer_config"]
    for key, value in theirs["transformer_layer_config"].items():
        if key in layer:
            assert layer[key] == value, key


def test_what_leaves_nothing_to_guess_is_converted_already(
    tmp_path: Path, eagle3_drafts: dict[str, Path]
) -> None:
    with pytest.raises(ConversionError, match="it is converted already"):
        converted(eagle3_drafts[UPSTREAM], tmp_path / "out")


@pytest.mark.parametrize("container", ["pytorch_model.bin", "shards"])
def test_other_containers(tmp_path: Path, eagle3_drafts: dict[str, Path], container: str) -> None:
    source = write(tmp_path / "source")
    tensors = stored_tensors(source)
    (source / "model.safetensors").unlink()
    if container == "shards":
        half = {name: tensors.pop(name) for name in [*tensors][::2]}
        write_shards(source, {"a.safetensors": half, "b.safetensors": tensors})
    else:
        torch.save(tensors, source / container)
    out = stored_tensors(converted(source, tmp_path / "out"))
    expected = stored_tensors(eagle3_drafts[SAILAB])
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["ea_layer.", "module.", "model.", "module.model."])
def test_a_prefix_does_not_hide_the_publisher(tmp_path: Path, prefix: str, name: str) -> None:
    """Of all names, or of all but those that a part of a model has beside it."""
    expected = inspect_checkpoint(GOLDEN3 / name)
    for beside in (set(), {"lm_head.weight", "d2t", "t2d"}):
        folder = tmp_path / f"beside {len(beside)}"
        folder.mkdir()
        shutil.copy(GOLDEN3 / name / "config.json", folder)
        tensors = load_file(GOLDEN3 / name / "model.safetensors")
        save_file(
            {it if it in beside else prefix + it: tensor for it, tensor in tensors.items()},
            folder / "model.safetensors",
        )
        found = inspect_checkpoint(folder)
        assert (found.kind, found.facts) == (expected.kind, expected.facts)
        assert found.conversion.possible == expected.conversion.possible


# The publishers' layouts that no golden folder has


def test_nemo_puts_model_before_its_names(tmp_path: Path) -> None:
    source = write(
        tmp_path / "source",
        UPSTREAM,
        {
            **config_of(GOLDEN3 / UPSTREAM)["transformer_layer_config"],
            "architectures": ["LlamaEagle3DraftModel"],
            "num_aux_hidden_states": 3,
        },
        renamed(r"^(?!lm_head|[dt]2[dt])", "model."),
        without=("speculators_model_type", "speculators_config", "transformer_layer_config"),
    )
    with pytest.raises(ConversionError, match="--aux-numbering"):
        converted(source, tmp_path / "none")
    out = converted(source, tmp_path / "out", aux_numbering="input")
    assert config_of(out)["norm_before_residual"] is True
    assert stored_tensors(out).keys() == stored_tensors(GOLDEN3 / UPSTREAM).keys()


def test_angelslim_numbers_the_states_that_leave(tmp_path: Path) -> None:
    source = write(tmp_path / "source", config={"aux_hidden_states_layer_ids": [1, 3, 4]})
    assert ids(converted(source, tmp_path / "out")) == [2, 4, 5]


def test_older_names_of_sglang(tmp_path: Path) -> None:
    def older(tensors: Tensors) -> None:
        for number, name in enumerate(("low", "mid", "high")):
            tensors[f"aux_norm_{name}.weight"] = tensors.pop(f"fc_norm.{number}.weight")

    config = {"use_aux_norm": True}
    source = write(tmp_path / "source", NEWER, config, older, without=("fc_norm", "norm_output"))
    out = converted(source, tmp_path / "out")
    assert torch.equal(
        stored_tensors(out)["fc_norm.1.weight"],
        stored_tensors(GOLDEN3 / NEWER)["fc_norm.1.weight"],
    )
    assert config_of(out)["fc_norm"] is True
    assert config_of(out)["norm_output"] is False


def test_specforges_parallel_drafts(tmp_path: Path) -> None:
    nested = config_of(GOLDEN3 / PARALLEL)
    flat = nested["transformer_layer_config"] | {
        "architectures": ["PEagleDraftModel"],
        "draft_vocab_size": 96,
        "norm_before_residual": True,
    }
    source = write(tmp_path / "source", PARALLEL, flat, without=tuple(nested))
    (source / "config.json").write_text(json.dumps(flat))
    with pytest.raises(ConversionError, match=r"which token stands .* with --mask-token-id\."):
        converted(source, tmp_path / "none")
    out = config_of(converted(source, tmp_path / "out", mask_token_id=317))
    assert (out["speculators_model_type"], out["mask_token_id"]) == ("peagle", 317)
    assert out["embed_requires_grad"] is True
    assert out["transformer_layer_config"]["num_hidden_layers"] == 2


def test_mask_hidden_is_one_row_however_it_is_stored(
    tmp_path: Path, eagle3_drafts: dict[str, Path]
) -> None:
    """As vLLM reads it."""
    for axes in (1, 2):
        source = write(
            tmp_path / f"source{axes}",
            PARALLEL,
            edit=lambda it, axes=axes: it.update(  # type: ignore[misc]
                mask_hidden=it["mask_hidden"].view((1,) * (axes - 1) + (-1,))
            ),
        )
        out = convert(source, tmp_path / f"out{axes}", TARGET, family=EAGLE3)
        expected = stored_tensors(eagle3_drafts[PARALLEL])
        assert torch.equal(stored_tensors(out)["mask_hidden"], expected["mask_hidden"])


def test_specforge_stores_the_tables_of_a_whole_vocabulary(tmp_path: Path) -> None:
    def tables(tensors: Tensors) -> None:
        tensors["d2t"] = torch.zeros(320, dtype=torch.int64)
        tensors["t2d"] = torch.ones(320, dtype=torch.bool)

    out = converted(write(tmp_path / "source", FULL, edit=tables), tmp_path / "out")
    assert not {"d2t", "t2d"} & stored_tensors(out).keys()
    record = json.loads((out / "conversion.json").read_text())
    assert record["left_out"].keys() == {"d2t", "t2d"}

    def wrong(tensors: Tensors) -> None:
        tables(tensors)
        tensors["d2t"][5:] = 1

    with pytest.raises(ConversionError, match="gives the token 320"):
        converted(write(tmp_path / "wrong", FULL, edit=wrong), tmp_path / "none")


# Which layers


def ids(directory: Path) -> list[int]:
    layers: list[int] = config_of(directory)["eagle_aux_hidden_state_layer_ids"]
    return layers


def test_absent_layers_of_three_states_are_the_references(tmp_path: Path, log: list[str]) -> None:
    deep = verifier(tmp_path / "deep", num_hidden_layers=32)
    assert ids(converted(write(tmp_path / "source"), tmp_path / "out", deep)) == [2, 16, 29]
    assert any("[2, 16, 29]" in line for line in log if line.startswith("WARNING"))


def test_layers_are_counted_in_the_text_part_of_a_verifier(tmp_path: Path) -> None:
    keys = {k: v for k, v in config_of(TARGET).items() if k != "architectures"}
    sees = verifier(tmp_path / "sees", text_config=keys | {"num_hidden_layers": 16})
    assert ids(converted(write(tmp_path / "source"), tmp_path / "out", sees)) == [2, 8, 13]


NESTED = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}


@pytest.mark.parametrize(
    ("name", "keys", "options", "expected"),
    [
        pytest.param(SAILAB, {}, {"aux_layers": [1, 3, 5]}, [1, 3, 5], id="given"),
        pytest.param(
            SAILAB,
            {},
            {"aux_layers": [1, 3, 5], "aux_numbering": "output"},
            [2, 4, 6],
            id="given as outputs",
        ),
        pytest.param(
            SPECFORGE, {"eagle_config": NESTED}, {}, [2, 4, 5], id="SpecForge numbers outputs"
        ),
        pytest.param(
            SAILAB,
            {"eagle_config": NESTED},
            {"aux_numbering": "input"},
            [1, 3, 4],
            id="nobody's, said to be inputs",
        ),
        pytest.param(
            SAILAB,
            {"eagle_aux_hidden_state_layer_ids": [2, 4, 8]},
            {},
            [2, 4, 8],
            id="the number of layers is no output",
        ),
        pytest.param(
            MODELOPT,
            {
                "eagle_config": {
                    "eagle_aux_hidden_state_layer_ids": [4, 5, 6, 8],
                    "parallel_draft_step": 1,
                }
            },
            {},
            [4, 5, 6, 8],
            id="the number of layers, though ModelOpt numbers outputs",
        ),
        pytest.param(
            MODELOPT,
            {},
            {"aux_numbering": "input"},
            [1, 3, 4, 6],
            id="ModelOpt's, said to be inputs",
        ),
        pytest.param(
            SAILAB,
            {"eagle_config": NESTED, "eagle_aux_hidden_state_layer_ids": [2, 4, 5]},
            {"aux_layers": [2, 4, 5]},
            [2, 4, 5],
            id="said twice, and given",
        ),
    ],
)
def test_layers(
    tmp_path: Path, name: str, keys: dict[str, Any], options: dict[str, Any], expected: list[int]
) -> None:
    source = write(tmp_path / "source", name, keys)
    assert ids(converted(source, tmp_path / "out", **options)) == expected


# EAGLE-3.1


@pytest.mark.parametrize(("answer", "expected"), [("feedback", True), ("head-only", False)])
def test_norm_output_is_what_the_user_says(tmp_path: Path, answer: str, expected: bool) -> None:
    source = write(tmp_path / "source", NEWER)
    out = converted(source, tmp_path / "out", norm_output=answer)
    assert config_of(out)["norm_output"] is expected


def test_norm_output_of_others_is_not_ambiguous(tmp_path: Path) -> None:
    source = write(tmp_path / "source", UPSTREAM, {"norm_output": True})
    assert config_of(converted(source, tmp_path / "out"))["norm_output"] is True
    with pytest.raises(ConversionError, match="--norm-output head-only contradicts"):
        converted(source, tmp_path / "none", norm_output="head-only")


# The vocabulary


@pytest.mark.parametrize("missing", ["d2t", "t2d"])
def test_either_table_follows_from_the_other(tmp_path: Path, log: list[str], missing: str) -> None:
    source = write(tmp_path / "source", edit=drop(missing))
    out = stored_tensors(converted(source, tmp_path / "out", aux_layers=[2, 4, 5]))
    assert torch.equal(out[missing], stored_tensors(GOLDEN3 / SAILAB)[missing])
    assert any(f"it has no {missing}, which is derived" in line for line in log)


def test_offsets_of_32_bits(tmp_path: Path) -> None:
    def narrow(tensors: Tensors) -> None:
        tensors["d2t"] = tensors["d2t"].int()

    out = converted(write(tmp_path / "source", edit=narrow), tmp_path / "out")
    assert torch.equal(stored_tensors(out)["d2t"], stored_tensors(GOLDEN3 / SAILAB)["d2t"])


def test_tables_are_never_rounded(tmp_path: Path) -> None:
    source = write(tmp_path / "source", edit=drop("d2t"))
    out = convert(source, tmp_path / "out", TARGET, family=EAGLE3, dtype="bfloat16")
    stored = stored_tensors(out)
    for name in ("d2t", "t2d"):
        assert torch.equal(stored[name], stored_tensors(GOLDEN3 / SAILAB)[name])
    assert stored["fc.weight"].dtype == torch.bfloat16
    assert config_of(out)["torch_dtype"] == config_of(out)["dtype"] == "bfloat16"


def shuffled(tensors: Tensors) -> None:
    tensors["d2t"] = tensors["d2t"].flip(0)


def absolute(tensors: Tensors) -> None:
    tensors["d2t"] = tensors["d2t"] + torch.arange(96)


def other_flags(tensors: Tensors) -> None:
    tensors["t2d"] = tensors["t2d"].roll(1)


def one_more_flag(tensors: Tensors) -> None:
    tensors["t2d"][(~tensors["t2d"]).nonzero()[0]] = True


LLAMA_LAYERS = config_of(GOLDEN3 / UPSTREAM)["transformer_layer_config"] | {"num_hidden_layers": 2}

# What is refused: a layout, what is said about it, and what the error has to name

CASES: dict[str, tuple[str, dict[str, Any], Edit, dict[str, Any], str]] = {
    "no embedding is invented for P-EAGLE": (
        PARALLEL,
        {},
        drop("embed_tokens.weight"),
        {},
        r"no embed_tokens\.weight",
    ),
    "no head is invented": (
        SAILAB,
        {},
        drop("lm_head.weight"),
        {},
        r"lacks lm_head\.weight.*not made up",
    ),
    "a head that is tied to one of two": (
        FULL,
        {"tie_word_embeddings": True},
        drop("lm_head.weight"),
        {},
        r"no lm_head\.weight, and .* tie_word_embeddings: its head may be its own embedding",
    ),
    "offsets that are no whole numbers": (
        SAILAB,
        {},
        put(d2t=torch.zeros(96)),
        {},
        "d2t has the type F32, where whole numbers are expected; save it as 64-bit integers",
    ),
    "a mask that is not boolean": (
        SAILAB,
        {},
        put(t2d=torch.zeros(320, dtype=torch.uint8)),
        {},
        "t2d has the type U8, where booleans are expected; save it as such",
    ),
    "biases on q, k and v alone": (
        SAILAB,
        {},
        lambda tensors: tensors.update(
            {
                f"midlayer.self_attn.{it}_proj.bias": torch.zeros(
                    tensors[f"midlayer.self_attn.{it}_proj.weight"].shape[0]
                )
                for it in "qkv"
            }
        ),
        {},
        r"lacks .*o_proj\.bias; .* or, if it never had these, serve it as it was published",
    ),
    "no tables are invented": (SAILAB, {}, drop("d2t", "t2d"), {}, "neither d2t nor t2d is there"),
    "no layer tensor is invented": (
        SAILAB,
        {},
        drop("midlayer.mlp.up_proj.weight"),
        {},
        r"lacks layers\.0\.mlp\.up_proj",
    ),
    "nothing is dropped": (
        SAILAB,
        {},
        put(extra__weight=torch.ones(2)),
        {},
        r"unknown extra\.weight",
    ),
    "descending tables": (SAILAB, {}, shuffled, {}, "does not give ascending tokens"),
    "tokens for offsets": (SAILAB, {}, absolute, {}, "It may hold the tokens themselves"),
    "tables that differ": (SAILAB, {}, other_flags, {}, "name different tokens"),
    "a flag too many": (SAILAB, {}, one_more_flag, {}, "true for 97 tokens, but the head has 96"),
    "a table of another size": (
        SAILAB,
        {},
        put(d2t=torch.zeros(95, dtype=torch.int64)),
        {},
        r"\(95\), but the head has 96",
    ),
    "a word for true": (
        UPSTREAM,
        {"norm_before_residual": "false"},
        drop(),
        {},
        r"key norm_before_residual: 'false' is not true or false",
    ),
    "a word in eagle_config": (
        MODELOPT,
        {"eagle_config": config_of(GOLDEN3 / MODELOPT)["eagle_config"] | {"norm_output": "no"}},
        drop(),
        {"aux_numbering": "output"},
        r"key eagle_config\.norm_output: 'no' is not true or false",
    ),
    "a size of nothing": (
        SAILAB,
        {"target_hidden_size": 0},
        drop(),
        {},
        r"key target_hidden_size: 0 is not a whole number over 0",
    ),
    "a number as text": (
        SAILAB,
        {"draft_vocab_size": "96"},
        drop(),
        {},
        r"key draft_vocab_size: '96' is not a whole number",
    ),
    "a layer below 0": (
        UPSTREAM,
        {"eagle_aux_hidden_state_layer_ids": [-1, 4, 5]},
        drop(),
        {},
        "has a negative number",
    ),
    "a head that is no matrix": (
        SAILAB,
        {},
        put(lm_head__weight=torch.ones(())),
        {},
        r"lm_head\.weight has the shape \(\), which is not that of a head",
    ),
    "a head without rows": (
        SAILAB,
        {},
        put(lm_head__weight=torch.ones(0, 64)),
        {},
        r"lm_head\.weight has the shape \(0, 64\), which is not that of a head",
    ),
    "a draft vocabulary that the head contradicts": (
        SAILAB,
        {"draft_vocab_size": 95},
        drop(),
        {},
        r"draft_vocab_size 95, but lm_head.*\(96, 64\)",
    ),
    "a vocabulary that the flags contradict": (
        SAILAB,
        {"vocab_size": 319},
        drop(),
        {},
        r"vocab_size 319, but t2d has the shape \(320\)",
    ),
    "a hidden size that fc contradicts": (
        SAILAB,
        {"hidden_size": 32},
        drop(),
        {},
        r"hidden_size 32, but fc\.weight.*\(64, 192\)",
    ),
    "an MLP that its size contradicts": (
        SAILAB,
        {"intermediate_size": 95},
        drop(),
        {},
        r"intermediate_size 95, but midlayer\.mlp",
    ),
    "a number of layers": (
        SAILAB,
        {"num_hidden_layers": 2},
        drop(),
        {},
        "num_hidden_layers 2, but the tensors are those of 1",
    ),
    "a head size that q_proj contradicts": (
        SPECFORGE,
        {"head_dim": 16},
        drop(),
        {},
        r"head_dim 16 .* but midlayer.*\(96, 128\)",
    ),
    "two bases of RoPE": (
        SPECFORGE,
        {"rope_theta": 10000.0},
        drop(),
        {},
        r"rope_theta 1000000\.0 and rope_theta 10000\.0",
    ),
    "a number of states": (
        MODELOPT,
        {"num_aux_hidden_states": 3},
        drop(),
        {},
        r"reads 4 states .* num_aux_hidden_states 3",
    ),
    "norms that are not there": (
        SAILAB,
        {"fc_norm": True},
        drop(),
        {},
        "says fc_norm true, but the tensors have no fc_norm",
    ),
    "norms of which one is missing": (
        NEWER,
        {},
        drop("fc_norm.2.weight"),
        {},
        "there are 2 norms fc_norm",
    ),
    "norms that are not claimed": (
        NEWER,
        {"fc_norm": False},
        drop(),
        {},
        "says fc_norm false, but the tensors have fc_norm",
    ),
    "a norm before fc that is not there": (
        SPECFORGE,
        {"eagle_config": {"norm_before_fc": True}},
        drop(),
        {},
        r"eagle_config\.norm_before_fc true, but the tensors have no input_norm",
    ),
    "biases that are not there": (
        SPECFORGE,
        {"attention_bias": True},
        drop(),
        {},
        "attention_bias true, but the tensors have no",
    ),
    "a bias that is nowhere": (
        SAILAB,
        {"bias": True},
        drop(),
        {},
        "says bias True, but neither fc",
    ),
    "layers that are counted otherwise": (
        SAILAB,
        {"eagle_aux_hidden_state_layer_ids": [2, 4, 5, 6]},
        drop(),
        {"aux_numbering": "input"},
        r"are 4 layers, but fc\.weight .* \(64, 192\)",
    ),
    "layers outside": (
        SAILAB,
        {},
        drop(),
        {"aux_layers": [2, 4, 9]},
        r"\[2, 4, 9\].* has 8 layers",
    ),
    "layers that are not sorted": (
        SAILAB,
        {},
        drop(),
        {"aux_layers": [4, 2, 5]},
        r"\[4, 2, 5\] are not distinct and in ascending order",
    ),
    "layers that are repeated": (
        SAILAB,
        {},
        drop(),
        {"aux_layers": [2, 4, 4]},
        r"\[2, 4, 4\] are not distinct and in ascending order",
    ),
    "outputs that include the number of layers": (
        SAILAB,
        {"eagle_aux_hidden_state_layer_ids": [2, 4, 8]},
        drop(),
        {"aux_numbering": "output"},
        "--aux-numbering output contradicts .* the verifier has 8 layers",
    ),
    "a numbering of nothing": (
        SAILAB,
        {},
        drop(),
        {"aux_numbering": "input"},
        "has no layers whose numbers",
    ),
    "layers that are said twice": (
        SAILAB,
        {"eagle_config": NESTED, "eagle_aux_hidden_state_layer_ids": [2, 4, 5]},
        drop(),
        {},
        r"\[2, 4, 5\] and eagle_config\.eagle_aux_hidden_state_layer_ids \[1, 3, 4\]",
    ),
    "asks for the numbering": (
        SAILAB,
        {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
        drop(),
        {},
        "Specify it with --aux-numbering",
    ),
    "asks for ModelOpt's layers": (
        MODELOPT,
        {"eagle_config": {"parallel_draft_step": 1}},
        drop(),
        {},
        "written by ModelOpt, does not say .* Specify it with --aux-layers",
    ),
    "asks for NVIDIA's layers": (SAILAB, {}, drop("t2d"), {}, "Specify it with --aux-layers"),
    "asks for the layers of upstream's converter": (
        UPSTREAM,
        {"eagle_aux_hidden_state_layer_ids": None},
        drop(),
        {},
        "Specify it with --aux-layers",
    ),
    "asks for the layers of another number of states": (
        SAILAB,
        {},
        put(fc__weight=torch.ones(64, 256)),
        {},
        "which 4 of the verifier's states .* Specify it with --aux-layers",
    ),
    "asks what norm_output means": (
        NEWER,
        {},
        drop(),
        {},
        r"two meanings.*\(feedback\).*\(head-only\)\. Specify it with --norm-output",
    ),
    "asks whether there is a final norm": (
        NEWER,
        {"norm_output": False},
        drop(),
        {},
        "no final norm at all then; no engine serves it, and it is not converted. Specify it with",
    ),
    "feedback that is denied": (
        NEWER,
        {"norm_output": False},
        drop(),
        {"norm_output": "feedback"},
        "feedback contradicts",
    ),
    "upstream without norm_before_residual": (
        UPSTREAM,
        {"norm_before_residual": None},
        drop(),
        {},
        "lacks norm_before_residual, which vLLM",
    ),
    "upstream's other layer": (
        QWEN3,
        {"transformer_layer_config": LLAMA_LAYERS},
        drop(),
        {},
        "says model_type llama, but the tensors have q_norm",
    ),
    "two tokens for a mask": (
        PARALLEL,
        {},
        drop(),
        {"mask_token_id": 5},
        "mask_token_id 317 and --mask-token-id 5",
    ),
    "a mask outside the vocabulary": (
        PARALLEL,
        {"mask_token_id": 320},
        drop(),
        {},
        "mask_token_id 320 is not a token",
    ),
    "a mask without a hidden state for it": (
        SAILAB,
        {"mask_token_id": 5},
        drop(),
        {},
        "tensors have no mask_hidden",
    ),
    "MLA": (
        SAILAB,
        {},
        put(midlayer__self_attn__kv_a_proj_with_mqa__weight=torch.ones(4, 4)),
        {},
        r"latent attention \(MLA\)",
    ),
    "eh_proj": (SAILAB, {}, put(midlayer__eh_proj__weight=torch.ones(4, 4)), {}, "an eh_proj"),
    "SpecExit": (SAILAB, {}, put(fc__weight=torch.ones(67, 192)), {}, "SpecExit"),
    "a Llama-4 MLP": (SAILAB, {"model_type": "llama4_text"}, drop(), {}, "a Llama-4 MLP"),
    "no states": (
        MODELOPT,
        {"eagle_config": {"use_aux_hidden_state": False}},
        drop("fc.weight", "layers.0.hidden_norm.weight"),
        {},
        "reads only the verifier's last state",
    ),
    "M-RoPE": (
        SAILAB,
        {"rope_scaling": {"type": "mrope", "mrope_section": [2]}},
        drop(),
        {},
        "M-RoPE",
    ),
    "a partial rotary embedding": (
        SAILAB,
        {"partial_rotary_factor": 0.5},
        drop(),
        {},
        "a partial rotary embedding",
    ),
    "a sliding window": (SAILAB, {"use_sliding_window": True}, drop(), {}, "a sliding window"),
    "quantized weights": (
        SAILAB,
        {},
        put(midlayer__mlp__up_proj__weight_scale=torch.ones(96, 1)),
        {},
        "holds quantized weights",
    ),
    "parallel heads": (
        MODELOPT,
        {},
        put(parallel_draft_heads__0__medusa_layers__0__linear__weight=torch.ones(4, 4)),
        {},
        "ModelOpt's parallel draft heads",
    ),
    "another family's option": (
        SAILAB,
        {},
        drop(),
        {"depth": 5},
        "depth does not apply to this kind of draft",
    ),
    "no layers": (SAILAB, {}, drop(), {"aux_layers": "two"}, "--aux-layers: 'two' is not a list"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, case: str) -> None:
    name, config, edit, options, expected = CASES[case]
    source = write(tmp_path / "source", name, config, edit)
    with pytest.raises(ConversionError) as caught:
        converted(source, tmp_path / "out", **options)
    assert re.search(expected, str(caught.value)), str(caught.value)
    assert str(caught.value).endswith(".")
    assert entries(tmp_path) == ["source", "source/config.json", "source/model.safetensors"]


def test_a_verifier_of_another_width(tmp_path: Path) -> None:
    wide = verifier(tmp_path / "wide", hidden_size=128)
    with pytest.raises(ConversionError, match=r"hidden size is 128: .* no target_hidden_size"):
        converted(write(tmp_path / "source"), tmp_path / "out", wide)
    with pytest.raises(ConversionError, match=r"hidden size is 64: .* target_hidden_size 48"):
        converted(write(tmp_path / "narrow", "target_hidden_48"), tmp_path / "out")


def test_an_embedding_of_another_width_is_not_borrowed(tmp_path: Path) -> None:
    """Without validation, too: such a directory would not load."""
    narrow = verifier(tmp_path / "verifier", hidden_size=48)
    edit = drop("embed_tokens.weight")
    source = write(tmp_path / "source", "target_hidden_48", edit=edit)
    with pytest.raises(ConversionError, match=r"no embedding of its own, .* width is 48, not 64"):
        converted(source, tmp_path / "out", narrow)


def test_a_verifier_of_another_vocabulary(tmp_path: Path) -> None:
    other = verifier(tmp_path / "other", vocab_size=321)
    with pytest.raises(VerifierError, match="its vocabulary is 320, but the verifier's is 321"):
        converted(write(tmp_path / "source"), tmp_path / "out", other)


# What is told


def verified_by(architecture: str) -> dict[str, Any]:
    return {"speculators_config": {"verifier": {"architectures": [architecture]}}}


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        (MODELOPT, {}, r"hidden_norm\(input_layernorm\(x\)\)"),
        (MODELOPT, {}, r"\[1, 3, 4, 6\] are numbered by the states that leave .* \[2, 4, 5, 7\]"),
        ("fc_bias", {}, r"vLLM and the PyPI project speculators silently drop fc\.bias"),
        (QWEN3, {}, r"vLLM silently drops o_proj\.bias"),
        (SAILAB, {"rope_theta": 500000.0}, "trainers always used 10000"),
        (UPSTREAM, verified_by("Gemma3ForConditionalGeneration"), "on other logits than it has"),
        (UPSTREAM, verified_by("Qwen3_5MoeForConditionalGeneration"), "on other logits"),
    ],
)
def test_told(
    tmp_path: Path, log: list[str], name: str, config: dict[str, Any], expected: str
) -> None:
    converted(write(tmp_path / "source", name, config), tmp_path / "out")
    assert any(re.search(expected, line) for line in log if line.startswith("WARNING")), log


def test_tables_that_may_never_have_been_filled(tmp_path: Path, log: list[str]) -> None:
    edit = put(d2t=torch.zeros(96, dtype=torch.int64), t2d=torch.arange(320) < 96)
    out = converted(write(tmp_path / "source", SAILAB, {}, edit), tmp_path / "out")
    assert not stored_tensors(out)["d2t"].any()
    assert any("drafts the first 96 tokens of the vocabulary" in line for line in log)


@pytest.mark.parametrize("architecture", ["Gemma3nForConditionalGeneration", "Gemma4ForCausalLM"])
def test_a_verifier_whose_norm_multiplies_by_its_weight_is_not_told(
    tmp_path: Path, log: list[str], architecture: str
) -> None:
    converted(write(tmp_path / "source", UPSTREAM, verified_by(architecture)), tmp_path / "out")
    assert not [line for line in log if "on other logits" in line]


@pytest.mark.parametrize(("dtype", "noise"), [(None, 0.0), (None, 0.2), (torch.bfloat16, 9.0)])
def test_an_embedding_that_is_not_the_verifiers_is_told(
    tmp_path: Path, log: list[str], dtype: torch.dtype | None, noise: float
) -> None:
    theirs = load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"]
    torch.manual_seed(0)
    ours = theirs + noise * theirs.std() * torch.randn_like(theirs)
    source = write(tmp_path / "source", edit=put(embed_tokens__weight=ours.to(dtype or ours.dtype)))
    converted(source, tmp_path / "out")
    said = [line for line in log if "its embed_tokens" in line]
    expected = {0.0: [], 0.2: ["is not quite"], 9.0: ["as if it were random"]}[noise]
    assert len(said) == len(expected)
    assert all(part in line for part, line in zip(expected, said, strict=True))


# What the converter of the PyPI project speculators (0.9.0) gets wrong


def test_the_dtype_is_that_of_the_tensors(tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor

    source = write(tmp_path / "source", SPECFORGE, {"dtype": "bfloat16"}, halve)
    out = converted(source, tmp_path / "out")
    assert stored_tensors(out)["fc.weight"].dtype == torch.bfloat16
    assert config_of(out)["torch_dtype"] == config_of(out)["dtype"] == "bfloat16"


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    ],
)
def test_rope_is_written_in_both_spellings(tmp_path: Path, keys: dict[str, Any]) -> None:
    out = converted(write(tmp_path / "source", SAILAB, keys), tmp_path / "out")
    layer = config_of(out)["transformer_layer_config"]
    assert layer["rope_theta"] == 5e5
    assert layer["rope_scaling"] == LLAMA3
    assert layer["rope_parameters"] == {"rope_theta": 5e5, **LLAMA3}


def test_missing_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    without = ("draft_vocab_size", "hidden_size", "intermediate_size", "vocab_size")
    out = config_of(
        converted(write(tmp_path / "source", SAILAB, config, without=without), tmp_path / "out")
    )
    assert out["draft_vocab_size"] == 96
    layer = out["transformer_layer_config"]
    assert (layer["hidden_size"], layer["intermediate_size"], layer["vocab_size"]) == (64, 96, 320)
    every = write(tmp_path / "every", "fullvocab", {"num_key_value_heads": None})
    layer = config_of(converted(every, tmp_path / "none"))["transformer_layer_config"]
    assert layer["num_key_value_heads"] == 2


def test_positions_are_the_drafts_own(tmp_path: Path) -> None:
    long = verifier(tmp_path / "long", max_position_embeddings=4096)
    out = config_of(converted(write(tmp_path / "source"), tmp_path / "out", long))
    assert out["transformer_layer_config"]["max_position_embeddings"] == 256


def test_the_residual_is_the_sources(tmp_path: Path) -> None:
    source = write(tmp_path / "source", SAILAB, {"norm_before_residual": True})
    assert config_of(converted(source, tmp_path / "out"))["norm_before_residual"] is True


def test_values_that_are_not_finite_are_found(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["norm.weight"][3] = torch.nan

    with pytest.raises(ValidationError, match=r"norm\.weight has values that are not finite"):
        convert(write(tmp_path / "source", edit=spoil), tmp_path / "out", TARGET, family=EAGLE3)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_config_is_understood(tmp_path: Path, log: list[str], name: str) -> None:
    narrow = verifier(tmp_path / "narrow", hidden_size=48) if "48" in name else TARGET
    options = {"norm_output": "feedback"} if name == NEWER else {}
    source = write(tmp_path / "source", name)
    converted(source, tmp_path / "out", narrow, **options)
    assert not [line for line in log if "is not known" in line]


# Where options can be said


def test_on_the_command_line(tmp_path: Path, speculators: CommandLine) -> None:
    source = write(tmp_path / "source", NEWER)
    arguments = ("convert", "eagle3", source, tmp_path / "out", TARGET)
    asked = speculators(*arguments)
    assert asked.status == 1
    assert asked.errors[0].endswith("Specify it with --norm-output.")
    wrong = speculators(*arguments, "--norm-output", "both")
    assert wrong.status == 2
    assert "--norm-output: 'both' is not feedback or head-only." in wrong.stderr
    run = speculators(*arguments, "--norm-output", "feedback", "--aux-layers", "2,4,6")
    assert (run.status, run.errors) == (0, [])
    assert ids(tmp_path / "out") == [2, 4, 6]
    assert config_of(tmp_path / "out")["norm_output"] is True
    assert speculators("validate", tmp_path / "out").status == 0
    again = speculators("validate", tmp_path / "out", "--source", source)
    assert (again.status, again.errors) == (0, [])


def test_auto_takes_whatever_it_is(tmp_path: Path, speculators: CommandLine) -> None:
    help_ = speculators("convert", "auto", "--help").stdout
    assert all(option.flag in help_ for option in EAGLE3.options)
    assert "--layernorms" in help_
    newer = write(tmp_path / "newer", MODELOPT)
    run = speculators("convert", "auto", newer, tmp_path / "3", TARGET, "--no-validate")
    assert (run.status, run.errors) == (0, [])
    assert config_of(tmp_path / "3")["speculators_model_type"] == "eagle3"
    older = Path(__file__).parents[1] / "golden" / "llama31_gqa_nobias"
    run = speculators("convert", "auto", older, tmp_path / "1", TARGET, "--no-validate")
    assert (run.status, run.errors) == (0, [])
    assert config_of(tmp_path / "1")["speculators_model_type"] == "eagle"
    foreign = speculators(
        "convert", "auto", older, tmp_path / "2", TARGET, "--no-validate", "--aux-layers", "2"
    )
    assert foreign.status == 1
    assert "aux_layers does not apply to this kind of draft" in foreign.errors[0]
    flagged = speculators(
        "convert", "auto", newer, tmp_path / "2", TARGET, "--no-validate", "--layernorms"
    )
    assert "has no layernorms, which layernorms asks for" in flagged.errors[0]


def test_in_a_manifest(tmp_path: Path, speculators: CommandLine) -> None:
    source = write(tmp_path / "source", NEWER)
    entry: dict[str, Any] = {
        "input": str(source), "output": "out", "base_model": str(TARGET), "validate": False,
        "norm_output": "feedback", "aux_layers": [2, 4, 6],
    }  # fmt: skip
    file = tmp_path / "batch.json"
    file.write_text(json.dumps([entry]))
    for _ in range(2):
        run = speculators("convert", "auto", "--manifest", file)
        assert (run.status, run.errors) == (0, [])
    assert "1 done before" in run.stdout
    assert ids(tmp_path / "out") == [2, 4, 6]
    (before,) = read_manifest(file, EAGLE3)
    assert is_done(before)
    changed = before.model_copy(update={"options": before.options | {"aux_layers": [2, 4, 5]}})
    changed = changed.model_copy(update={"overwrite": True})
    assert not is_done(changed)
    file.write_text(json.dumps([entry | {"norm_output": "both"}]))
    with pytest.raises(ManifestError, match="entry 1, key norm_output: 'both' is not feedback"):
        read_manifest(file, EAGLE3)
    with pytest.raises(ManifestError, match="unknown key"):
        read_manifest(file, EAGLE)


def test_in_python(tmp_path: Path) -> None:
    source = write(tmp_path / "source", NEWER)
    out = Eagle3Converter().convert(
        source,
        tmp_path / "out",
        TARGET,
        aux_layers=(2, 4, 6),
        norm_output="head-only",
        validate=False,
    )
    assert ids(out) == [2, 4, 6]
    plan = Eagle3Converter().plan(source, TARGET, norm_output="feedback")
    assert plan.options == {"norm_output": "feedback"}
    Eagle3Converter().validate(out, source)


def test_the_record_keeps_what_was_said(tmp_path: Path) -> None:
    source = write(tmp_path / "source", NEWER)
    out = converted(source, tmp_path / "out", norm_output="feedback")
    record = json.loads((out / "conversion.json").read_text())
    assert record["options"] == {"norm_output": "feedback"}
    validate(out, source)
    shutil.rmtree(source)
    validate(out)
