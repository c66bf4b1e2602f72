"""The families, and what else is recognised, in the order in which a checkpoint is judged.

A new family is one line here.
"""

from speculators.families import foreign
from speculators.families.eagle import EAGLE
from speculators.families.family import Family
from speculators.families.signature import Signature

__all__ = ["KNOWN", "families", "family_named", "signatures"]

KNOWN: tuple[Family | Signature, ...] = (
    foreign.CONVERTED,
    foreign.DRAFT_IN_MODEL,
    foreign.GRIFFIN,
    foreign.MINICPM,
    foreign.EAGLE3,
    foreign.LANGUAGE_MODEL,
    foreign.SEVERAL_LAYERS,
    foreign.MEDUSA,
    foreign.MLP_SPECULATOR,
    foreign.ONE_MATRIX,
    foreign.LLAMA4,
    foreign.GROUPED_HEADS,
    foreign.QK_NORMS,
    foreign.WITH_NORMS,
    foreign.MISTRAL,
    EAGLE,
)
"""A checkpoint belongs to the first one that it matches."""


def families() -> list[Family]:
    """All families."""
    return [known for known in KNOWN if isinstance(known, Family)]


def family_named(name: object) -> Family | None:
    """The family of this name, which is also its ``speculators_model_type``."""
    return next((family for family in families() if family.name == name), None)


def signatures() -> list[tuple[Signature, Family | None]]:
    """How everything is recognised, in order, with the family that it then belongs to."""
    return [
        (known.signature, known) if isinstance(known, Family) else (known, None) for known in KNOWN
    ]
