"""What a user can say about an EAGLE-3 checkpoint where its files leave it open."""

from speculators.families.family import Option
from speculators.families.research.options import AUX_LAYERS, MASK_TOKEN_ID, one_of

__all__ = ["AUX_NUMBERING", "NORM_OUTPUT", "OPTIONS"]

AUX_NUMBERING = Option(
    "aux_numbering",
    "input|output",
    "How the numbers of these layers are meant, in --aux-layers or in the draft's config.json: "
    "input, the state that enters layer N (default of --aux-layers); output, the one that "
    "leaves it.",
    one_of("input", "output"),
)
NORM_OUTPUT = Option(
    "norm_output",
    "feedback|head-only",
    "What norm_output in the draft's config.json means: feedback, the output after the final norm "
    "is fed back (EAGLE-3.1); head-only, the norm is only applied before the head.",
    one_of("feedback", "head-only"),
)
OPTIONS = (AUX_LAYERS, AUX_NUMBERING, NORM_OUTPUT, MASK_TOKEN_ID)
