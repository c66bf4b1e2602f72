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

EVERY_FEATURE = frozenset({"attention_bias", "fusion_bias", "layernorms"})
"""Those of a tiny draft, by their names in speculators."""


def tiny_verifier(directory: Path) -> Path:
    """An untrained verifier with the same vocabulary that starts fast and can be split in two.

    Its embeddings are so large that the last token decides nearly alone which one is next.
    """
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
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(VERIFIER / name, directory)
    return directory


def tiny_draft(
    directory: Path, features: frozenset[str] = EVERY_FEATURE, **settings: object
) -> Path:
    """A draft for ``tiny_verifier``: it passes on the embedding, with some noise of its layer.

    So it is often right, and how often depends on everything that it computes.

    Args:
        directory: the directory to create.
        features: some of ``EVERY_FEATURE``.
        settings: further keys of config.json.

    """
    rows = {"q": HIDDEN, "k": HIDDEN * KV_HEADS // HEADS, "v": HIDDEN * KV_HEADS // HEADS}
    tensors = {"fc.weight": torch.cat((torch.eye(HIDDEN), 0.05 * torch.eye(HIDDEN)), 1)}
    scaled: dict[str, tuple[float, tuple[int, ...]]] = {
        "layers.0.self_attn.q_proj.weight": (0.15, (HIDDEN, HIDDEN)),
        "layers.0.self_attn.k_proj.weight": (0.15, (rows["k"], HIDDEN)),
        "layers.0.self_attn.v_proj.weight": (0.045, (rows["v"], HIDDEN)),
        "layers.0.self_attn.o_proj.weight": (0.045, (HIDDEN, HIDDEN)),
        "layers.0.mlp.gate_proj.weight": (0.045, (INTERMEDIATE, HIDDEN)),
        "layers.0.mlp.up_proj.weight": (0.045, (INTERMEDIATE, HIDDEN)),
        "layers.0.mlp.down_proj.weight": (0.045, (HIDDEN, INTERMEDIATE)),
    }
    if "fusion_bias" in features:
        scaled["fc.bias"] = (0.1, (HIDDEN,))
    if "attention_bias" in features:
        scaled |= {f"layers.0.self_attn.{it}_proj.bias": (0.1, (rows[it],)) for it in "qkv"}
    tensors |= {
        name: scale * noise(*shape, seed=seed)
        for seed, (name, (scale, shape)) in enumerate(scaled.items())
    }
    norms = ["layers.0.post_attention_layernorm"]
    if "layernorms" in features:
        norms += [f"{it}_layernorm" for it in NORMS]
    tensors |= {f"{it}.weight": 1 + 0.1 * noise(HIDDEN, seed=seed) for seed, it in enumerate(norms)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "bias": "fusion_bias" in features,
        "qkv_bias": "attention_bias" in features,
    }
    return write(directory, config | settings, tensors)
