"""Drafts that draft a token after the other, from their own outputs: EAGLE's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.conversations import DEEPEST, Conversations
from training.draft import Draft
from training.parts import Mlp, turned


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config["num_key_value_heads"]
        self.head, self.theta = hidden // heads, config.get("rope_theta", 10000.0)
        self.q_proj = nn.Linear(width, heads * self.head, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(heads * self.head, hidden, bias=False)

    def forward(self, x: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attend as the draft does when it has drafted ``len(earlier)`` tokens.

        Index t then stands for position t + len(earlier). It attends to the first step's keys up to
        t, which come from the verifier's states, and to the key at index t of each later step.
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(x.shape[1], device=x.device) + len(earlier)
        q, k = turned(q, positions, self.theta), turned(k, positions, self.theta)
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        earlier.append((k, v))
        if len(earlier) == 1:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            past = torch.ones_like(own).tril()
            attended = F.scaled_dot_product_attention(
                q,
                torch.cat([key for key, _ in earlier], 2),
                torch.cat([value for _, value in earlier], 2),
                attn_mask=torch.cat([past, own.repeat(1, len(earlier) - 1)], 1),
            )
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output


class Layer(nn.Module):
    """A decoder layer without an input norm, whose attention may take wider inputs."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, width)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """See ``Attention``."""
        return self.added(x, x, earlier)

    def added(self, x: Tensor, attending: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``x`` with what attention on ``attending`` and the MLP add to it."""
        x = x + self.self_attn(attending, earlier)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x.float()))
        return output


class RecurrentDraft(Draft):
    """A draft that is trained some steps deep on its own outputs.

    Attributes:
        steps: how deep.
        later: the weight of a step, relative to the one before it.

    """

    steps: int
    later = 1.0

    def losses(
        self, embed: nn.Module, head: Tensor, data: Conversations, tokens: int, depth: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Loss and share of right guesses, for each of ``depth`` steps of drafting.

        At step j, index t takes token t+j+1 and the state at t+j or what stands in for it, and
        gives what stands in for the state at t+j+1, whose logits predict token t+j+2.
        """
        raise NotImplementedError

    def loss(self, embed: nn.Module, head: Tensor, data: Conversations, tokens: int) -> Tensor:
        """See ``Draft``: the mean over the steps."""
        losses = self.losses(embed, head, data, tokens, self.steps)
        return torch.stack(
            [self.later**step * loss for step, (loss, _) in enumerate(losses)]
        ).mean()

    @torch.inference_mode()
    def measured(
        self, embed: nn.Module, head: Tensor, held_out: list[Conversations]
    ) -> dict[str, Any]:
        """See ``Draft``: by the number of tokens that it has already drafted on its own."""
        right, total = torch.zeros(DEEPEST), 0
        for part in held_out:
            for rows in torch.arange(len(part)).split(32):
                batch = part.take(rows.to(part.ids.device))
                count = int(batch.size.sum())
                steps = self.losses(embed, head, batch, count, DEEPEST)
                shares = [float(share) for _, share in steps]
                right, total = right + count * torch.tensor(shares), total + count
        return {"agreement_by_step": [round(share, 4) for share in (right / total).tolist()]}


def places(data: Conversations, tokens: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of the states that predict an answer's tokens, both (tokens,)."""
    device = data.ids.device
    row = torch.arange(len(data), device=device)
    row = row.repeat_interleave(data.size, output_size=tokens)
    nth = torch.arange(tokens, device=device) - (data.size.cumsum(0) - data.size)[row]
    return row, data.begin[row] + nth - 1
