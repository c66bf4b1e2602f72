"""How much of a chain of drafted tokens would have been accepted, computed with our own model.

Neither an engine nor our decoding loop takes part: the answers are known, so every step of greedy
speculation follows from the verifier's hidden states over a whole answer and the draft's forward
pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators.models.eagle import EagleSpeculator


@dataclass
class Simulation:
    """The number of chains drafted, and how many of them were right up to each position."""

    drafts: int
    accepted: list[int]

    @property
    def acceptance_length(self) -> float:
        return 1 + sum(self.accepted) / self.drafts


@dataclass(frozen=True)
class Known:
    """A conversation, the verifier's next tokens after it, and its states at all of them."""

    prompt_tokens: int
    end: int
    tokens: Tensor
    states: Tensor


@torch.no_grad()
def known(
    verifier: Any, prompts: list[list[int]], answers: list[list[int]], length: int
) -> list[Known]:
    """What chains of ``length`` tokens are compared with: once for all drafts of a verifier."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        longer = {"max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
        tokens = verifier.generate(ids, do_sample=False, **longer)
        states = verifier.model(tokens).last_hidden_state
        found.append(Known(len(prompt), ids.shape[1], tokens, states))
    return found


@torch.no_grad()
def simulate(draft: EagleSpeculator, conversations: list[Known], length: int) -> Simulation:
    """Draft ``length`` tokens after every token that comes from the verifier itself.

    Those drafted and accepted beyond the end of an answer count, as they do in vLLM.
    """
    found = Simulation(0, [0] * length)
    for conversation in conversations:
        tokens, hidden = conversation.tokens, conversation.states
        # Attention is causal, so one pass gives the first token of every chain.
        first = draft(tokens[:, 1:], hidden[:, :-1])
        settled = conversation.prompt_tokens + 1  # the prompt's pass gives the first token
        while settled < conversation.end:
            right = 0
            chain, states = tokens[:, :settled], hidden[:, : settled - 1]
            guess, state = _at(first.logits, settled - 2), first.last_hidden_state
            state = state[:, settled - 2 : settled - 1]
            while guess == tokens[0, settled + right]:
                right += 1
                if right == length:
                    break
                chain = torch.cat((chain, guess.view(1, 1)), 1)
                states = torch.cat((states, state), 1)
                output = draft(chain[:, 1:], states, logits_to_keep=1)
                guess, state = _at(output.logits, -1), output.last_hidden_state[:, -1:]
            found.drafts += 1
            for position in range(right):
                found.accepted[position] += 1
            settled += right + 1
    return found


def _at(logits: Tensor, position: int) -> Tensor:
    return logits[0, position].argmax()
