"""Small verifiers with an MTP of each type, written by name: nothing of them is computed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers import Tensors, write_shards

__all__ = [
    "GOLDEN_MTP",
    "VERIFIERS",
    "Model",
    "bytes_of",
    "mtp_of",
    "stacked",
    "write_verifier",
]

GOLDEN_MTP = Path(__file__).parent / "golden-families" / "mtp_qwen3_next"

H, W, V, EXPERTS = 16, 8, 32, 3
"""Hidden size, width of an expert, vocabulary, experts."""

NORMS = {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
MLP = {
    f"mlp.{it}_proj.weight": (H, 2 * W) if it == "down" else (2 * W, H)
    for it in ("gate", "up", "down")
}
EACH = {
    f"mlp.experts.{expert}.{matrix}_proj.weight": (H, W) if matrix == "down" else (W, H)
    for expert in range(EXPERTS)
    for matrix in ("gate", "up", "down")
}
FUSED = {
    "mlp.experts.gate_up_proj": (EXPERTS, 2 * W, H),
    "mlp.experts.down_proj": (EXPERTS, H, W),
}
ROUTER = {"mlp.gate.weight": (EXPERTS, H)}
GQA = {
    "self_attn.q_proj.weight": (2 * H, H),
    "self_attn.k_proj.weight": (H // 2, H),
    "self_attn.v_proj.weight": (H // 2, H),
    "self_attn.o_proj.weight": (H, H),
}
QK_NORMS = {"self_attn.q_norm.weight": (4,), "self_attn.k_norm.weight": (4,)}
LINEAR = {"linear_attn.in_proj_qkvz.weight": (4 * H, H), "linear_attn.out_proj.weight": (H, H)}
MLA = {
    "self_attn.q_a_proj.weight": (4, H),
    "self_attn.q_b_proj.weight": (H, 4),
    "self_attn.kv_a_proj_with_mqa.weight": (6, H),
    "self_attn.kv_b_proj.weight": (H, 4),
    "self_attn.o_proj.weight": (H, H),
}

Shapes = Mapping[str, tuple[int, ...]]


def within(place: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {place + name: shape for name, shape in shapes.items()}


@dataclass(frozen=True)
class Model:
    """A verifier: its config.json, and the shapes of its tensors."""

    config: dict[str, Any]
    body: Shapes
    mtp: Shapes
    extra: Shapes = field(default_factory=dict)
    """Tensors that look like an MTP's and are none."""


def _config(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": H,
        "vocab_size": V,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **more,
    }


def _body(*layers: Shapes, prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    shapes = {
        f"{prefix}embed_tokens.weight": (V, H),
        f"{prefix}norm.weight": (H,),
        "lm_head.weight": (V, H),
    }
    for number, layer in enumerate(layers):
        shapes |= within(f"{prefix}layers.{number}.", layer)
    return shapes


def _qwen(*layers: Shapes) -> dict[str, tuple[int, ...]]:
    shapes = {
        "mtp.fc.weight": (H, 2 * H),
        "mtp.norm.weight": (H,),
        "mtp.pre_fc_norm_embedding.weight": (H,),
        "mtp.pre_fc_norm_hidden.weight": (H,),
    }
    for number, layer in enumerate(layers):
        shapes |= within(f"mtp.layers.{number}.", layer)
    return shapes


_MOE = {**NORMS, **GQA, **QK_NORMS, **EACH, **ROUTER}
_MOE_FUSED = {**NORMS, **GQA, **QK_NORMS, **FUSED, **ROUTER}
_DENSE = {**NORMS, **GQA, **QK_NORMS, **MLP}
_DEEPSEEK = {**NORMS, **MLA, **EACH, **ROUTER}
_AFTER = {
    "eh_proj.weight": (H, 2 * H),
    "enorm.weight": (H,),
    "hnorm.weight": (H,),
    "shared_head.norm.weight": (H,),
}

VERIFIERS = {
    "qwen3_next": Model(
        _config("qwen3_next", "Qwen3NextForCausalLM", num_experts=EXPERTS),
        _body({**NORMS, **LINEAR, **EACH, **ROUTER}, _MOE),
        _qwen(_MOE),
    ),
    "qwen3_5": Model(
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "text_config": _config("qwen3_5_text", "", mtp_num_hidden_layers=1),
            "vision_config": {"hidden_size": 8},
        },
        _body({**NORMS, **LINEAR, **MLP}, _DENSE, prefix="model.language_model."),
        {**_qwen(_DENSE), "mtp.embed_tokens.weight": (V, H)},
        {"model.visual.blocks.0.attn.qkv.weight": (24, 8)},
    ),
    "qwen3_5_moe": Model(
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "text_config": _config(
                "qwen3_5_moe_text", "", mtp_num_hidden_layers=2, num_experts=EXPERTS
            ),
        },
        _body({**NORMS, **LINEAR, **FUSED, **ROUTER}, _MOE_FUSED, prefix="model.language_model."),
        _qwen(_MOE_FUSED, _MOE_FUSED),
    ),
    "qwen4_exp": Model(
        _config("qwen4_exp", "Qwen4ExpForCausalLM", mtp_num_hidden_layers=1, hc_count=2),
        _body(_MOE, _MOE),
        {
            "mtp.fc_embedding.weight": (H, H),
            "mtp.fc_hidden.weight": (H, H),
            "mtp.pre_fc_norm_embedding.weight": (H,),
            "mtp.pre_fc_norm_hidden.weight": (2 * H,),
            "mtp.hyper_connection_mixer.weight": (4, 2 * H),
            **within("mtp.layers.0.", {**NORMS, **GQA, **EACH}),
        },
    ),
    "deepseek_v3": Model(
        _config(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            num_nextn_predict_layers=1,
            n_routed_experts=EXPERTS,
        ),
        _body({**NORMS, **MLA, **MLP}, _DEEPSEEK),
        within("model.layers.2.", {**_AFTER, **_DEEPSEEK, "embed_tokens.weight": (V, H)}),
    ),
    "glm4v_moe": Model(
        {
            "model_type": "glm4v_moe",
            "text_config": _config(
                "glm4v_moe_text", "", num_nextn_predict_layers=2, n_routed_experts=EXPERTS
            ),
        },
        _body(_DENSE, _MOE, prefix="model.language_model."),
        within("model.language_model.layers.2.", {**_AFTER, **_MOE})
        | within("model.language_model.layers.3.", {**_AFTER, **_MOE}),
    ),
    "mimo": Model(
        _config("mimo", "MiMoForCausalLM", num_nextn_predict_layers=1),
        _body(_DENSE, _DENSE),
        within(
            "model.mtp_layers.0.",
            {
                "input_proj.weight": (H, 2 * H),
                "token_layernorm.weight": (H,),
                "hidden_layernorm.weight": (H,),
                "final_layernorm.weight": (H,),
                **_DENSE,
            },
        ),
    ),
    "mimo_v2_flash": Model(
        _config("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
        _body(_DENSE, _MOE),
        within(
            "model.mtp.layers.0.",
            {
                "eh_proj.weight": (H, 2 * H),
                "enorm.weight": (H,),
                "hnorm.weight": (H,),
                "pre_mlp_layernorm.weight": (H,),
                "final_layernorm.weight": (H,),
                **MLP,
            },
        ),
    ),
    "ernie4_5_moe": Model(
        _config(
            "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", num_nextn_predict_layers=1, moe_num_experts=3
        ),
        _body({**NORMS, **GQA, **MLP}, {**NORMS, **GQA, **EACH, **ROUTER}),
        {
            "model.mtp_linear_proj.0.weight": (H, 2 * H),
            "model.mtp_emb_norm.0.weight": (H,),
            "model.mtp_hidden_norm.0.weight": (H,),
            **within("model.mtp_block.0.", {**NORMS, **GQA, **MLP}),
        },
    ),
    "longcat_flash": Model(
        _config("longcat_flash", "LongcatFlashForCausalLM", num_nextn_predict_layers=1),
        _body(_DEEPSEEK, _DEEPSEEK),
        {
            "model.mtp.embed_tokens.weight": (V, H),
            "model.mtp.norm.weight": (H,),
            **within(
                "model.mtp.layers.0.",
                {
                    "enorm.m.weight": (H,),
                    "hnorm.m.weight": (H,),
                    "eh_proj.weight": (H, 2 * H),
                    **within("transformer_layer.", MLP),
                },
            ),
        },
    ),
    "nemotron_h": Model(
        _config("nemotron_h", "NemotronHForCausalLM", num_nextn_predict_layers=1),
        {
            "backbone.embeddings.weight": (V, H),
            "backbone.norm_f.weight": (H,),
            "lm_head.weight": (V, H),
            **within("backbone.layers.0.", _MOE),
        },
        {
            "mtp.layers.0.eh_proj.weight": (H, 2 * H),
            "mtp.layers.0.enorm.weight": (H,),
            "mtp.layers.0.hnorm.weight": (H,),
            "mtp.layers.0.mixer.q_proj.weight": (H, H),
            "mtp.layers.1.mixer.up_proj.weight": (W, H),
            "mtp.layers.1.final_layernorm.weight": (H,),
        },
    ),
    "deepseek_v4": Model(
        _config("deepseek_v4", "DeepseekV4ForCausalLM", num_nextn_predict_layers=1),
        {
            "embed.weight": (V, H),
            "layers.0.attn.wq_a.weight": (4, H),
            "norm.weight": (H,),
            "head.weight": (V, H),
        },
        within(
            "mtp.0.",
            {
                "e_proj.weight": (H, H),
                "h_proj.weight": (H, H),
                "enorm.weight": (H,),
                "hnorm.weight": (H,),
                "attn.wq_a.weight": (4, H),
            },
        ),
    ),
    "hy_v3": Model(
        _config("hy_v3", "HYV3ForCausalLM", num_nextn_predict_layers=1),
        _body(_MOE, _MOE),
        within("model.layers.2.", {**_AFTER, **NORMS, **GQA, **MLP}),
    ),
}


def random_tensors(shapes: Shapes, dtype: torch.dtype, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def mtp_of(kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensors:
    """Random tensors of an MTP."""
    return random_tensors(VERIFIERS[kind].mtp, dtype, seed)


def write_verifier(
    directory: Path,
    kind: str = "qwen3_next",
    *,
    mtp: Tensors | None = None,
    shards: int = 2,
    config: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    spread: bool = False,
) -> Path:
    """Write a verifier in bfloat16.

    Args:
        directory: the directory to create.
        kind: a key of ``VERIFIERS``.
        mtp: the tensors of its MTP; random ones if ``None``. The last shard holds them beside some
            of the body's.
        shards: how many files; with 1 there is no index.
        config: keys of config.json to set.
        without: keys of config.json to leave out.
        spread: whether all shards hold some of the MTP's tensors instead.

    """
    directory.mkdir(parents=True)
    model = VERIFIERS[kind]
    said = {key: it for key, it in model.config.items() if key not in without} | dict(config or {})
    (directory / "config.json").write_text(json.dumps(said, indent=2))
    (directory / "tokenizer.json").write_text("{}")
    body = random_tensors({**model.body, **model.extra}, torch.bfloat16, 0)
    own = mtp_of(kind) if mtp is None else mtp
    names = sorted(body)
    parts: list[Tensors] = [
        {name: body[name] for name in names[number::shards]} for number in range(shards)
    ]
    for number, name in enumerate(sorted(own)):
        parts[number % shards if spread else -1][name] = own[name]
    if shards == 1:
        save_file(parts[0], directory / "model.safetensors")
    else:
        files = {
            f"model-{number:05}-of-{shards:05}.safetensors": part
            for number, part in enumerate(parts, start=1)
        }
        write_shards(directory, files)
    return directory


def bytes_of(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor: NaN equals itself, and 0 is not -0."""

    def raw(tensor: Tensor) -> bytes:
        return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    return {name: (str(it.dtype), tuple(it.shape), raw(it)) for name, it in tensors.items()}


def load_all(directory: Path) -> Tensors:
    """Every tensor of every file that an engine would read, by the safetensors library."""
    index = directory / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    found: Tensors = {}
    for name in files:
        with safe_open(directory / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                assert key not in found, f"{key} is in two shards"
                found[key] = file.get_tensor(key)
    return found


def stacked(tensors: Tensors, place: str, count: int = EXPERTS) -> Tensors:
    """Experts with a tensor for each matrix as two stacks, as PyTorch stacks them."""
    each = [
        [tensors[f"{place}.{expert}.{matrix}_proj.weight"] for expert in range(count)]
        for matrix in ("gate", "up", "down")
    ]
    gate_up = torch.stack([torch.cat(pair) for pair in zip(each[0], each[1], strict=True)])
    return {f"{place}.gate_up_proj": gate_up, f"{place}.down_proj": torch.stack(each[2])}
