"""Which ways of proposing tokens a draft has, and which sizes are possible; without torch."""

from pydantic import ValidationError

from speculators.errors import GenerationError, did_you_mean
from speculators.format.config import PROPOSALS, ProposalMethod, SpeculatorsConfig
from speculators.format.problems import first_problem

__all__ = ["CHAINS", "check_sizes", "proposal_method", "resized"]

CHAINS = ("greedy", "sampling")
"""The proposal types that are chains."""


def proposal_method(
    config: SpeculatorsConfig,
    proposal: str | None = None,
    num_draft_tokens: int | None = None,
    drafted_per_block: int | None = None,
) -> ProposalMethod:
    """The proposal method of a draft that is meant.

    Args:
        config: the draft's.
        proposal: the type; the config's default if not given.
        num_draft_tokens: in place of the method's ``speculative_tokens``.
        drafted_per_block: the most tokens that a block of the draft drafts, if it drafts in
            blocks. A chain has as many where the config does not say how many.

    Raises:
        GenerationError: as for ``resized``.

    """
    name = proposal or config.default_proposal_method
    named = [method for method in config.proposal_methods if method.proposal_type == name]
    if not isinstance(name, str):
        raise GenerationError(
            f"A proposal is one of {', '.join(PROPOSALS)}, or a ProposalMethod, not {name!r}."
        )
    method = named[0] if named else ProposalMethod(proposal_type=name)
    if num_draft_tokens is None and not named and name in CHAINS:
        num_draft_tokens = drafted_per_block
    if num_draft_tokens is None:
        return method
    return resized(method, num_draft_tokens)


def resized(method: ProposalMethod, num_draft_tokens: int) -> ProposalMethod:
    """The method with another number of tokens to draft.

    Raises:
        GenerationError: if that is no such number.

    """
    sized = method.model_dump() | {"speculative_tokens": num_draft_tokens}
    try:
        return ProposalMethod.model_validate(sized)
    except ValidationError as error:
        raise GenerationError(
            f"{num_draft_tokens!r} is not a number of tokens to draft: "
            f"{first_problem(error).message}."
        ) from error


def check_sizes(method: ProposalMethod) -> None:
    """Check that proposals of a method's type can have its sizes.

    Raises:
        GenerationError: if not, or the type is unknown.

    """
    size, depth, top_k = method.speculative_tokens, method.tree_depth, method.tree_top_k
    if method.proposal_type not in PROPOSALS:
        raise GenerationError(
            f"Unknown proposal type {method.proposal_type!r}"
            f"{did_you_mean(method.proposal_type, PROPOSALS)}; choose one of "
            f"{', '.join(PROPOSALS)}."
        )
    static = PROPOSALS["static_tree"]["speculative_tokens"]
    if method.proposal_type == "static_tree" and size != static:
        raise GenerationError(
            f"The static tree has {static} tokens, not {size}; "
            "do not set the number of draft tokens."
        )
    if method.proposal_type == "dynamic_tree":
        assert depth is not None
        assert top_k is not None
        candidates = top_k + depth * top_k**2
        if size > candidates:
            raise GenerationError(
                f"A tree with tree_depth {depth} and tree_top_k {top_k} has {candidates} "
                f"candidates, too few for {size} speculative_tokens; change one of them."
            )
