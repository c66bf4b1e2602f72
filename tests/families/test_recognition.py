"""Every family of drafts is told from all others: by names and shapes, whatever the config says.

The names are those of published checkpoints; each case that could be taken for another says so.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dflash import GOLDEN_FAMILIES, PLAIN, tensors_of
from helpers import GOLDEN, GOLDEN_NAMES
from speculators.checkpoint.tensor import TensorInfo
from speculators.errors import ConversionError
from speculators.families.recognition import Recognition, recognise
from speculators.families.registry import signatures
from speculators.families.signature import ENGINES
from speculators.inspection.checkpoint import inspect_checkpoint

H, V, K, STATES, RANK, INNER = 64, 320, 32, 3, 8, 128

Shapes = dict[str, tuple[int, ...]]


def layer(prefix: str = "layers.0.", inputs: int = H, *, normed: bool = False) -> Shapes:
    """A decoder layer without norms before its attention."""
    shapes: Shapes = {
        "self_attn.q_proj.weight": (H, inputs),
        "self_attn.k_proj.weight": (K, inputs),
        "self_attn.v_proj.weight": (K, inputs),
        "self_attn.o_proj.weight": (H, H),
        "mlp.gate_proj.weight": (INNER, H),
        "mlp.up_proj.weight": (INNER, H),
        "mlp.down_proj.weight": (H, INNER),
        "post_attention_layernorm.weight": (H,),
    }
    if normed:
        shapes |= {"self_attn.q_norm.weight": (16,), "self_attn.k_norm.weight": (16,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def dflash(states: int = STATES, layers: int = 2) -> Shapes:
    shapes: Shapes = {
        "fc.weight": (H, states * H),
        "hidden_norm.weight": (H,),
        "norm.weight": (H,),
    }
    for number in range(layers):
        prefix = f"layers.{number}."
        shapes |= layer(prefix, normed=True) | {f"{prefix}input_layernorm.weight": (H,)}
    return shapes


def model(layers: int = 3, prefix: str = "model.") -> Shapes:
    """A language model."""
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (V, H),
        f"{prefix}norm.weight": (H,),
        "lm_head.weight": (V, H),
    }
    for number in range(layers):
        name = f"{prefix}layers.{number}."
        shapes |= layer(name, normed=True) | {f"{name}input_layernorm.weight": (H,)}
    return shapes


def eagle3(prefix: str = "midlayer.", states: int = STATES) -> Shapes:
    return {
        "fc.weight": (H, states * H),
        **layer(prefix, 2 * H),
        f"{prefix}hidden_norm.weight": (H,),
        f"{prefix}input_layernorm.weight": (H,),
        "norm.weight": (H,),
        "lm_head.weight": (V, H),
    }


EAGLE: Shapes = {"fc.weight": (H, 2 * H), **layer()}
MARKOV: Shapes = {
    "markov_head.markov_w1.weight": (V, RANK),
    "markov_head.markov_w2.weight": (V, RANK),
}
SELECTOR: Shapes = {
    "candidate_selector.predecessor_codebook": (V, RANK),
    "candidate_selector.successor_codebook": (V, RANK),
    "candidate_selector.hidden_projection.weight": (RANK, H),
    "layers.0.attention_conv.base_kernel": (2, 2, H),
    "layers.0.attention_conv.kernel_projection.weight": (16, H),
}
QWEN_MTP: Shapes = {
    "mtp.fc.weight": (H, 2 * H),
    "mtp.pre_fc_norm_embedding.weight": (H,),
    "mtp.pre_fc_norm_hidden.weight": (H,),
    "mtp.norm.weight": (H,),
    **layer("mtp.layers.0.", normed=True),
    "mtp.layers.0.input_layernorm.weight": (H,),
}
DEEPSEEK_DSPARK: Shapes = {
    "mtp.0.main_proj.weight": (H, 3 * H),
    "mtp.0.main_norm.weight": (H,),
    "mtp.1.attn.wq_a.weight": (H, H),
    "mtp.2.markov_head.markov_w1.weight": (V, RANK),
    "mtp.2.confidence_head.proj.weight": (1, H + RANK),
}


def deepseek_mtp(number: int) -> Shapes:
    prefix = f"model.layers.{number}."
    return {
        f"{prefix}eh_proj.weight": (H, 2 * H),
        f"{prefix}enorm.weight": (H,),
        f"{prefix}hnorm.weight": (H,),
        f"{prefix}shared_head.norm.weight": (H,),
        f"{prefix}input_layernorm.weight": (H,),
        **layer(prefix),
    }


def quantized(shapes: Shapes) -> Shapes:
    """Matrices split into packed weights and scales."""
    split: Shapes = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            split |= {f"{name}_packed": shape, f"{name}_scale": shape[:1]}
        else:
            split[name] = shape
    return split


MUSES = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}

CASES: dict[str, tuple[str, Shapes, dict[str, object]]] = {
    "DFlash": ("dflash", dflash(), {}),
    "DFlash of two states, whose fc is EAGLE-1's": ("dflash", dflash(2), {}),
    "DFlash of one layer": ("dflash", dflash(layers=1), {}),
    "DFlash in another file's names": (
        "dflash",
        {f"model.{name}": shape for name, shape in dflash().items()},
        {},
    ),
    "DFlash with a vocabulary, as EAGLE-3": (
        "dflash",
        dflash() | {"d2t": (40,), "t2d": (V,), "lm_head.weight": (40, H)},
        {},
    ),
    "DFlash with an embedding, as a model": (
        "dflash",
        dflash() | {"embed_tokens.weight": (V, H), "lm_head.weight": (V, H)},
        {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 5},
    ),
    "DFlash, quantized": ("dflash", quantized(dflash()), {}),
    "DSpark's architecture without a Markov head": (
        "dflash",
        dflash(),
        {"architectures": ["Qwen3DSparkModel"], "markov_rank": 0},
    ),
    "a Markov head of rank 0": (
        "dflash",
        dflash() | dict.fromkeys(MARKOV, (V, 0)),
        {"architectures": ["Qwen3DSparkModel"], "markov_rank": 0},
    ),
    "DFlash 2": ("dflash2", dflash() | SELECTOR, {}),
    "DSpark": ("dspark", dflash() | MARKOV, {}),
    "DSpark of SpecForge": (
        "dspark",
        dflash() | {f"logit_head.{name}": shape for name, shape in MARKOV.items()},
        {},
    ),
    "DSpark of ModelOpt": (
        "dspark",
        dflash() | {name.removeprefix("markov_head."): shape for name, shape in MARKOV.items()},
        {},
    ),
    "DSpark of Gemma 4": (
        "dspark-gemma4",
        dflash() | MARKOV | {"layers.0.pre_feedforward_layernorm.weight": (H,)},
        {"architectures": ["Gemma4DSparkModel"]},
    ),
    "DSpark of Kimi K3": (
        "dspark-kimi-k3",
        MARKOV
        | {
            "context_proj.weight": (H, 3 * H),
            "context_norm.weight": (H,),
            "layers.0.self_attn.kv_a_proj_with_mqa.weight": (K, H),
            "layers.0.input_layernorm.weight": (H,),
            "layers.1.input_layernorm.weight": (H,),
            "final_norm.weight": (H,),
        },
        {"architectures": ["K3DSparkModel"]},
    ),
    "DSpark of Muse Spark": (
        "dspark-muse-spark",
        MARKOV
        | {
            "fc.weight": (H, 3 * H),
            "hidden_norm.weight": (H,),
            "norm.weight": (H,),
            "layers.0.self_attn.pre_qkv_proj_norm.weight": (H,),
            "layers.0.post_attn_norm.weight": (H,),
            "layers.0.pre_ffn_norm.weight": (H,),
            "lm_head.weight": (40, H),
            "d2t": (40,),
        },
        {"architectures": ["MuseSparkDSparkModel"]},
    ),
    "DSpark of MiniMax": (
        "dspark-minimax",
        {
            f"language_model.model.dspark.{name}": shape
            for name, shape in (
                MARKOV
                | {
                    "fc.weight": (H, 3 * H),
                    "hidden_norm.weight": (H,),
                    "final_norm.weight": (H,),
                    "layers.0.decoder_layer.self_attn.q_proj.weight": (H, H),
                    "layers.0.decoder_layer.input_layernorm.weight": (H,),
                }
            ).items()
        },
        {"architectures": ["DSparkMiniMaxDraftModel"]},
    ),
    "DSpark of DeepSeek-V4, alone": ("dspark-deepseek", DEEPSEEK_DSPARK, {}),
    "DSpark of DeepSeek-V4, in its verifier": (
        "dspark-deepseek",
        model() | DEEPSEEK_DSPARK,
        {"architectures": ["DeepseekV4ForCausalLM"], "num_nextn_predict_layers": 3},
    ),
    "Laguna": (
        "dflash-laguna",
        dflash() | {"layers.0.self_attn.g_proj.weight": (4, H), "aux_hidden_norms.0.weight": (H,)},
        {},
    ),
    "DFlare": ("dflare", dflash() | {"layers.0.self_attn.k_proj_target.weight": (K, H)}, {}),
    "Domino": (
        "domino",
        dflash() | {"prefix_gru.weight_ih_l0": (3 * RANK, H), "embed_proj.0.weight": (RANK, H)},
        {"dflash_config": {"projector_type": "domino"}},
    ),
    "XPress": ("xpress", dflash() | {"xpress_head.w1.weight": (V, RANK)}, {}),
    "XPress of upstream": (
        "speculators-xpress",
        dflash() | {"refiner_head.readout.weight": (V, RANK)},
        {"speculators_model_type": "xpress"},
    ),
    "LiLiCorr": ("lilicorr", dflash() | SELECTOR | {"lilicorr.w.weight": (V, RANK)}, {}),
    "Muse": (
        "muse-assistant",
        {MUSES.get(name, name): shape for name, shape in dflash().items()},
        {},
    ),
    "EAGLE-3": ("eagle3", eagle3(), {}),
    "EAGLE-3 of two layers with norms on queries": (
        "eagle3",
        eagle3("layers.0.") | layer("layers.1.", normed=True),
        {},
    ),
    "P-EAGLE": (
        "eagle3",
        eagle3("layers.0.") | {"mask_hidden": (1, 1, 3 * H)},
        {"ptd_token_id": 1},
    ),
    "EAGLE-3 with latent attention": (
        "eagle3-mla",
        eagle3("layers.0.")
        | {
            "layers.0.self_attn.q_a_proj.weight": (K, 2 * H),
            "layers.0.self_attn.kv_a_proj_with_mqa.weight": (K, 2 * H),
            "layers.0.self_attn.kv_b_proj.weight": (H, K),
        },
        {"architectures": ["Eagle3DeepseekV2ForCausalLM"], "kv_lora_rank": K},
    ),
    "EAGLE-3 of TensorRT-LLM": (
        "eagle3-eh-proj",
        eagle3() | {"midlayer.eh_proj.weight": (H, 2 * H), "midlayer.enorm.weight": (H,)},
        {"eagle_config": {"eh_proj_before_attn": True}},
    ),
    "EAGLE-3 with parallel heads": (
        "eagle3-parallel-heads",
        eagle3() | {"parallel_draft_heads.0.medusa_layers.0.linear.weight": (H, H)},
        {},
    ),
    "EAGLE-1": ("eagle", EAGLE, {}),
    "EAGLE-1 with norms": (
        "eagle-with-norms",
        EAGLE | {"layers.0.input_layernorm.weight": (H,), "norm.weight": (H,)},
        {},
    ),
    "EAGLE-1 of NeMo, with a bias": (
        "eagle-with-norms",
        EAGLE | {"fc.bias": (H,), "layers.0.input_layernorm.weight": (H,), "norm.weight": (H,)},
        {},
    ),
    "EAGLE-1 of Cohere": (
        "cohere-eagle",
        {
            f"model.{name}": shape
            for name, shape in EAGLE.items()
            if "post_attention_layernorm" not in name
        }
        | {
            "model.fc.bias": (H,),
            "model.layers.0.input_layernorm.weight": (H,),
            "model.norm.weight": (H,),
        },
        {"architectures": ["CohereForCausalLM"]},
    ),
    "EAGLE-1 of DeepSeek": (
        "deepseek-eagle",
        EAGLE
        | {
            "enorm.weight": (H,),
            "hnorm.weight": (H,),
            "norm.weight": (H,),
            "layers.0.input_layernorm.weight": (H,),
            "layers.0.self_attn.kv_a_proj_with_mqa.weight": (K, H),
        },
        {"architectures": ["EagleDeepSeekMTPModel"]},
    ),
    "EAGLE-1 with norms on queries": ("eagle-qk-norms", EAGLE | layer(normed=True), {}),
    "MTP of Qwen": ("mtp-qwen", QWEN_MTP, {"model_type": "qwen3_next"}),
    "MTP of Qwen with what it borrows": (
        "mtp-qwen",
        QWEN_MTP
        | {
            "model.embed_tokens.weight": (V, H),
            "model.norm.weight": (H,),
            "lm_head.weight": (V, H),
        },
        {},
    ),
    "MTP of Qwen, quantized": ("mtp-qwen", quantized(QWEN_MTP), {}),
    "MTP of Qwen in its verifier": ("language-model", model() | QWEN_MTP, {}),
    "MTP of Qwen in a verifier of several parts": (
        "language-model",
        model(prefix="model.language_model.") | QWEN_MTP,
        {},
    ),
    "MTP of upstream": (
        "speculators-mtp",
        {
            "mtp_layers.0.input_proj.weight": (H, 2 * H),
            "mtp_layers.0.token_layernorm.weight": (H,),
            "verifier_lm_head.weight": (V, H),
        },
        {"speculators_model_type": "mtp"},
    ),
    "MTP of DeepSeek": ("mtp-deepseek", deepseek_mtp(61), {}),
    "MTP of DeepSeek from 0": ("mtp-deepseek-layer-0", deepseek_mtp(0), {"num_hidden_layers": 1}),
    "MTP of DeepSeek in its verifier": ("language-model", model() | deepseek_mtp(3), {}),
    "MTP of MiMo": (
        "mtp-mimo",
        {
            "model.mtp_layers.0.input_proj.weight": (H, 2 * H),
            "model.mtp_layers.0.token_layernorm.weight": (H,),
            "model.mtp_layers.0.hidden_layernorm.weight": (H,),
            **layer("model.mtp_layers.0."),
        },
        {},
    ),
    "MTP of MiMo-V2": (
        "mtp-mimo-v2",
        {
            "model.mtp.layers.0.eh_proj.weight": (H, 2 * H),
            "model.mtp.layers.0.enorm.weight": (H,),
            "model.mtp.layers.0.pre_mlp_layernorm.weight": (H,),
        },
        {},
    ),
    "MTP of LongCat": (
        "mtp-longcat",
        {
            "model.mtp.layers.0.eh_proj.weight": (H, 2 * H),
            "model.mtp.layers.0.enorm.m.weight": (H,),
            "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight": (INNER, H),
            "model.mtp.embed_tokens.weight": (V, H),
        },
        {},
    ),
    "MTP of Ernie": (
        "mtp-ernie",
        {
            "model.mtp_emb_norm.0.weight": (H,),
            "model.mtp_hidden_norm.0.weight": (H,),
            "model.mtp_linear_proj.0.weight": (H, 2 * H),
            **layer("model.mtp_block.0."),
        },
        {},
    ),
    "MTP of Nemotron-H": (
        "mtp-nemotron-h",
        {
            "mtp.layers.0.eh_proj.weight": (H, 2 * H),
            "mtp.layers.0.enorm.weight": (H,),
            "mtp.layers.0.mixer.in_proj.weight": (H, H),
        },
        {},
    ),
    "MTP of IQuest Q1": (
        "mtp-iquest-q1",
        {"target_final_norm.weight": (H,), "mtp.0.eh_proj.weight": (H, 2 * H)},
        {},
    ),
    "UNO": (
        "uno",
        {
            f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": (8, H)
            for layer in range(2)
            for part in "AB"
        },
        {},
    ),
    "MTP of something else": ("mtp", {"mtp.0.something.weight": (H, H)}, {}),
    "Gemma's assistant": (
        "gemma-assistant",
        {
            "pre_projection.weight": (H, 2 * INNER),
            "post_projection.weight": (INNER, H),
            "model.layers.0.self_attn.q_proj.weight": (H, H),
            "model.layers.0.input_layernorm.weight": (H,),
            "model.layers.1.self_attn.q_proj.weight": (H, H),
        },
        {"model_type": "gemma4_assistant"},
    ),
    "PARD": ("pard", model(), {"architectures": ["LlamaForCausalLM"], "pard_token": 128002}),
    "a language model": ("language-model", model(), {"architectures": ["LlamaForCausalLM"]}),
    "Medusa-1": (
        "medusa",
        {"0.0.linear.weight": (H, H), "0.0.linear.bias": (H,), "0.1.weight": (V, H)},
        {"medusa_num_heads": 1},
    ),
    "Medusa-1 of TensorRT-LLM": (
        "medusa",
        {
            "medusa_heads.0.medusa_layers.0.linear.weight": (H, H),
            "medusa_heads.0.lm_head.weight": (V, H),
        },
        {},
    ),
    "Medusa-2, in its model": (
        "medusa-in-model",
        model() | {"medusa_head.0.0.linear.weight": (H, H), "medusa_head.0.1.weight": (V, H)},
        {},
    ),
    "Hydra": (
        "hydra",
        {"hydra_mlp.0.0.linear.weight": (H, 2 * H), "hydra_lm_head.0.weight": (V, H)},
        {"hydra_num_heads": 4},
    ),
    "an MLP speculator": (
        "mlp-speculator",
        {"speculator.emb.0.weight": (V, H), "speculator.head.0.weight": (V, H)},
        {"model_type": "mlp_speculator"},
    ),
    "a vision model called Eagle": (
        "language-model",
        model(prefix="language_model.model."),
        {"architectures": ["Eagle2_5_VLForConditionalGeneration"]},
    ),
}


def recognised(shapes: Shapes, config: dict[str, object]) -> Recognition:
    tensors = {
        name: TensorInfo(name, "I64" if name == "d2t" else "F32", shape, Path("weights"), 0)
        for name, shape in shapes.items()
    }
    return recognise(config, tensors)


@pytest.mark.parametrize("name", CASES)
def test_it_is_told_from_all_others(name: str) -> None:
    kind, shapes, config = CASES[name]
    found = recognised(shapes, config)
    assert found.signature is not None
    assert found.signature.kind == kind


@pytest.mark.parametrize("name", CASES)
def test_the_config_alone_never_overrules_tensors(name: str) -> None:
    """What another family's config says changes nothing, unless a kind is defined by it."""
    kind, shapes, config = CASES[name]
    if kind in {"pard", "speculators-mtp", "speculators-xpress"}:
        return
    others = {"architectures": ["DFlashDraftModel"], "model_type": "eagle", "num_hidden_layers": 1}
    found = recognised(shapes, config | others)
    assert found.signature is not None
    assert found.signature.kind == kind


def test_every_kind_is_tried() -> None:
    tried = {kind for kind, _, _ in CASES.values()}
    elsewhere = {
        "speculators", "draft-in-model", "griffin", "minicpm-eagle", "matrix", "llama4-eagle",
        "several-layers", "eagle-grouped-heads", "mistral-eagle",
    }  # fmt: skip
    assert {signature.kind for signature, _ in signatures()} == tried | elsewhere


def test_every_draft_says_who_serves_it_and_what_to_do() -> None:
    no_drafts = {"speculators", "language-model", "draft-in-model", "matrix"}
    for signature, family in signatures():
        assert (signature.serving is None) == (signature.kind in no_drafts), signature.kind
        assert (signature.advice is None) == (family is not None), signature.kind
        engines = [it.engine for it in signature.serving or ()]
        assert set(engines) <= set(ENGINES)
        assert len(set(engines)) == len(engines)


def test_golden_drafts_of_other_families_stay_what_they_are() -> None:
    for name in GOLDEN_NAMES:
        assert inspect_checkpoint(GOLDEN / name).kind == "eagle"


def test_a_list_of_tokens_beside_a_draft_is_told_of(tmp_path: Path) -> None:
    """FR-Spec publishes an EAGLE-1 draft, and beside it the tokens that it may draft."""
    shutil.copytree(GOLDEN / GOLDEN_NAMES[0], tmp_path / "draft")
    (tmp_path / "draft" / "freq_32768.pt").write_bytes(b"")
    (note,) = (it for it in inspect_checkpoint(tmp_path / "draft").notes if "freq_32768" in it)
    assert "--speculative-token-map" in note


def test_inspect_and_refusals_say_which_engines_serve_it(tmp_path: Path) -> None:
    tensors = tensors_of() | {"prefix_gru.weight_ih_l0": torch.ones(24, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((GOLDEN_FAMILIES / PLAIN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(tmp_path)
    assert (found.kind, found.conversion.possible) == ("domino", False)
    assert [it.engine for it in found.serving or ()] == ["SGLang"]
    with pytest.raises(ConversionError, match=r"It is served by SGLang \(DFLASH\)\."):
        raise ConversionError(found.conversion.why_not or "")
