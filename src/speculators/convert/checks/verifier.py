"""Whether the verifier is one, and has the matrices that the draft takes from it."""

import torch

from speculators.checkpoint.reader import read_tensors
from speculators.checkpoint.tensor import PlannedTensor, TensorInfo
from speculators.checkpoint.verifier import Verifier
from speculators.convert.checks.planned import planned_matrix
from speculators.errors import (
    CheckpointError,
    IncompleteVerifierError,
    NotFetchedError,
    NoWeightsError,
    SpeculatorsError,
    ValidationError,
    VerifierError,
)
from speculators.families.recognition import recognise
from speculators.models.blocks import row_blocks
from speculators.models.tensors import TORCH_DTYPES

__all__ = [
    "check_head_of_source",
    "is_incomplete",
    "refuse_draft_as_verifier",
    "refuse_incomplete",
]


def refuse_draft_as_verifier(verifier: Verifier) -> None:
    """Refuse a draft as the verifier: it has no head, but its config looks like its verifier's."""
    if verifier.repository.commit is not None:
        return  # listing its tensors would download all of its weights
    try:
        tensors = read_tensors(verifier.repository)
    except SpeculatorsError:
        return  # the caller reports why there is no head
    signature = recognise({}, tensors).signature
    if signature is not None and signature.kind != "language-model":
        raise VerifierError(
            f"The verifier {verifier.name} holds {signature.title}; give the language model that "
            "the draft was trained for."
        )


def refuse_incomplete(verifier: Verifier) -> None:
    """Refuse a verifier whose weights are there, but not its embedding."""
    try:
        verifier.embedding()
    except SpeculatorsError as error:
        if is_incomplete(error):
            refuse_draft_as_verifier(verifier)
            raise
        # Otherwise, the caller says that it is not available.


def is_incomplete(error: SpeculatorsError) -> bool:
    """Whether an error says of a verifier that its weights are there, but damaged or not all."""
    return isinstance(error, IncompleteVerifierError | CheckpointError) and not isinstance(
        error, NoWeightsError | NotFetchedError
    )


def check_head_of_source(own: TensorInfo, verifiers: TensorInfo) -> None:
    """Check that a head which is left out is the verifier's, which takes its place.

    Raises:
        ValidationError: if not.

    """
    dtypes = (TORCH_DTYPES[own.dtype], TORCH_DTYPES[verifiers.dtype])
    dtype = min(dtypes, key=lambda it: torch.finfo(it).bits)
    ours, theirs = (planned_matrix(PlannedTensor.copy_of(info)) for info in (own, verifiers))
    if own.shape != verifiers.shape or not all(
        torch.equal(ours[start:stop].to(dtype), theirs[start:stop].to(dtype))
        for start, stop in row_blocks(own.shape)
    ):
        raise ValidationError(
            f"{own.file} has an {own.name} that is not the verifier's, while such a draft uses "
            "the verifier's head; check that the verifier is the one it was trained for."
        )
