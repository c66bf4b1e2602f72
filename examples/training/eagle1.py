"""Drafts of EAGLE-1 and HASS, and their variant with three more norms."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.conversations import Conversations
from training.parts import SoftCrossEntropy
from training.recipes import Recipe
from training.recurrent import Layer, RecurrentDraft, places
from training.writing import LAST

READS = (LAST,)
"""It reads the verifier's last state."""

NOISE = 0.1
"""The largest noise added to the states in training, relative to their RMS (as EAGLE does)."""


class Eagle1Draft(RecurrentDraft):
    """A draft of one layer that goes from state to state."""

    def __init__(self, config: dict[str, Any], recipe: Recipe) -> None:
        super().__init__(config, READS)
        hidden, self.steps = config["hidden_size"], recipe.steps
        self.fc = nn.Linear(2 * hidden, hidden, bias=recipe.bias)
        self.layers = nn.ModuleList([Layer(config, hidden)])

        def norm() -> nn.Module:
            return (
                nn.RMSNorm(hidden, config["rms_norm_eps"]) if recipe.layernorms else nn.Identity()
            )

        self.embed_layernorm, self.hidden_layernorm, self.lm_head_layernorm = norm(), norm(), norm()

    def forward(
        self, embeddings: Tensor, states: Tensor, earlier: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The next states from embeddings and states, all (batch, length, hidden)."""
        fused = torch.cat((self.embed_layernorm(embeddings), self.hidden_layernorm(states)), -1)
        output: Tensor = self.layers[0](self.fc(fused), earlier).float()
        return output

    def losses(
        self, embed: nn.Module, head: Tensor, data: Conversations, tokens: int, depth: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``RecurrentDraft``: the cross-entropy, and how far states are from the verifier's."""
        row, learned = places(data, tokens)
        read = data.read(self.reads)
        wanted = read[row, learned].float()
        likeliest, shares = data.tokens[row, learned].long(), data.shares[row, learned].float()
        embeddings = embed(data.ids)
        length = data.ids.shape[1] - depth
        states, earlier = read[:, :length].float(), list[tuple[Tensor, Tensor]]()
        if self.training:
            noise = 2 * torch.rand_like(states) - 1
            states = states + NOISE * states.square().mean(-1, keepdim=True).sqrt() * noise
        for step in range(depth):
            reduced = head.dtype != torch.float32
            with torch.autocast(states.device.type, dtype=torch.bfloat16, enabled=reduced):
                states = self(embeddings[:, step + 1 : step + 1 + length], states, earlier)
                guessed = states[row, learned - step - 1]
                normed = self.lm_head_layernorm(guessed)
            cross_entropies, right = SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
                normed, head, likeliest, shares
            )
            distance = F.smooth_l1_loss(guessed.float(), wanted)
            yield cross_entropies.mean() + distance, right.mean()

    @torch.inference_mode()
    def start_from(self, weights: dict[str, Tensor], verifier: Any, data: Conversations) -> None:
        """Take the weights of another draft, which may lack the bias and the extra norms.

        A bias that is lacking starts at zero, and a norm with the mean RMS of what it normalises,
        so that it changes as little as possible.
        """
        if self.fc.bias is not None:
            self.fc.bias.zero_()
        self.load_state_dict(weights, strict=False)
        sample = data.take(torch.arange(min(len(data), 64)))
        answers = sample.in_answers()
        states = sample.read(self.reads)[answers].float()
        embeddings = verifier.get_input_embeddings()(sample.ids[answers])
        for norm, values in (
            (self.embed_layernorm, embeddings),
            (self.hidden_layernorm, states),
            (self.lm_head_layernorm, states),
        ):
            if isinstance(norm, nn.RMSNorm):
                norm.weight.fill_(values.square().mean(-1).sqrt().mean())
