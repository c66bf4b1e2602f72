"""Drafts of EAGLE-3 and EAGLE-3.1."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.conversations import Conversations
from training.parts import evening
from training.recipes import Recipe
from training.recurrent import Layer, RecurrentDraft, places


def layers_read(verifier: Any) -> tuple[int, ...]:
    """The layers whose incoming states EAGLE-3's reference reads."""
    layers = verifier.config.num_hidden_layers
    return 2, layers // 2, layers - 3


class FusingLayer(Layer):
    """EAGLE-3's layer, which attends with the embedding of the next token beside the state."""

    def __init__(self, config: dict[str, Any]) -> None:
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        super().__init__(config, 2 * hidden)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.hidden_norm = nn.RMSNorm(hidden, eps)

    def fused(self, embeddings: Tensor, x: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The next states from embeddings and states, all (batch, length, hidden)."""
        both = torch.cat((self.input_layernorm(embeddings), self.hidden_norm(x)), -1)
        return self.added(x, both, earlier).float()


class Eagle3Draft(RecurrentDraft):
    """An EAGLE-3 draft, with tensors named as SafeAILab's.

    Args:
        config: its config.json.
        recipe: whether it is one of EAGLE-3.1.
        reads: which of the verifier's states it reads.
        tokens: the verifier's tokens that it can draft, ascending.

    """

    d2t: Tensor
    t2d: Tensor
    scale: Tensor
    later = 0.8  # as in the reference (traineagle3/main.py)

    def __init__(
        self, config: dict[str, Any], recipe: Recipe, reads: tuple[int, ...], tokens: Tensor
    ) -> None:
        super().__init__(config, reads)
        hidden, eps, states = config["hidden_size"], config["rms_norm_eps"], len(reads)
        self.steps = recipe.steps
        self.fc = nn.Linear(states * hidden, hidden, bias=False)
        # A few channels of a residual stream are a thousand times larger than the others. While
        # the draft is trained, they are all of one size; what is published has it in fc.
        self.register_buffer("scale", torch.ones(states * hidden), persistent=False)
        self.fc_norm = (
            nn.ModuleList(nn.RMSNorm(hidden, eps) for _ in range(states))
            if recipe.eagle31
            else None
        )
        self.midlayer = FusingLayer(config)
        self.norm = nn.RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, len(tokens), bias=False)
        self.register_buffer("d2t", tokens - torch.arange(len(tokens), device=tokens.device))
        t2d = torch.zeros(config["vocab_size"], dtype=torch.bool, device=tokens.device)
        self.register_buffer("t2d", t2d.index_fill(0, tokens, value=True))

    def read(self, states: Tensor) -> Tensor:
        """What the verifier's states, (..., states * hidden), become for the layer."""
        states = states.float()
        if self.fc_norm is not None:
            parts = states.chunk(len(self.fc_norm), -1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            states = torch.cat(normed, -1)
        read: Tensor = self.fc(states * self.scale)
        return read.float()

    def fed_back(self, x: Tensor) -> Tensor:
        """What the layer's output becomes for its next step."""
        return x if self.fc_norm is None else cast(Tensor, self.norm(x))

    def tensors(self) -> dict[str, Tensor]:
        """What is published."""
        return self.state_dict() | {"fc.weight": self.fc.weight.detach() * self.scale}

    def own(self, tokens: Tensor) -> Tensor:
        """Its own ids of the verifier's tokens, -1 for those that it does not have."""
        numbers = self.t2d.cumsum(0) - 1
        return numbers.masked_fill(~self.t2d, -1)[tokens]

    def losses(
        self, embed: nn.Module, head: Tensor, data: Conversations, tokens: int, depth: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``RecurrentDraft``: the cross-entropy with the likeliest tokens that it has."""
        row, learned = places(data, tokens)
        likeliest = self.own(data.tokens[row, learned].long())
        shares = data.shares[row, learned].float().masked_fill(likeliest < 0, 0)
        embeddings = embed(data.ids)
        length = data.ids.shape[1] - depth
        earlier = list[tuple[Tensor, Tensor]]()

        def computing() -> Any:
            reduced = head.dtype != torch.float32
            return torch.autocast(head.device.type, dtype=torch.bfloat16, enabled=reduced)

        with computing():
            x = self.read(data.read(self.reads)[:, :length])
        for step in range(depth):
            with computing():
                x = self.midlayer.fused(embeddings[:, step + 1 : step + 1 + length], x, earlier)
                logits = self.lm_head(self.norm(x[row, learned - step - 1]))
            scores = logits.float().log_softmax(-1)
            cross_entropy = -(shares * scores.gather(1, likeliest.clamp(min=0))).sum(-1).mean()
            yield cross_entropy, (scores.argmax(-1) == likeliest[:, 0]).float().mean()
            x = self.fed_back(x)

    def measured(
        self, embed: nn.Module, head: Tensor, held_out: list[Conversations]
    ) -> dict[str, Any]:
        """See ``RecurrentDraft``; also the share of tokens that it has."""
        known = self.t2d[answered(held_out)].float().mean()
        return {
            **super().measured(embed, head, held_out),
            "known_tokens": round(known.item(), 4),
        }

    @torch.inference_mode()
    def begin(self, weights: dict[str, Tensor] | None, verifier: Any, data: Conversations) -> None:
        """Start from the verifier's final norm and its head's rows, or from another's weights.

        What the states are scaled by, or multiplied with after their norms, gives all channels the
        same size at first.
        """
        numbers = torch.arange(len(self.d2t), device=self.d2t.device)
        self.lm_head.weight.copy_(verifier.lm_head.weight[numbers + self.d2t])
        self.norm.weight.copy_(verifier.model.norm.weight)
        if weights:
            self.load_state_dict(weights, strict=False)
        states = data.some_states(self.reads)
        if self.fc_norm is None:
            self.scale.copy_(evening(states))
            return
        parts = states.chunk(len(self.fc_norm), -1)
        for norm, part in zip(self.fc_norm, parts, strict=True):
            assert isinstance(norm, nn.RMSNorm)
            norm.weight.copy_(part.square().mean(-1).sqrt().median() * evening(part))


def answered(data: list[Conversations]) -> Tensor:
    """All tokens of answers."""
    return torch.cat([part.ids[part.in_answers()] for part in data])


def most_frequent(data: list[Conversations], size: int, vocabulary: int) -> Tensor:
    """The ids of the tokens that answers are mostly made of, ascending."""
    counts = answered(data).bincount(minlength=vocabulary)
    return counts.topk(size).indices.sort().values
