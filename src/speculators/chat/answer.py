"""One answer, step by step, as text; without torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Answer", "Drafted", "Piece", "Spelling", "Step", "depths_of"]

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers put for bytes that do not make up a character yet."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer's text.

    Attributes:
        text: what one token added to the text, perhaps with tokens before it that had to wait for
            the rest of a character.
        drafted: whether the draft had proposed it; otherwise it is the verifier's own.

    """

    text: str
    drafted: bool


@dataclass(frozen=True, slots=True)
class Drafted:
    """A proposed token.

    Attributes:
        text: of this token alone.
        parent: the index of the proposed token before it; -1 for the first of a chain.
        accepted: whether the verifier accepted it.

    """

    text: str
    parent: int
    accepted: bool


def depths_of(drafted: Sequence[Drafted]) -> list[int]:
    """The depth of each token of a proposal; 1 for those without one before them."""
    depths: list[int] = []
    for token in drafted:
        depths.append(1 + (depths[token.parent] if token.parent >= 0 else 0))
    return depths


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the verifier: what was proposed, and what became of the text.

    Attributes:
        drafted: the proposal; empty for the pass over the prompt.
        added: the number of tokens that it added to the answer.
        pieces: the text that these tokens added.
        own: the text of the verifier's own token alone; ``None`` if the answer ended before.

    """

    drafted: tuple[Drafted, ...]
    added: int
    pieces: tuple[Piece, ...]
    own: str | None

    @property
    def accepted(self) -> int:
        """The number of accepted tokens."""
        return sum(token.accepted for token in self.drafted)

    @property
    def offered(self) -> int:
        """The most that could have been accepted: the length of a chain, the depth of a tree."""
        return max(depths_of(self.drafted), default=0)


@dataclass
class Answer:
    """An answer to a prompt.

    Attributes:
        prompt: what was said.
        steps: in order; the first is the pass over the prompt.
        seconds: how long it took.

    """

    prompt: str
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for step in self.steps for piece in step.pieces)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(step.added for step in self.steps)

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per pass of the verifier on a proposal; ``None`` if there was none."""
        proposed = [step for step in self.steps if step.drafted]
        if not proposed:
            return None
        return 1 + sum(step.accepted for step in proposed) / len(proposed)


class Spelling:
    """Turns an answer's tokens into pieces of text, in order.

    A token that ends within a character gives no text; the token that completes it does.

    Args:
        decode: the text of a sequence of tokens.

    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._done = 0
        self._shown = ""

    def pieces(self, tokens: Iterable[tuple[int, bool]]) -> list[Piece]:
        """The text that tokens add, each given with whether it was drafted."""
        found = []
        for token, drafted in tokens:
            self._tokens.append(token)
            text = self._decode(self._tokens[self._done :])
            if text.endswith(INCOMPLETE):
                continue
            # What a token adds may depend on the one before it (a space, say), so decode both; a
            # window of a few tokens keeps that from growing with the answer.
            found.append(Piece(text[len(self._shown) :], drafted))
            self._shown = text
            if len(self._tokens) - self._done > 16:
                self._done = len(self._tokens) - 4
                self._shown = self._decode(self._tokens[self._done :])
        return found
