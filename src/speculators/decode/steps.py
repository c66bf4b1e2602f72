"""One step of speculation: the draft proposes, the verifier verifies, accepted tokens are kept."""

from collections.abc import Sequence

from torch import Tensor

from speculators.decode.drafter import Drafter
from speculators.decode.tree import Tree
from speculators.decode.verification import VerifierPass, padded

__all__ = ["Steps"]


class Steps:
    """The parts of each step of one generation.

    Args:
        drafter: with an empty cache.
        verifier_pass: likewise.

    Attributes:
        rows: where the sequences that are still generated are in the tensors of a step: all
            sequences that are passed to a method, or that it returns something for, are in this
            order.
        states: (rows, length, verifier width), the verifier's hidden states at the tokens confirmed
            last, from which the draft continues.

    """

    states: Tensor

    def __init__(self, drafter: Drafter, verifier_pass: VerifierPass) -> None:
        self.drafter = drafter
        self.verifier_pass = verifier_pass
        self.rows = list(range(len(verifier_pass.cache.padding)))

    def prefill(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Run both models on the prompts, (rows, length), padded at the left.

        Returns:
            the verifier's logits after the last tokens, (rows, vocabulary).

        """
        logits, states = self.verifier_pass.prefill(tokens, attention_mask, position_ids)
        if tokens.shape[1] > 1:
            self.drafter.prefill(tokens[:, 1:].to(self.drafter.draft.device), states[:, :-1])
        self.states = states[:, -1:]
        return logits

    def propose(self, unseen: Sequence[Sequence[int]]) -> Tree:
        """Propose what may follow each sequence's last confirmed token.

        Args:
            unseen: by sequence, the confirmed tokens that the draft has not seen.

        """
        tokens = padded(unseen, self.drafter.draft.device)
        states = self.states[:, : tokens.shape[1]]
        return self.drafter.propose(tokens, states, [len(row) for row in unseen])

    def verify(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """See ``VerifierPass.verify``."""
        return self.verifier_pass.verify(tree)

    def keep(self, tree: Tree, paths: Sequence[Sequence[int]]) -> None:
        """Confirm, by sequence, the nodes of a path from the root, and discard the others."""
        self.states = self.verifier_pass.keep(tree, paths)

    def select(self, kept: Sequence[int]) -> None:
        """Drop all sequences but these, given by their places among those left."""
        rows = [self.rows[place] for place in kept]
        self.verifier_pass.cache.select(rows)
        self.drafter.cache.select(rows)
        self.states = self.states[rows]
        self.rows = list(range(len(rows)))
