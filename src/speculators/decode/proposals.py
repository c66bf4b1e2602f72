"""The drafter for a draft and a proposal method."""

from speculators.decode.block import BlockDraft, BlockDrafter, SampledBlockDrafter
from speculators.decode.cache import BlockCache
from speculators.decode.context import ContextDraft, ContextDrafter
from speculators.decode.drafter import Draft, Drafter
from speculators.decode.recurrent import (
    DynamicTreeDrafter,
    FixedTreeDrafter,
    RecurrentDraft,
    SampledChainDrafter,
)
from speculators.decode.sampling import Warp
from speculators.decode.tree import EAGLE1_TREE, chain
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod
from speculators.format.proposals import check_sizes

__all__ = ["drafter_of"]


def drafter_of(draft: Draft, cache: BlockCache, method: ProposalMethod, warp: Warp) -> Drafter:
    """The drafter for a proposal method.

    Args:
        draft: the model.
        cache: an empty one.
        method: the type and sizes of proposals.
        warp: applied to the draft's logits if proposals are sampled.

    Raises:
        GenerationError: if the draft is of an unknown kind, the type is unknown, or the sizes are
            impossible.

    """
    if isinstance(draft, (ContextDraft, BlockDraft)):
        return _one_pass_drafter_of(draft, cache, method, warp)
    if not isinstance(draft, RecurrentDraft):
        raise GenerationError(
            f"{type(draft).__name__} is not a draft: it lacks members of "
            f"{RecurrentDraft.__module__}.{RecurrentDraft.__name__}."
        )
    check_sizes(method)
    match method.proposal_type:
        case "greedy":
            return FixedTreeDrafter(draft, cache, chain(method.speculative_tokens))
        case "sampling":
            return SampledChainDrafter(draft, cache, method.speculative_tokens, warp)
        case "static_tree":
            return FixedTreeDrafter(draft, cache, EAGLE1_TREE)
    depth, top_k = method.tree_depth, method.tree_top_k
    assert depth is not None
    assert top_k is not None
    return DynamicTreeDrafter(draft, cache, method.speculative_tokens, depth, top_k)


def _one_pass_drafter_of(
    draft: ContextDraft | BlockDraft, cache: BlockCache, method: ProposalMethod, warp: Warp
) -> Drafter:
    size, sampled = method.speculative_tokens, method.proposal_type == "sampling"
    if not sampled and method.proposal_type != "greedy":
        raise GenerationError(
            f"{type(draft).__name__} drafts all tokens in one pass, so it proposes chains, not "
            f"{method.proposal_type!r}; choose greedy or sampling."
        )
    if isinstance(draft, ContextDraft):
        return ContextDrafter(draft, cache, size, warp if sampled else None)
    if sampled:
        return SampledBlockDrafter(draft, cache, size, warp)
    return BlockDrafter(draft, cache, size)
