"""Proof that a written directory holds and computes what its source does."""

import torch
from loguru import logger

from speculators.checkpoint.progress import Progress, silent
from speculators.convert.checks.embedding import tell_of_untrained_embedding
from speculators.convert.checks.tensors import compare_configs, compare_tensors
from speculators.convert.plan import ConversionPlan
from speculators.errors import ValidationError
from speculators.families.converted import Converted
from speculators.families.family import imported
from speculators.models.loading import load_converted, without_progress_bar

__all__ = ["validate_conversion", "validate_model"]


def validate_conversion(
    plan: ConversionPlan, written: Converted, *, progress: Progress = silent
) -> list[str]:
    """Prove that what was written is what ``plan`` says.

    The config must be the plan's. The tensors' bytes must equal the source's or, if the plan rounds
    them, their values must be those that torch rounds the source's to. The rest is up to
    ``validate_model``.

    Returns:
        What could not be checked, in sentences; see ``validate_model``.

    Raises:
        ValidationError: if any of this does not hold.
        VerifierError: if the verifier is a draft.

    """
    logger.info("Validating converted checkpoint...")
    compare_configs(plan, written)
    compare_tensors(plan, written, progress)
    tell_of_untrained_embedding(plan)
    return validate_model(plan, written)


def validate_model(plan: ConversionPlan, written: Converted) -> list[str]:
    """Prove that the model of a converted draft computes what the tensors of ``plan`` say.

    The model must load as by ``from_pretrained``, with finite tensors. On seeded random inputs,
    its output must be finite and causal, and equal a float32 computation of the family's reference
    with the plan's tensors (rounded if the plan rounds them; the log then says how much that
    changes). Its logits must be those of the verifier's head.

    Both the model and the reference compute with the config that the plan derives, so a key of the
    source's config that is misread cannot be found here.

    Returns:
        What could not be checked, in sentences that are also logged: for instance the logits, if
        the verifier's weights are not available.

    Raises:
        ValidationError: if any of this does not hold.
        VerifierError: if the verifier is a draft.

    """
    try:
        with without_progress_bar():
            model = load_converted(written, verifier=plan.verifier, dtype=torch.float32)
    except Exception as error:  # transformers lets errors of many types through
        raise ValidationError(f"The converted checkpoint does not load: {error}") from error
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            whose = (
                f"the verifier {plan.verifier.name} is damaged"
                if name.startswith("borrowed_")
                else "the source is damaged, or its training diverged"
            )
            raise ValidationError(
                f"{name} has values that are not finite (NaN or infinity), so it drafts nothing; "
                f"{whose}."
            )
    logger.success("Model loaded successfully")
    check = imported(plan.family.check)(plan, model)
    with torch.inference_mode():
        check.run()
    logger.success("Forward pass successful")
    unchecked: list[str] = check.unchecked
    return unchecked
