"""The keys of a source's config.json: computed with, known to be without effect, refused, or told.

Validation cannot see a misread key, since both sides compute with the derived config. So what is
expected here is written down, not computed by the product.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import GOLDEN, CommandLine, Tensors, config_of, write_checkpoint
from speculators.checkpoint.reader import read_checkpoint
from speculators.checkpoint.repository import open_repository
from speculators.convert.eagle import EagleConverter
from speculators.convert.plan import plan_draft
from speculators.errors import ConversionError
from speculators.families.eagle3 import EAGLE3 as FAMILY

convert = EagleConverter().convert


def layer_of(
    tmp_path: Path, verifier: Path, config: dict[str, Any], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The converted layer's config."""
    source = write_checkpoint(tmp_path / "source", config=config, without=without)
    out = convert(source, tmp_path / "out", verifier, validate=False)
    layer: dict[str, Any] = config_of(out)["transformer_layer_config"]
    return layer


def warnings(log: list[str]) -> list[str]:
    return [line for line in log if line.startswith("WARNING")]


FULL = {"rope_theta": 1e6, "rope_type": "default"}
SLIDING = {"rope_theta": 1e4, "rope_type": "default"}
BY_TYPE = {"full_attention": FULL, "sliding_attention": SLIDING}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SPELLED: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "RoPE by layer type": (
        {"rope_parameters": BY_TYPE, "layer_types": ["full_attention"]},
        ("rope_theta",),
        {"rope_theta": 1e6},
    ),
    "RoPE by layer type, of a verifier with one type": (
        {"rope_parameters": BY_TYPE, "layer_types": ["full_attention"] * 4},
        ("rope_theta",),
        {"rope_theta": 1e6},
    ),
    "RoPE by layer type, all the same": (
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": FULL}},
        ("rope_theta",),
        {"rope_theta": 1e6},
    ),
    "RoPE by layer type and scaled": (
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5, **LLAMA3},
                "sliding_attention": SLIDING,
            },
            "layer_types": ["full_attention"],
        },
        ("rope_theta",),
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "RoPE of transformers 5": (
        {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}},
        ("rope_theta",),
        {"rope_theta": 7e5},
    ),
    "the base of GPT-NeoX": ({"rotary_emb_base": 2e4}, ("rope_theta",), {"rope_theta": 2e4}),
    "hidden_activation": (
        {"hidden_activation": "gelu_pytorch_tanh"},
        ("hidden_act",),
        {"hidden_act": "gelu_pytorch_tanh"},
    ),
    "layer_norm_eps": ({"layer_norm_eps": 3e-5}, ("rms_norm_eps",), {"rms_norm_eps": 3e-5}),
    "norm_eps": ({"norm_eps": 3e-5}, ("rms_norm_eps",), {"rms_norm_eps": 3e-5}),
    "GPT-2's sizes": (
        {"n_embd": 64, "n_head": 4, "n_inner": 176, "n_positions": 99},
        ("hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"),
        {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 99},
    ),
    "text_config": (
        {"text_config": {"rms_norm_eps": 2e-5, "rope_theta": 3e5}},
        ("rms_norm_eps", "rope_theta"),
        {"rms_norm_eps": 2e-5, "rope_theta": 3e5},
    ),
    "a model object": (
        {"model": {"rms_norm_eps": 2e-5, "rope_theta": 3e5, "n_kv_heads": 2}},
        ("rms_norm_eps", "rope_theta", "num_key_value_heads"),
        {"rms_norm_eps": 2e-5, "rope_theta": 3e5, "num_key_value_heads": 2},
    ),
    "two spellings that agree": (
        {"hidden_activation": "silu", "norm_eps": 1e-5},
        (),
        {"hidden_act": "silu", "rms_norm_eps": 1e-5},
    ),
    "neutral values": (
        {
            "partial_rotary_factor": 1.0,
            "residual_multiplier": 1,
            "attention_multiplier": 0.25,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": None,
            "use_qk_norm": False,
            "no_rope_layers": [1, 1],
            "sliding_window": 4096,
            "clip_qkv": None,
        },
        (),
        {"rope_theta": 500000.0},
    ),
    "a window that is off": (
        {"sliding_window": 32, "use_sliding_window": False},
        (),
        {"max_position_embeddings": 128},
    ),
}


@pytest.mark.parametrize("case", SPELLED)
def test_a_key_is_read_however_it_is_spelled(
    tmp_path: Path, verifier: Path, log: list[str], case: str
) -> None:
    config, without, expected = SPELLED[case]
    layer = layer_of(tmp_path, verifier, config, without)
    assert {key: layer[key] for key in expected} == expected
    assert [it for it in warnings(log) if "vLLM does not serve it" not in it] == []


STOPPED: dict[str, tuple[dict[str, Any], str]] = {
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "partial rotary of transformers 5": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        r"rope_parameters\.partial_rotary_factor 0.5",
    ),
    "partial rotary of GPT-NeoX": ({"rotary_pct": 0.25}, "rotary_pct 0.25"),
    "Granite": (
        {"residual_multiplier": 0.22, "attention_multiplier": 0.0078125},
        r"residual_multiplier 0\.22, attention_multiplier 0\.0078125",
    ),
    "in a text_config": ({"text_config": {"embedding_multiplier": 12}}, r"text_config\.embedding_"),
    "MiniCPM": ({"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}, "scale_depth 1.4"),
    "Gemma 2": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    "Gemma's scale": ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
    "norms without weights": ({"use_qk_norm": True}, "use_qk_norm True"),
    "clipping": ({"clip_qkv": 8.0}, "clip_qkv 8.0"),
    "Cohere": ({"logit_scale": 0.0625}, "logit_scale 0.0625"),
    "no RoPE in a layer": ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
    "mrope": (
        {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
        r"rope_scaling\.mrope_section",
    ),
    "mrope as a type": ({"rope_scaling": {"type": "mrope"}}, "type 'mrope' is not known"),
    "longrope": (
        {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        "type 'longrope' is not known",
    ),
    "factors of longrope": (
        {"rope_scaling": {"type": "default", "long_factor": [2.0]}},
        r"rope_scaling\.long_factor",
    ),
    "a window": ({"sliding_window": 32}, "sliding_window: the draft's layer may see no further"),
    "a window by layer type": (
        {"sliding_window": 32, "layer_types": ["sliding_attention"]},
        "may see no further back than 32",
    ),
    "an unknown type of layer": ({"layer_types": ["linear_attention"]}, "'linear_attention'"),
    "a base of other layers, and no layer type": (
        {"rope_local_base_freq": 1e4},
        "rope_local_base_freq",
    ),
    "two activations": (
        {"hidden_activation": "gelu"},
        "hidden_act 'silu' and hidden_activation 'gelu'",
    ),
    "two sizes": ({"text_config": {"hidden_size": 128}}, r"hidden_size 64 and text_config\.hidden"),
    "two bases": (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        "rope_theta 10000.0 in rope_parameters and 500000.0",
    ),
    "two scalings": (
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        "another RoPE each",
    ),
}


@pytest.mark.parametrize("case", STOPPED)
def test_a_key_that_changes_results_stops_the_conversion(
    tmp_path: Path, verifier: Path, case: str
) -> None:
    config, pattern = STOPPED[case]
    source = write_checkpoint(tmp_path / "source", config=config)
    with pytest.raises(ConversionError, match=pattern):
        convert(source, tmp_path / "out", verifier, validate=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer_types", [None, ["full_attention", "sliding_attention"]])
def test_rope_by_layer_type_needs_the_type(
    tmp_path: Path, verifier: Path, layer_types: list[str] | None
) -> None:
    source = write_checkpoint(
        tmp_path / "source",
        config={"rope_parameters": BY_TYPE, "layer_types": layer_types},
        without=("rope_theta",),
    )
    with pytest.raises(ConversionError, match=r"rope_parameters gives RoPE by the type of a layer"):
        convert(source, tmp_path / "out", verifier, validate=False)


TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"warp_factor": 9}, "the config's warp_factor means"),
    "an unknown key inside": ({"text_config": {"warp": 9}}, r"text_config.warp means"),
    "an unknown parameter of RoPE": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "warp": 9}},
        "rope_scaling.warp means",
    ),
    "a bias of attention": (
        {"attention_bias": True},
        "attention_bias: true, the tensors say false",
    ),
    "a bias of the MLP": ({"mlp_bias": True}, "mlp_bias: true, the tensors say false"),
    "a quantization": (
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantization_config (awq), but the tensors are not quantized",
    ),
    "another model": ({"model_type": "gemma2"}, "the config says model_type 'gemma2'"),
    "two lengths": ({"seq_length": 64}, "max_position_embeddings 128 and seq_length 64"),
    "RoPE by type beside a base": ({"rope_parameters": BY_TYPE}, "rope_theta is"),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_key_of_which_nothing_is_known_is_told(
    tmp_path: Path, verifier: Path, log: list[str], case: str
) -> None:
    config, clause = TOLD[case]
    layer_of(tmp_path, verifier, config)
    assert len(warnings(log)) >= 1
    assert any(clause in line for line in warnings(log)), warnings(log)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert any(clause in line for line in record["discrepancies"])


def test_a_dry_run_does_not_say_that_an_unused_key_is_written(
    tmp_path: Path, verifier: Path, speculators: CommandLine
) -> None:
    source = write_checkpoint(tmp_path / "source", config={"rope_parameters": BY_TYPE})
    run = speculators("convert", "eagle", source, tmp_path / "out", verifier, "--dry-run")
    line = next(line for line in run.stdout.splitlines() if "rope_parameters:" in line)
    assert "it is given by the type of a layer; rope_theta is used" in line
    assert "is written as" not in line


# Stored tables of RoPE


def frequencies(base: float) -> torch.Tensor:
    return base ** (-torch.arange(0, 16, 2).float() / 16)


def angles(base: float) -> torch.Tensor:
    return torch.outer(torch.arange(128).float(), frequencies(base)).repeat(1, 2)


TABLES: dict[str, Callable[[float], torch.Tensor]] = {
    "layers.0.self_attn.rotary_emb.inv_freq": frequencies,
    "rotary_emb.inv_freq": lambda base: frequencies(base).half(),
    "rotary_emb.original_inv_freq": frequencies,
    "layers.0.self_attn.rotary_emb.cos_cached": lambda base: angles(base).cos()[None, None],
    "rotary.sin_cached": lambda base: angles(base).sin().bfloat16(),
    "rotary_emb.cos_sin_cache": lambda base: torch.cat(
        (angles(base)[:, :8].cos(), angles(base)[:, :8].sin()), -1
    ),
    "rope.freqs": frequencies,
    "freqs_cis": lambda base: torch.polar(torch.ones(128, 8), angles(base)[:, :8]),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("base", [500000.0, 10000.0])
def test_a_stored_table_of_rope_is_evidence(
    tmp_path: Path, verifier: Path, name: str, base: float
) -> None:
    """The config gives the base 500000."""

    def add(tensors: Tensors) -> None:
        tensors[name] = TABLES[name](base).contiguous()

    source = write_checkpoint(tmp_path / "source", edit=add)
    if base == 500000.0:
        out = convert(source, tmp_path / "out", verifier, validate=False)
        left_out = json.loads((out / "conversion.json").read_text())["left_out"]
        assert left_out == {name: "it is computed from the config"}
    else:
        with pytest.raises(ConversionError, match=r"is not what .* gives \(RoPE of base 500000"):
            convert(source, tmp_path / "out", verifier, validate=False)


def test_a_wrong_table_says_which_base_it_has(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(
        tmp_path / "source", edit=lambda t: t.update({"rotary_emb.inv_freq": frequencies(1e4)})
    )
    with pytest.raises(ConversionError, match="those of base 10000:"):
        convert(source, tmp_path / "out", verifier, validate=False)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_table_with_linear_scaling(tmp_path: Path, verifier: Path, factor: float) -> None:
    """The reference keeps the unscaled frequencies, and divides positions; others divide these."""
    source = write_checkpoint(
        tmp_path / "source",
        config={"rope_scaling": {"type": "linear", "factor": 4.0}},
        edit=lambda t: t.update({"rotary_emb.inv_freq": frequencies(1e4) / factor}),
    )
    assert convert(source, tmp_path / "out", verifier, validate=False).is_dir()


def test_a_table_that_is_not_computed_is_told(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    source = write_checkpoint(
        tmp_path / "source",
        config={"rope_scaling": {"type": "yarn", "factor": 4.0}},
        edit=lambda t: t.update({"rotary_emb.inv_freq": frequencies(5e5)}),
    )
    convert(source, tmp_path / "out", verifier, validate=False)
    assert any("rotary_emb.inv_freq was left out unchecked" in line for line in warnings(log))


EAGLE3 = GOLDEN.parent / "golden-eagle3"


@pytest.mark.parametrize(
    "draft", sorted(path.parent.name for path in EAGLE3.glob("[!_]*/config.json"))
)
def test_what_a_family_reads_itself_is_not_told_as_unknown(draft: str) -> None:
    checkpoint = read_checkpoint(open_repository(EAGLE3 / draft))
    plan = plan_draft(FAMILY, checkpoint)
    assert not [clause for clause in plan.derived.discrepancies if "is not known" in clause]


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("initializer_range", math.nan, "initializer_range: nan"),
        ("rms_norm_eps", math.inf, "rms_norm_eps"),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 2.0, "beta_fast": -math.inf},
            "rope_scaling.beta_fast: -inf",
        ),
    ],
)
def test_a_number_that_json_cannot_hold(
    tmp_path: Path, verifier: Path, key: str, value: object, path: str
) -> None:
    """It is never written as null."""
    source = write_checkpoint(tmp_path / "source", config={key: value})
    with pytest.raises(
        ConversionError, match=rf"config\.json, key {re.escape(path)}.* finite number"
    ):
        convert(source, tmp_path / "out", verifier, validate=False)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            {
                "rope_theta": 500000.0,
                "rope_type": "default",
                "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
            },
            r"gives rope_theta 500000\.0 beside 1000000\.0 by the type of a layer",
        ),
        (
            {"full_attention": None, "sliding_attention": {"rope_theta": 10000.0}},
            "layer_types does not say",
        ),
    ],
)
def test_rope_that_is_given_twice_or_by_half(
    tmp_path: Path, verifier: Path, parameters: dict[str, object], words: str
) -> None:
    source = write_checkpoint(
        tmp_path / "source", config={"rope_parameters": parameters}, without=("rope_theta",)
    )
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "out", verifier, validate=False)


def test_a_byte_order_mark_is_skipped(tmp_path: Path, verifier: Path) -> None:
    """Editors write one, and RFC 8259 lets a parser ignore it."""
    source = write_checkpoint(tmp_path / "source", config={"rope_theta": 70000.0})
    config = source / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    out = convert(source, tmp_path / "out", verifier, validate=False)
    assert config_of(out)["transformer_layer_config"]["rope_theta"] == 70000
