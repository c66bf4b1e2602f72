"""DFlash drafts, which draft a block of tokens in one pass (arXiv:2602.06036).

A block is a certain token, the anchor, and masks for the tokens after it. Its positions attend to
what the verifier's states before the anchor were projected to, and to each other. In training, many
blocks of a conversation are drafted at once, each of which sees neither the others nor any state
from its anchor on.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.conversations import Conversations
from training.draft import Draft
from training.parts import Mlp, SoftCrossEntropy, evening, turned

ANCHORS = 64
"""Anchors that are drawn in a conversation for one step of training."""

FADING = 4.0
"""Token k that a block drafts, from 0, weighs exp(-k / FADING) in the loss (the paper, equation 4);
for blocks of 8, trainers take 4."""


def layers_read(verifier: Any, states: int) -> tuple[int, ...]:
    """The states that the reference reads: what its layers, from 1 to the third-last, leave."""
    last = verifier.config.num_hidden_layers - 3
    return tuple(round(1 + n * (last - 1) / (states - 1)) + 1 for n in range(states))


def mask_token(tokenizer: Any, data: list[Conversations]) -> int:
    """A token for masks: one reserved by the tokenizer, which no text has."""
    named = {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    }
    reserved = {number for number, it in tokenizer.added_tokens_decoder.items() if it.special}
    for token in sorted(reserved - named, reverse=True):
        if not any((part.ids == token).any() for part in data):
            return int(token)
    raise SystemExit("All reserved tokens of the tokenizer occur in text; none is left for masks.")


def seen_by_blocks(anchors: Tensor, context: int, block: int) -> Tensor:
    """Whether positions of blocks see those of the context and of all blocks.

    Args:
        anchors: (batch, blocks), the columns of the anchors.
        context: the length of the context.
        block: the number of positions of a block.

    Returns:
        (batch, 1, blocks * block, context + blocks * block), bool.

    """
    before = torch.arange(context, device=anchors.device) < anchors[:, :, None]
    number = torch.arange(anchors.shape[1], device=anchors.device).repeat_interleave(block)
    same = (number[:, None] == number).expand(len(anchors), -1, -1)
    return torch.cat((before.repeat_interleave(block, 1), same), -1)[:, None]


class Attention(nn.Module):
    """Grouped-query attention with RoPE and norms of queries and keys."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head, self.theta = config["head_dim"], config["rope_theta"]
        self.q_proj = nn.Linear(hidden, heads * self.head, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(heads * self.head, hidden, bias=False)
        self.q_norm = nn.RMSNorm(self.head, eps)
        self.k_norm = nn.RMSNorm(self.head, eps)

    def forward(self, x: Tensor, context: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """Attend from blocks, (batch, length, hidden), to context and blocks.

        Args:
            x: of the blocks.
            context: (batch, context, hidden).
            positions: of the blocks, (batch, length).
            seen: see ``seen_by_blocks``.

        """
        both = torch.cat((context.to(x.dtype), x), 1)
        at = torch.arange(context.shape[1], device=x.device).expand(len(x), -1)
        q, k = self._heads(self.q_proj(x)), self._heads(self.k_proj(both))
        v = self._heads(self.v_proj(both))
        q = turned(self.q_norm(q.float()), positions, self.theta).to(v.dtype)
        k = turned(self.k_norm(k.float()), torch.cat((at, positions), 1), self.theta).to(v.dtype)
        repeats = q.shape[1] // k.shape[1]
        attended = F.scaled_dot_product_attention(
            q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), attn_mask=seen
        )
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head))
        return heads.transpose(1, 2)


class Layer(nn.Module):
    """A decoder layer as Qwen3's, whose attention sees the context, too."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, context: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """See ``Attention``."""
        x = x + self.self_attn(self.input_layernorm(x.float()), context, positions, seen)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x.float()))
        return output


class DFlashDraft(Draft):
    """A DFlash draft, with tensors named as z-lab's.

    Args:
        config: its config.json.
        reads: which of the verifier's states it reads.

    """

    scale: Tensor

    def __init__(self, config: dict[str, Any], reads: tuple[int, ...]) -> None:
        super().__init__(config, reads)
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.block: int = config["block_size"]
        self.mask: int = config["dflash_config"]["mask_token_id"]
        self.fc = nn.Linear(len(reads) * hidden, hidden, bias=False)
        # As for EAGLE-3: what is published has it in fc.
        self.register_buffer("scale", torch.ones(len(reads) * hidden), persistent=False)
        self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(hidden, eps)

    @torch.inference_mode()
    def begin(self, verifier: Any, data: Conversations) -> None:
        """Start from the verifier's final norm, and from states of which all channels are even."""
        self.norm.weight.copy_(verifier.model.norm.weight)
        self.scale.copy_(evening(data.some_states(self.reads)))

    def tensors(self) -> dict[str, Tensor]:
        """What is published."""
        return self.state_dict() | {"fc.weight": self.fc.weight.detach() * self.scale}

    def forward(
        self, embed: nn.Module, states: Tensor, tokens: Tensor, anchors: Tensor, block: int
    ) -> Tensor:
        """Compute the outputs of blocks, after the final norm.

        Args:
            embed: the verifier's embedding.
            states: (batch, length, states * hidden), the verifier's.
            tokens: (batch, blocks), the anchors.
            anchors: (batch, blocks), their columns.
            block: the number of positions of a block.

        Returns:
            (batch, blocks, block, hidden), float32.

        """
        offsets = torch.arange(block, device=states.device)
        ids = torch.where(offsets == 0, tokens[:, :, None], self.mask).flatten(1)
        positions = (anchors[:, :, None] + offsets).flatten(1)
        seen = seen_by_blocks(anchors, states.shape[1], block)
        context = self.hidden_norm(self.fc(states.float() * self.scale).float())
        x = embed(ids)
        for layer in self.layers:
            x = layer(x, context, positions, seen)
        output: Tensor = self.norm(x.float()).unflatten(1, (-1, block))
        return output

    def guesses(
        self, embed: nn.Module, head: Tensor, data: Conversations, anchors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What blocks draft, compared with what the verifier said.

        Args:
            embed: the verifier's embedding.
            head: the verifier's head.
            data: conversations.
            anchors: (conversations, blocks), the columns of the anchors.

        Returns:
            the losses, whether the guesses are right, and whether there is a token to be guessed or
            the answer has ended before, all (conversations, blocks, drafted tokens).

        """
        row = torch.arange(len(data), device=anchors.device)[:, None, None]
        # The verifier's next tokens are kept at the token before them.
        before = anchors[:, :, None] + torch.arange(self.block - 1, device=anchors.device)
        given = before + 1 < (data.begin + data.size)[:, None, None]
        before = before.clamp(max=data.ids.shape[1] - 1)
        reduced = head.dtype != torch.float32
        with torch.autocast(head.device.type, dtype=torch.bfloat16, enabled=reduced):
            tokens = data.ids.gather(1, anchors)
            x = self(embed, data.read(self.reads), tokens, anchors, self.block)
        losses, right = SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x[:, :, 1:].flatten(0, 2),
            head,
            data.tokens[row, before].flatten(0, 2).long(),
            data.shares[row, before].flatten(0, 2).float(),
        )
        return losses.view_as(given), right.view_as(given).bool() & given, given

    def loss(self, embed: nn.Module, head: Tensor, data: Conversations, tokens: int) -> Tensor:
        """See ``Draft``: of blocks at random anchors, any but the last token of an answer."""
        del tokens
        random = torch.rand(len(data), ANCHORS, device=head.device)
        anchors = data.begin[:, None] + (random * (data.size[:, None] - 1)).long()
        losses, _right, given = self.guesses(embed, head, data, anchors)
        weights = given * torch.exp(-torch.arange(self.block - 1, device=head.device) / FADING)
        return (weights * losses).sum() / weights.sum().clamp(min=1)

    @torch.inference_mode()
    def measured(
        self, embed: nn.Module, head: Tensor, held_out: list[Conversations]
    ) -> dict[str, Any]:
        """See ``Draft``: by the place in a block, and tokens per pass of the verifier."""
        right, total = torch.zeros(2, self.block - 1)
        steps, accepted = 0, 0
        for batch in _batches(held_out, 32):
            last = (batch.begin + batch.size)[:, None] - 1
            found = []
            for nth in torch.arange(int(batch.size.max()), device=head.device).split(ANCHORS):
                anchors = torch.minimum(batch.begin[:, None] + nth, last)
                _losses, guessed, given = self.guesses(embed, head, batch, anchors)
                fresh = (batch.begin[:, None] + nth < last)[:, :, None]
                right += (guessed & fresh).sum((0, 1)).cpu()
                total += (given & fresh).sum((0, 1)).cpu()
                found.append(guessed.long().cumprod(-1).sum(-1))
            for row, size in zip(torch.cat(found, 1).tolist(), batch.size.tolist(), strict=True):
                taken = steps_through(row, size)
                steps, accepted = steps + len(taken), accepted + sum(taken)
        return {
            "agreement_by_step": [round(share, 4) for share in (right / total).tolist()],
            "acceptance_length": round(1 + accepted / max(1, steps), 4),
        }


def steps_through(accepted: list[int], size: int) -> list[int]:
    """How many tokens are accepted in each step of decoding an answer.

    Args:
        accepted: for each token of the answer, how many are accepted after it.
        size: the number of its tokens, of which the first is the first anchor.

    """
    at, steps = 0, list[int]()
    while at < size - 1:
        steps.append(accepted[at])
        at += accepted[at] + 1
    return steps


def _batches(data: list[Conversations], size: int) -> Iterator[Conversations]:
    for part in data:
        for rows in torch.arange(len(part)).split(size):
            yield part.take(rows.to(part.ids.device))
