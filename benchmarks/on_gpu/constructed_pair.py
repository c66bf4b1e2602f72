"""A verifier and a draft of any size, without training, whose acceptance is set by construction.

The verifier's residual branches are scaled to nearly zero, so that its last hidden state is the
normed embedding of the last token. Row s(t) of its head is the embedding of t, where s is a
permutation with a single cycle: its greedy next token is s(t), and a generation follows the cycle.
The draft's fusion passes on the embedding and almost nothing of the hidden state, and its layer
adds almost nothing, so that it proposes s(t) too. For a share of the tokens, though, its own
embedding is another token's, and its proposal is wrong. All matrices are dense and random, so they
take the same time as trained ones of these shapes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from speculators.models.eagle import EagleSpeculator, EagleSpeculatorConfig

NEARLY_NOTHING = 1e-4
"""The scale of residual branches: 64 of them then change a state by less than 1 %, which leaves it
far nearer to its own row of the head than to any other."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int

    @property
    def layer(self) -> dict[str, Any]:
        """The sizes as keys of a transformers config."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


SHAPES = {
    "8b": Shape(128256, 4096, 14336, 32, 8, 32),
    "135m": Shape(49152, 576, 1536, 9, 3, 30),
    "tiny": Shape(2048, 128, 256, 4, 2, 2),
}
"""``8b`` is that of Llama-3.1-8B, ``135m`` that of SmolLM2-135M; ``tiny`` is for trying out."""


@dataclass(frozen=True)
class ConstructedPair:
    """The models, and the token that follows each token, (vocabulary)."""

    verifier: Any
    draft: EagleSpeculator
    following: Tensor

    def walk(self, token: int, steps: int) -> list[int]:
        """The tokens that follow a token."""
        following = self.following.tolist()
        tokens = []
        for _ in range(steps):
            token = following[token]
            tokens.append(token)
        return tokens


@torch.no_grad()
def construct(
    shape: Shape, acceptance: float, device: torch.device, dtype: torch.dtype
) -> ConstructedPair:
    """Make a pair whose draft is right for this share of the tokens."""
    torch.manual_seed(0)
    verifier = random_verifier(shape, device, dtype)
    draft = random_draft(shape, device, dtype)
    order = torch.randperm(shape.vocabulary, device=device)
    following = torch.empty_like(order)
    following[order] = order.roll(-1)

    embedding, head = verifier.get_input_embeddings().weight, verifier.get_output_embeddings()
    embedding.normal_()
    head.weight[following] = embedding / shape.hidden**0.5
    for layer in verifier.get_decoder().layers:
        hush(layer)

    hidden = shape.hidden
    draft.fc.weight.normal_().mul_(NEARLY_NOTHING)
    draft.fc.weight[:, :hidden] += torch.eye(hidden, dtype=dtype, device=device)
    hush(draft.layers[0])
    assert draft.embed_tokens is not None
    own = draft.embed_tokens.weight
    own.copy_(embedding)
    wrong = torch.randperm(shape.vocabulary, device=device)
    wrong = wrong[: round((1 - acceptance) * shape.vocabulary)]
    own[wrong] = embedding[wrong.roll(1)]
    draft.attach_verifier(verifier)
    return ConstructedPair(verifier, draft, following)


def hush(layer: Any) -> None:
    """Scale what a layer adds to the residual stream to nearly zero."""
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        projection.weight.mul_(NEARLY_NOTHING)


def random_verifier(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama model as transformers initialises it, created on the device."""
    config = LlamaConfig(num_hidden_layers=shape.layers, **shape.layer)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(requires_grad=False)


def random_draft(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, own_embedding: bool = True
) -> EagleSpeculator:
    """A draft for such a verifier, created on the device."""
    config = EagleSpeculatorConfig(
        transformer_layer_config={"model_type": "llama", **shape.layer},
        speculators_config={
            "algorithm": "eagle",
            "verifier": {"name_or_path": None, "architectures": ["LlamaForCausalLM"]},
        },
    )
    with torch.device(device):
        draft: EagleSpeculator = EagleSpeculator._from_config(  # type: ignore[no-untyped-call]
            config, own_embedding=own_embedding, dtype=dtype
        )
    nn.Module.eval(draft).requires_grad_(requires_grad=False)
    return draft
