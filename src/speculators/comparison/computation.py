"""Whether two drafts compute the same: their models, run on the same random inputs in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from loguru import logger
from torch import Tensor, nn

from speculators.checkpoint.output.writer import copy_file, write_safetensors_file
from speculators.comparison.difference import Computation
from speculators.comparison.side import Side
from speculators.convert.plan import plan_conversion
from speculators.convert.replan import unavailable
from speculators.errors import ConversionError, VerifierError
from speculators.families.converted import Converted, open_converted
from speculators.models.loading import load_converted, without_progress_bar
from speculators.models.speculator import Speculator

__all__ = ["compute"]

TOKENS, POSITIONS = 64, 4
TOLERANCE = 1e-6
"""The largest difference of outputs that are equal up to rounding, of the largest output."""


def compute(a: Side, b: Side) -> Computation:
    """Run both drafts.

    A draft that is not in the format is converted into a temporary directory for that.

    Args:
        a: one of them.
        b: the other.

    Raises:
        ConversionError: if one of them cannot be converted, or they take other inputs.

    """
    one, other = _outputs(a), _outputs(b)
    if one.shape != other.shape:
        raise ConversionError(
            f"{a.checkpoint.name} and {b.checkpoint.name} have outputs of different sizes, so what "
            "they compute cannot be compared; leave --compute out."
        )
    largest = float((one - other).abs().max())
    value = float(torch.maximum(one.abs().max(), other.abs().max()))
    return Computation(
        same=largest <= TOLERANCE * value, largest_difference=largest, largest_value=value
    )


def _outputs(side: Side) -> Tensor:
    """The last hidden states of a draft, and its logits, as one vector."""
    with _in_format(side) as converted, without_progress_bar():
        logger.disable(Speculator.__module__)  # it would warn that it has no verifier
        try:
            vocabulary, hidden = converted.config.verifier_sizes
            why = VerifierError("No verifier is needed.")
            verifier = unavailable("none", hidden, vocabulary, why)
            model = load_converted(converted, verifier=verifier, dtype=torch.float32)
        finally:
            logger.enable(Speculator.__module__)
        random = torch.Generator().manual_seed(0)
        # Whatever the verifier's matrices are, both drafts take the same.
        matrix = torch.randn(TOKENS, hidden, generator=random)
        if model.get_input_embeddings() is None:
            model.borrowed_embedding = nn.Embedding.from_pretrained(matrix)
        if model.get_output_embeddings() is None:
            model.borrowed_head = nn.Linear(hidden, TOKENS, bias=False)
            model.borrowed_head.weight = nn.Parameter(matrix, requires_grad=False)
        tokens = torch.randint(min(TOKENS, vocabulary), (1, POSITIONS), generator=random)
        width = hidden * max(len(model.verifier_layers), 1)
        states = torch.randn(1, POSITIONS, width, generator=random)
        with torch.inference_mode():
            output = model(input_ids=tokens, hidden_states=states)
        parts = (output.last_hidden_state, output.logits)
        return torch.cat([part.flatten() for part in parts if part is not None])


@contextmanager
def _in_format(side: Side) -> Iterator[Converted]:
    """A draft in the format; converted into a temporary directory if it is not."""
    if side.converted is not None:
        yield side.converted
        return
    if side.plan is None or side.verifier is None:
        raise ConversionError(
            f"{side.checkpoint.name} cannot be converted, so it cannot be run; leave --compute out."
        )
    verifier = replace(side.verifier, architectures=side.verifier.architectures or ("unknown",))
    family, checkpoint = side.plan.family, side.checkpoint
    plan = plan_conversion(family, checkpoint, verifier, options=side.options)
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "config.json").write_text(plan.config.model_dump_json(exclude_none=True))
        write_safetensors_file(directory / "model.safetensors", plan.tensors)
        for name, companion in plan.companions.items():
            copy_file(companion.file, companion.identity, directory / name)
        yield open_converted(directory)
