"""Checkpoints of every variant in the published layout, made from the trained examples."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"

Tensors = dict[str, Tensor]

NORMS = ("embed", "hidden", "lm_head")
"""The extra norms: the first parts of their names."""


def read(directory: Path) -> tuple[dict[str, object], Tensors]:
    config = json.loads((directory / "config.json").read_text())
    weights = directory / "model.safetensors"
    if weights.exists():
        return config, load_file(weights)
    return config, torch.load(directory / "pytorch_model.bin", weights_only=True)


def write(directory: Path, config: dict[str, object], tensors: Tensors) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    return directory


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def eagle1(directory: Path) -> Path:
    """The trained EAGLE-1 draft: only ``fc`` and the layer."""
    return write(directory, *read(EXAMPLES / "smollm2-135m-eagle1"))


def hass(directory: Path) -> Path:
    """The trained HASS draft, which has ``fc.bias``."""
    return write(directory, *read(EXAMPLES / "smollm2-135m-hass"))


def attention_biases(directory: Path) -> Path:
    """The EAGLE-1 draft with biases on q, k and v, and an embedding of its own."""
    config, tensors = read(EXAMPLES / "smollm2-135m-eagle1")
    dtype = tensors["fc.weight"].dtype
    for seed, name in enumerate("qkv"):
        rows = len(tensors[f"layers.0.self_attn.{name}_proj.weight"])
        bias = 0.2 * noise(rows, seed=seed)
        tensors[f"layers.0.self_attn.{name}_proj.bias"] = bias.to(dtype)
    embedding = load_file(VERIFIER / "model.safetensors")["model.embed_tokens.weight"]
    changed = embedding + 0.01 * noise(*embedding.shape, seed=3)
    tensors["embed_tokens.weight"] = changed.to(dtype)
    return write(directory, {**config, "qkv_bias": True}, tensors)


def layernorms(directory: Path) -> Path:
    """The trained draft with the three extra norms."""
    return write(directory, *read(EXAMPLES / "smollm2-135m-layernorms"))


VARIANTS: dict[str, Callable[[Path], Path]] = {
    "eagle1": eagle1,
    "hass": hass,
    "attention_biases": attention_biases,
    "layernorms": layernorms,
}


def in_the_older_layout(converted: Path, directory: Path) -> Path:
    """A converted draft with the names that speculators 0.1.0 to 0.3.0 wrote."""
    older = {
        "fc.": "fusion_fc.",
        "hidden_layernorm.": "transformer.input_layernorm.",
        "layers.0.": "transformer.",
        "post_embedding_layernorm.": "embedding_layernorm.",
    }
    config, tensors = read(converted)

    def renamed(name: str) -> str:
        prefix = next((it for it in older if name.startswith(it)), "")
        return older.get(prefix, "") + name.removeprefix(prefix)

    return write(directory, config, {renamed(name): it for name, it in tensors.items()})


HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 128, 256, 4, 2


def tiny_verifier(directory: Path) -> Path:
    """An untrained verifier with the same vocabulary that starts fast and can be split in two."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(VERIFIER / name, directory)
    return directory


def tiny_draft(directory: Path) -> Path:
    """A draft for ``tiny_verifier`` with every feature.

    It passes on the hidden state with some noise. It is sometimes right, since an untrained
    verifier repeats itself.
    """
    rows = {"q": HIDDEN, "k": HIDDEN * KV_HEADS // HEADS, "v": HIDDEN * KV_HEADS // HEADS}
    small = {
        "fc.bias": (HIDDEN,),
        **{f"layers.0.self_attn.{name}_proj.weight": (rows[name], HIDDEN) for name in "qkv"},
        **{f"layers.0.self_attn.{name}_proj.bias": (rows[name],) for name in "qkv"},
        "layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "layers.0.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "layers.0.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "layers.0.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }
    norms = ("layers.0.post_attention_layernorm", *(f"{it}_layernorm" for it in NORMS))
    tensors = {
        "fc.weight": torch.cat((0.05 * torch.eye(HIDDEN), torch.eye(HIDDEN)), 1),
        **{
            name: 0.03 * noise(*shape, seed=seed)
            for seed, (name, shape) in enumerate(small.items())
        },
        **{f"{it}.weight": 1 + 0.1 * noise(HIDDEN, seed=seed) for seed, it in enumerate(norms)},
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "bias": True,
        "qkv_bias": True,
    }
    return write(directory, config, tensors)
