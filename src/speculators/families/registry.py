"""The families, and what else is recognised, in the order in which a checkpoint is judged.

A new family is one line here.
"""

from speculators.families import foreign, foreign_blocks, foreign_mtp
from speculators.families.dflash import DFLASH, DFLASH2, DSPARK
from speculators.families.eagle import EAGLE
from speculators.families.eagle3 import EAGLE3
from speculators.families.family import Family, Flag, Option
from speculators.families.medusa import MEDUSA
from speculators.families.signature import Signature

__all__ = [
    "KNOWN",
    "families",
    "family_named",
    "flags_of",
    "options_of",
    "signatures",
]

KNOWN: tuple[Family | Signature, ...] = (
    foreign.CONVERTED,
    foreign_mtp.MTP_OF_UPSTREAM,
    foreign_blocks.XPRESS_OF_UPSTREAM,
    foreign.DRAFT_IN_MODEL,
    foreign.UNO,
    foreign.GRIFFIN,
    foreign.MINICPM,
    foreign_blocks.DSPARK_OF_DEEPSEEK,
    foreign.MEDUSA_IN_MODEL,
    foreign_blocks.LAGUNA,
    foreign_blocks.DFLARE,
    foreign_blocks.DOMINO,
    foreign_blocks.XPRESS,
    foreign_blocks.LILICORR,
    foreign_blocks.MUSE,
    *foreign_blocks.OTHER_DSPARKS,
    DSPARK,
    DFLASH2,
    DFLASH,
    foreign.GEMMA_ASSISTANT,
    *foreign_mtp.MTP,
    foreign.EAGLE3_HEADS,
    foreign.EAGLE3_EH_PROJ,
    foreign.EAGLE3_MLA,
    EAGLE3,
    foreign.PARD,
    foreign.LANGUAGE_MODEL,
    foreign.SEVERAL_LAYERS,
    MEDUSA,
    foreign.HYDRA,
    foreign.MLP_SPECULATOR,
    foreign.ONE_MATRIX,
    foreign.LLAMA4,
    foreign.GROUPED_HEADS,
    foreign.QK_NORMS,
    foreign.COHERE,
    foreign.DEEPSEEK,
    foreign.WITH_NORMS,
    foreign.MISTRAL,
    EAGLE,
)
"""A checkpoint belongs to the first one that it matches."""


def families() -> list[Family]:
    """All families."""
    return [known for known in KNOWN if isinstance(known, Family)]


def family_named(name: object) -> Family | None:
    """The family of this name, or with drafts of this ``speculators_model_type``."""
    return next((it for it in families() if name in (it.name, *it.model_types)), None)


def options_of(family: Family | None) -> list[Option]:
    """The options of a family's conversion; those of all families if ``None``."""
    among = [family] if family else families()
    return list({option.name: option for it in among for option in it.options}.values())


def flags_of(family: Family | None) -> list[Flag]:
    """The flags of a family's conversion; those of all families if ``None``."""
    among = [family] if family else families()
    return list({flag.feature: flag for it in among for flag in it.flags}.values())


def signatures() -> list[tuple[Signature, Family | None]]:
    """How everything is recognised, in order, with the family that it then belongs to."""
    return [
        (known.signature, known) if isinstance(known, Family) else (known, None) for known in KNOWN
    ]
