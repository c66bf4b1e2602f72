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

    """

    def __init__(self, drafter: Drafter, verifier_pass: VerifierPass) -> None:
        self.drafter = drafter
        self.verifier_pass = verifier_pass

    def prefill(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run both models on the prompts, (rows, length), padded at the left.

        Returns:
            the verifier's logits after the last tokens, (rows, vocabulary), and its hidden states
            at them, (rows, 1, verifier width).

        """
        logits, states = self.verifier_pass.prefill(tokens, attention_mask, position_ids)
        if tokens.shape[1] > 1:
            self.drafter.prefill(tokens[:, 1:].to(self.drafter.draft.device), states[:, :-1])
        return logits, states[:, -1:]

    def propose(self, unseen: Sequence[Sequence[int]], states: Tensor) -> Tree:
        """Propose what may follow each row's last confirmed token.

        Args:
            unseen: by row, the confirmed tokens that the draft has not seen.
            states: (rows, length of the longest, verifier width), the verifier's hidden state at
                the token before each of them.

        """
        tokens = padded(unseen, self.drafter.draft.device)
        return self.drafter.propose(tokens, states, [len(row) for row in unseen])

    def verify(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """See ``VerifierPass.verify``."""
        return self.verifier_pass.verify(tree)

    def keep(self, tree: Tree, paths: Sequence[Sequence[int]]) -> Tensor:
        """Confirm, by row, the nodes of a path from the root, and discard the others.

        Returns:
            the verifier's hidden states at them, (rows, length of the longest, verifier width).

        """
        return self.verifier_pass.keep(tree, paths)

    def select(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.verifier_pass.cache.select(rows)
        self.drafter.cache.select(rows)
