"""What speculation would accept, found without speculation: along the verifier's own output.

Greedy speculation yields the verifier's own tokens, so which of a draft's tokens it accepts follows
from these. That needs no cache that can be rolled back, which verifiers with linear attention lack:
the verifier generates alone, one more pass over the whole output gives its hidden states, and the
draft proposes at every place where speculation would have asked it to.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from speculators.decode.cache import BlockCache
from speculators.decode.capture import StateCapture
from speculators.decode.drafter import Draft
from speculators.decode.loop import Generation
from speculators.decode.proposals import drafter_of
from speculators.decode.refusals import check_proposal
from speculators.decode.sampling import warp_of
from speculators.decode.verification import children_of, depth_of, known_choice, walk
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod

__all__ = ["draft_along"]


@torch.no_grad()
def draft_along(
    draft: Draft,
    verifier: PreTrainedModel,
    input_ids: Tensor,
    *,
    proposal: ProposalMethod,
    generation: GenerationConfig,
    **settings: Any,
) -> Generation:
    """Generate greedily with the verifier alone, and count what speculation would accept.

    The counts are those of ``speculate``, but for the last step, of which nothing is counted beyond
    the end of the output, and up to rounding: the verifier's states come from another pass.

    Args:
        draft: a draft for the verifier.
        verifier: a causal language model of transformers, whatever its cache.
        input_ids: (1, length), one prompt.
        proposal: how the draft proposes; not by sampling.
        generation: greedy.
        **settings: further arguments of the verifier's ``generate``.

    Raises:
        GenerationError: if tokens would be sampled, or there are several prompts.

    """
    check_proposal(proposal)
    if generation.do_sample or proposal.proposal_type == "sampling" or len(input_ids) != 1:
        raise GenerationError(
            "A draft can follow the verifier's own output only greedily and one prompt at a time; "
            "set temperature 0, and propose greedily or by a tree."
        )
    sequences: Tensor = verifier.generate(  # type: ignore[operator]
        input_ids, generation_config=generation, **settings
    )
    with StateCapture(verifier, draft.verifier_layers) as capture:
        verifier(sequences[:, :-1], use_cache=False, logits_to_keep=1)
        states = capture.take()
    tokens = sequences[0].tolist()
    drafter = drafter_of(draft, BlockCache([0]), proposal, warp_of(LogitsProcessorList()))
    known = input_ids.shape[1]
    if known > 1:
        drafter.prefill(sequences[:, 1:known], states[:, : known - 1])
    accepted, offered = [], []
    last, new = known, 1  # the last confirmed token, and how many the draft has not seen
    while last < len(tokens) - 1:
        tree = drafter.propose(
            sequences[:, last + 1 - new : last + 1], states[:, last - new : last], [new]
        )
        parents = tree.parents[0].tolist()
        children = children_of(tree.tokens[0].tolist(), parents)
        path, _ = walk(children, known_choice(tokens[last + 1 :]))
        accepted.append(len(path) - 1)
        offered.append(depth_of(parents))
        last, new = last + len(path), len(path)
    return Generation(sequences, [accepted], [offered])
