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
from speculators.format.config import PROPOSALS, ProposalMethod

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
    size, depth, top_k = method.speculative_tokens, method.tree_depth, method.tree_top_k
    match method.proposal_type:
        case "greedy":
            return FixedTreeDrafter(draft, cache, chain(size))
        case "sampling":
            return SampledChainDrafter(draft, cache, size, warp)
        case "static_tree":
            if size != len(EAGLE1_TREE):
                raise GenerationError(
                    f"The static tree has {len(EAGLE1_TREE)} tokens, not {size}; "
                    "do not set the number of draft tokens."
                )
            return FixedTreeDrafter(draft, cache, EAGLE1_TREE)
        case "dynamic_tree":
            assert depth is not None
            assert top_k is not None
            candidates = top_k + depth * top_k**2
            if size > candidates:
                raise GenerationError(
                    f"A tree with tree_depth {depth} and tree_top_k {top_k} has {candidates} "
                    f"candidates, too few for {size} speculative_tokens; change one of them."
                )
            return DynamicTreeDrafter(draft, cache, size, depth, top_k)
        case unknown:
            raise GenerationError(
                f"Unknown proposal type {unknown!r}; choose one of {', '.join(PROPOSALS)}."
            )


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
