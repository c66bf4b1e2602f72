"""What a user can say about a DFlash, DFlash 2 or DSpark checkpoint."""

from typing import Any

from speculators.families.family import Option
from speculators.families.research.options import AUX_LAYERS, MASK_TOKEN_ID

__all__ = ["CAUSAL", "OPTIONS"]


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")  # noqa: TRY004
    return value


CAUSAL = Option(
    "causal",
    "",
    "Whether full layers of a draft in upstream's speculators format are causal inside a block; "
    "that format's own key does not tell.",
    _yes_or_no,
)

OPTIONS = (CAUSAL, AUX_LAYERS, MASK_TOKEN_ID)
