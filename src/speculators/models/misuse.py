"""Where transformers' own ways to generate end that do not work with a draft.

A draft proposes tokens from its verifier's hidden states; transformers has no place for that. Left
alone, it would fail over an attribute that is missing.
"""

import sys
from typing import Any, NoReturn

from transformers import GenerationConfig

from speculators.errors import GenerationError

__all__ = ["NotAnAssistant", "refuse_pipeline"]

PIPELINES = "transformers.pipelines"


class NotAnAssistant(GenerationConfig):
    """The generation config of all drafts; assisted generation, which copies it, is refused."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Refuse.

        Raises:
            GenerationError: always.

        """
        raise GenerationError(
            "This draft reads its verifier's hidden states, which transformers does not pass to "
            "an assistant_model: attach the verifier to the draft and call the draft's generate, "
            "draft.attach_verifier(verifier); draft.generate(**inputs)"
        )


def refuse_pipeline(name: str) -> None:
    """Refuse the caller of the caller if it is a pipeline; nothing else tells one.

    Args:
        name: the class of the draft.

    Raises:
        GenerationError: if it is.

    """
    if sys._getframe(2).f_globals.get("__name__", "").startswith(PIPELINES):
        raise GenerationError(
            f"Pipelines do not work with drafts: call {name}.generate with what the verifier's "
            "tokenizer returns, and decode the result with that tokenizer."
        )
