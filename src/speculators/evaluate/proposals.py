"""Which ways of proposing tokens are measured."""

from collections.abc import Sequence

from speculators.format.config import ProposalMethod, SpeculatorsConfig

__all__ = ["choose_proposals"]


def choose_proposals(
    config: SpeculatorsConfig, proposal_type: str | None, lengths: Sequence[int] | None
) -> list[ProposalMethod]:
    """The proposal methods to measure: one for each draft length.

    Args:
        config: the draft's; its method of this type is the base, with all its other settings.
        proposal_type: ``greedy``, ...; the config's default if not given.
        lengths: numbers of drafted tokens; the config's number if not given.

    """
    wanted = proposal_type or config.default_proposal_method
    base = next(
        (method for method in config.proposal_methods if method.proposal_type == wanted),
        ProposalMethod(proposal_type=wanted),
    )
    return [
        base.model_copy(update={"speculative_tokens": length})
        for length in lengths or [base.speculative_tokens]
    ]
