"""Write a checkpoint of a real one's size, with random weights.

    python benchmarks/make_checkpoint.py DIRECTORY --container bin --size 8B
    python benchmarks/make_checkpoint.py DIRECTORY --kind eagle3

The shapes are those of EAGLE for Llama 3.1 8B: ten tensors, 1.55 GB in bfloat16. An EAGLE-3 draft
has no embedding, and a head for 32000 tokens: 0.85 GB. Of a verifier, only the embedding and the
head are written.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CONTAINERS", "KINDS", "SIZES", "write_checkpoint", "write_verifier"]


class Size(NamedTuple):
    """The sizes of a draft, which are also its verifier's."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of an EAGLE draft without biases, by name."""
        hidden, intermediate = self.hidden, self.intermediate
        key_value = hidden // self.heads * self.key_value_heads
        attention, mlp = "layers.0.self_attn", "layers.0.mlp"
        return {
            "embed_tokens.weight": (self.vocabulary, hidden),
            "fc.weight": (hidden, 2 * hidden),
            f"{attention}.q_proj.weight": (hidden, hidden),
            f"{attention}.k_proj.weight": (key_value, hidden),
            f"{attention}.v_proj.weight": (key_value, hidden),
            f"{attention}.o_proj.weight": (hidden, hidden),
            f"{mlp}.gate_proj.weight": (intermediate, hidden),
            f"{mlp}.up_proj.weight": (intermediate, hidden),
            f"{mlp}.down_proj.weight": (hidden, intermediate),
            "layers.0.post_attention_layernorm.weight": (hidden,),
        }

    def eagle3_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the matrices and norms of an EAGLE-3 draft, by name."""
        hidden = self.hidden
        drafted = self.vocabulary // 4
        layer = {
            name.replace("layers.0", "midlayer"): (shape[0], 2 * hidden)
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
            else shape
            for name, shape in self.shapes().items()
            if name.startswith("layers.0")
        }
        return layer | {
            "fc.weight": (hidden, 3 * hidden),
            "midlayer.hidden_norm.weight": (hidden,),
            "midlayer.input_layernorm.weight": (hidden,),
            "norm.weight": (hidden,),
            "lm_head.weight": (drafted, hidden),
        }

    def verifier_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of a verifier that a draft may use, by name."""
        return {
            "lm_head.weight": (self.vocabulary, self.hidden),
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
        }

    def config(self) -> dict[str, Any]:
        """The part that is common to the config.json of a draft and of a verifier."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "num_hidden_layers": 1,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SIZES = {
    "8B": Size(4096, 14336, 32, 8, 128256),
    "small": Size(64, 176, 4, 2, 320),
}

CONTAINERS = ("safetensors", "bin", "sharded")
"""model.safetensors, pytorch_model.bin in the zip format, and safetensors in four shards."""

KINDS = ("eagle", "eagle3", "verifier")

SHARDS = 4


def write_checkpoint(directory: Path, container: str, size: str, kind: str = "eagle") -> None:
    """Write a checkpoint; the weights are the same in every container.

    Args:
        directory: the directory to create.
        container: one of ``CONTAINERS``.
        size: one of ``SIZES``.
        kind: one of ``KINDS``.

    """
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    sizes = SIZES[size]
    shapes = {
        "eagle": sizes.shapes,
        "eagle3": sizes.eagle3_shapes,
        "verifier": sizes.verifier_shapes,
    }[kind]()
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, shape in shapes.items()
    }
    if kind == "eagle3":  # every fourth token
        drafted, _ = shapes["lm_head.weight"]
        tensors["d2t"] = 3 * torch.arange(drafted)
        tensors["t2d"] = torch.arange(sizes.vocabulary) % 4 == 0
        write_verifier(directory, size, draft_vocab_size=drafted)
    elif kind == "eagle":
        write_verifier(directory, size, bias=False)
    else:
        write_verifier(directory, size, num_hidden_layers=32)
    if container == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    elif container == "safetensors":
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for number in range(SHARDS):
            shard = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
            names = list(shapes)[number::SHARDS]
            save_file({name: tensors[name] for name in names}, directory / shard, {"format": "pt"})
            weight_map.update(dict.fromkeys(names, shard))
        index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
        (directory / "model.safetensors.index.json").write_text(index)


def write_verifier(directory: Path, size: str, **more: Any) -> None:
    """Write only a config.json, which is all that conversion needs of a verifier."""
    directory.mkdir(parents=True)
    config = SIZES[size].config() | more
    (directory / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--container", choices=CONTAINERS, default="safetensors")
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument("--kind", choices=KINDS, default="eagle")
    arguments = parser.parse_args()
    write_checkpoint(arguments.directory, arguments.container, arguments.size, arguments.kind)
