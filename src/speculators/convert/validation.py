"""Proof that a written directory holds and computes what its source does.

Comparing bytes needs no torch, so it does not wait for it; see ``import_ahead``.
"""

from typing import TYPE_CHECKING

from loguru import logger

from speculators.checkpoint.progress import Progress, silent
from speculators.convert.checks.tensors import compare_configs, compare_tensors
from speculators.convert.plan import ConversionPlan
from speculators.errors import ValidationError
from speculators.families.converted import Converted
from speculators.families.family import imported

if TYPE_CHECKING:
    from hashlib import _Hash

    from speculators.models.speculator import Speculator

__all__ = ["validate_conversion", "validate_model"]


def validate_conversion(
    plan: ConversionPlan,
    written: Converted,
    *,
    progress: Progress = silent,
    digest: "_Hash | None" = None,
) -> list[str]:
    """Prove that what was written is what ``plan`` says.

    The config must be the plan's. The tensors' bytes must equal the source's or, if the plan rounds
    them, their values must be those that torch rounds the source's to. The rest is up to
    ``validate_model``.

    Args:
        plan: the plan of the conversion.
        written: what was written.
        progress: reports the bytes compared.
        digest: is given the file of the weights as it is compared, see ``compare_tensors``.

    Returns:
        What could not be checked, in sentences; see ``validate_model``.

    Raises:
        ValidationError: if any of this does not hold.
        VerifierError: if the verifier is a draft.

    """
    logger.info("Validating converted checkpoint...")
    compare_configs(plan, written)
    compare_tensors(plan, written, progress, digest)

    from speculators.convert.checks.embedding import warn_of_untrained_embedding
    from speculators.models.blocks import single_threaded

    with single_threaded():
        warn_of_untrained_embedding(plan)
        return validate_model(plan, written)


def validate_model(plan: ConversionPlan, written: Converted) -> list[str]:
    """Prove that the model of a converted draft computes what the tensors of ``plan`` say.

    The model must load as by ``from_pretrained``, with finite tensors. On seeded random inputs,
    its output must be finite and causal, and equal a float32 computation of the family's reference
    with the plan's tensors (rounded if the plan rounds them; the log then says how much that
    changes). Its logits must be those of the verifier's head.

    Both sides compute with matrices in blocks of rows, and leave them where they are stored, so
    memory does not grow with the checkpoint.

    Both the model and the reference compute with the config that the plan derives, so a key of the
    source's config that is misread cannot be found here.

    Returns:
        What could not be checked, in sentences that are also logged: for instance the logits, if
        the verifier's weights are not available.

    Raises:
        ValidationError: if any of this does not hold.
        VerifierError: if the verifier is a draft.

    """
    import torch

    from speculators.models.blocks import single_threaded
    from speculators.models.loading import load_converted, without_progress_bar

    try:
        with without_progress_bar():
            model = load_converted(written, verifier=plan.verifier, upcasting=True)
    except Exception as error:  # transformers lets errors of many types through
        raise ValidationError(f"The converted checkpoint does not load: {error}") from error
    with single_threaded(), torch.inference_mode():
        _check_finite(plan, model)
        logger.success("Model loaded successfully")
        check = imported(plan.family.check)(plan, model)
        check.run()
    logger.success("Forward pass successful")
    unchecked: list[str] = check.unchecked
    return unchecked


def _check_finite(plan: ConversionPlan, model: "Speculator") -> None:
    from speculators.models.blocks import all_finite

    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            whose = (
                f"the verifier {plan.verifier.name} is damaged"
                if name.startswith("borrowed_")
                else "the source is damaged, or its training diverged"
            )
            raise ValidationError(
                f"{name} has values that are not finite (NaN or infinity), so it cannot draft; "
                f"{whose}."
            )
