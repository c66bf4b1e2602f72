"""Sampling the tokens of a proposal from the draft's own distribution."""

from torch import Tensor

from speculators.decode.drafter import Draft
from speculators.decode.sampling import Warp, draw

__all__ = ["drafted_distribution", "draw_drafted"]

CANDIDATES = 1024
"""How many of the draft's best tokens a proposal is sampled from.

Speculative sampling is exact for any proposal distribution, as long as it is known. One over the
best tokens alone is much cheaper to warp, above all by ``top_p``, which sorts it, and its proposals
are accepted about as often.
"""


def drafted_distribution(draft: Draft, warp: Warp, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The distributions over a draft's best tokens that proposals are sampled from.

    Args:
        draft: the model.
        warp: applied to the logits.
        logits: (rows, draft vocabulary).

    Returns:
        the probabilities and the tokens, by the verifier's ids, both (rows, candidates).

    """
    best, candidates = logits.topk(min(CANDIDATES, logits.shape[1]))
    return warp(best.float()).softmax(-1), draft.to_verifier(candidates)


def draw_drafted(draft: Draft, warp: Warp, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sample from a draft's distributions over its best tokens.

    Args:
        draft: the model.
        warp: applied to the logits.
        logits: (rows, draft vocabulary).

    Returns:
        tokens, (rows, 1), by the verifier's ids; and the distributions that they were sampled from,
        (rows, verifier vocabulary).

    """
    q, tokens = drafted_distribution(draft, warp, logits)
    over_all = q.new_zeros(len(q), draft.verifier_vocab_size).scatter(1, tokens, q)
    return tokens.gather(1, draw(q)), over_all
