"""A recurrent draft that differs from EAGLE-1 in all that the protocol of drafts leaves open.

It reads several hidden states of the verifier, projects them to a width of its own, has its own
head, and predicts only some of the verifier's tokens, which it numbers in its own way.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

WIDER = 8
"""How much wider than the verifier the draft is."""


class ToyDraft(nn.Module):
    """The draft; it is often right about a tiny verifier whose layers add little.

    Args:
        verifier: see ``tiny_models.tiny_verifier``.
        layers: which of its hidden states to read.
        tokens: the verifier's tokens that it can predict, ascending; four of five if not given.
        doubt: the scale of what the verifier's states and the draft's layer add.

    """

    def __init__(
        self,
        verifier: PreTrainedModel,
        layers: Sequence[int] = (2, 1),
        tokens: Sequence[int] | None = None,
        doubt: float = 0.3,
    ) -> None:
        super().__init__()
        embedding: Any = verifier.get_input_embeddings().weight
        head: Any = verifier.get_output_embeddings().weight
        vocabulary, hidden = embedding.shape
        self.verifier_layers = tuple(layers)
        self.verifier_vocab_size = vocabulary
        self.tokens = [*tokens] if tokens else [t for t in range(vocabulary) if t % 5]
        width = hidden + WIDER
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        config._attn_implementation = "sdpa"
        self.config = config
        torch.manual_seed(5)
        self.embedding = nn.Embedding(vocabulary, width)
        self.projection = nn.Linear(len(layers) * hidden, width)
        self.fusion = nn.Linear(2 * width, width)
        self.layer = LlamaDecoderLayer(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)
        self.head = nn.Linear(width, len(self.tokens), bias=False)
        offsets = torch.tensor(self.tokens) - torch.arange(len(self.tokens))
        self.offsets: Tensor
        self.register_buffer("offsets", offsets)
        with torch.no_grad():
            # Without doubt, it would hand the embedding of the last token on to the head.
            self.fusion.weight *= doubt
            self.fusion.weight[:, :width] += torch.eye(width)
            self.layer.self_attn.o_proj.weight *= doubt
            self.layer.mlp.down_proj.weight *= doubt
            self.embedding.weight.zero_()
            self.embedding.weight[:, :hidden] = embedding
            self.head.weight.zero_()
            self.head.weight[:, :hidden] = head[self.tokens]
        self.train(False)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def project(self, verifier_states: Tensor) -> Tensor:
        states: Tensor = self.projection(verifier_states.to(device=self.device, dtype=self.dtype))
        return states

    def draft(
        self,
        input_ids: Tensor,
        states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Any:
        assert states.shape[2] == self.config.hidden_size
        fused = self.fusion(torch.cat((self.embedding(input_ids), states), -1))
        if position_ids is None:
            position_ids = torch.arange(fused.shape[1])[None]
        x = self.layer(
            fused,
            attention_mask=create_causal_mask(
                config=self.config,
                inputs_embeds=fused,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            position_embeddings=self.rotary(fused, position_ids=position_ids),
        )
        return SimpleNamespace(last_hidden_state=x)

    def logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.head(states)
        return logits

    def to_verifier(self, tokens: Tensor) -> Tensor:
        return tokens + self.offsets[tokens]


def plain_drafting(
    draft: ToyDraft, verifier: PreTrainedModel, tokens: list[int]
) -> Callable[[tuple[int, ...]], Tensor]:
    """The draft's log-probabilities of the verifier's tokens after a path, without any cache.

    It reads only layers whose states transformers gives out: not what leaves the last one.
    """
    hidden = verifier(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    projected = draft.project(torch.cat([hidden[layer] for layer in draft.verifier_layers], -1))[0]
    fed_back: dict[tuple[int, ...], Tensor] = {}

    def log_probabilities(path: tuple[int, ...]) -> Tensor:
        states = torch.stack([*projected, *(fed_back[path[:n]] for n in range(len(path)))])
        ids = torch.tensor([[*tokens[1:], *path]])
        fed_back[path] = draft.draft(ids, states[None]).last_hidden_state[0, -1]
        scores = torch.full((draft.verifier_vocab_size,), -torch.inf)
        scores[draft.tokens] = draft.logits(fed_back[path]).log_softmax(-1)
        return scores

    return log_probabilities
