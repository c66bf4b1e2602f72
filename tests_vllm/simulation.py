"""What a chain of drafted tokens would have been accepted, by the draft as our own model.

No engine is in it: the answers are known, so every step of greedy speculation follows from the
verifier's hidden states over a whole answer and the draft's forward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from speculators.models.eagle import EagleSpeculator


@dataclass
class Simulation:
    """How many chains were drafted, and how many of them were right up to each position."""

    drafts: int
    accepted: list[int]

    @property
    def acceptance_length(self) -> float:
        return 1 + sum(self.accepted) / self.drafts


@torch.no_grad()
def simulate(
    draft: EagleSpeculator,
    verifier: LlamaForCausalLM,
    prompts: list[list[int]],
    answers: list[list[int]],
    length: int,
) -> Simulation:
    """Draft ``length`` tokens after every token that the verifier settles itself."""
    found = Simulation(0, [0] * length)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer])
        hidden = verifier.model(tokens).last_hidden_state
        settled = len(prompt) + 1  # the prompt's pass gives the first token
        while settled < tokens.shape[1]:
            left = min(length, tokens.shape[1] - settled - 1)
            if left == 0:
                break
            chain = _draft(draft, tokens[:, :settled], hidden[:, : settled - 1], left)
            right = (chain == tokens[0, settled : settled + left]).long().cumprod(0)
            found.drafts += 1
            for position in range(int(right.sum())):
                found.accepted[position] += 1
            settled += int(right.sum()) + 1
    return found


def _draft(draft: EagleSpeculator, tokens: Tensor, hidden: Tensor, length: int) -> Tensor:
    """The chain after ``tokens``, of which all but the last have a hidden state."""
    for _ in range(length):
        output = draft(tokens[:, 1:], hidden, logits_to_keep=1)
        tokens = torch.cat((tokens, output.logits[:, -1].argmax(-1, keepdim=True)), 1)
        hidden = torch.cat((hidden, output.last_hidden_state[:, -1:]), 1)
    return tokens[0, -length:]
