"""Proof that a written directory holds and computes what its source does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.utils import logging as transformers_logging

from speculators.checkpoint.reader import read_tensors
from speculators.checkpoint.repository import LocalDirectory
from speculators.checkpoint.tensor import TensorInfo
from speculators.checkpoint.writer import contiguous_chunks
from speculators.convert.eagle.plan import ConversionPlan
from speculators.convert.eagle.reference import PlainDraft
from speculators.convert.families import strip_prefix
from speculators.errors import SpeculatorsError, ValidationError
from speculators.models.eagle import EagleOutput, EagleSpeculator
from speculators.models.tensors import read_tensor

__all__ = ["TOLERANCE", "validate_conversion"]

TOLERANCE = 1e-4
"""Largest difference between model and plain evaluation, over the largest value (at least 1)."""

SEED, BATCH, LENGTH = 20240126, 2, 24


def validate_conversion(
    plan: ConversionPlan, directory: Path, *, cache_dir: str | Path | None = None
) -> None:
    """Prove that ``directory`` is what ``plan`` says.

    The tensors' bytes equal the source's and are finite; the model loads through
    ``from_pretrained``; on seeded random inputs its output is finite, does not depend on what
    comes later, and equals a plain float32 evaluation of the source's own tensors; its logits are
    those of the verifier's head. If the verifier's weights cannot be had, everything else is
    checked, and the log says that logits were not.

    Raises:
        ValidationError: if anything of this is not so.

    """
    logger.info("Validating converted checkpoint...")
    _compare_bytes(plan.tensors, read_tensors(LocalDirectory(directory)))
    try:
        with _without_progress_bar():
            model = EagleSpeculator.from_pretrained(
                directory, dtype=torch.float32, cache_dir=cache_dir
            )
    except Exception as error:  # transformers lets errors of many kinds through
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
    with torch.inference_mode():
        _check_forward(plan, model)
    logger.success("Forward pass successful")


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers' bar, which appears even where there is no terminal, out of the log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _compare_bytes(source: Mapping[str, TensorInfo], written: Mapping[str, TensorInfo]) -> None:
    if source.keys() != written.keys():
        raise ValidationError(
            "The converted checkpoint has other tensors than planned: "
            f"{', '.join(sorted(source.keys() ^ written.keys()))}."
        )
    for name, info in source.items():
        copy = written[name]
        with copy.file.open("rb") as file:
            file.seek(copy.offset)
            same = all(file.read(len(chunk)) == chunk for chunk in contiguous_chunks(info))
        if not same or (info.dtype, info.shape) != (copy.dtype, copy.shape):
            raise ValidationError(f"{name} differs from {info.name} of the source {info.file}.")
    logger.debug(f"The bytes of {len(source)} tensors equal the source's")


def _check_forward(plan: ConversionPlan, model: EagleSpeculator) -> None:
    sizes = plan.config.transformer_layer_config
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(sizes.vocab_size, (BATCH, LENGTH), generator=generator)
    hidden_states = torch.randn(BATCH, LENGTH, sizes.hidden_size, generator=generator)
    if model.get_input_embeddings() is None:
        logger.warning("The verifier's embedding cannot be had: a random one is validated with")
        stand_in = torch.randn(sizes.vocab_size, sizes.hidden_size, generator=generator)
        model.embed_tokens = nn.Embedding.from_pretrained(stand_in)

    drafted = _drafted(model, input_ids, hidden_states)
    if not drafted.isfinite().all():
        raise ValidationError(
            "The forward pass gives values that are not finite; the source's weights are too large."
        )
    changed_ids, changed_states = input_ids.clone(), hidden_states.clone()
    changed_ids[:, -1] = (changed_ids[:, -1] + 1) % sizes.vocab_size
    changed_states[:, -1] = -changed_states[:, -1]
    _check_same(
        "The output depends on later positions: the attention is not causal",
        _drafted(model, changed_ids, changed_states)[:, :-1],
        drafted[:, :-1],
    )

    plain = PlainDraft(_source_tensors(plan), sizes)
    if reason := plain.cannot_evaluate():
        logger.warning(f"The output was not compared with a plain evaluation: {reason}")
        expected = drafted
    else:
        expected = torch.stack(
            [
                plain(_embedded(plan, model, ids), states)
                for ids, states in zip(input_ids, hidden_states, strict=True)
            ]
        )
        _check_same("The output is not what the source's tensors compute", drafted, expected)
    _check_logits(plan, model, input_ids, hidden_states, plain.before_head(expected))


def _check_logits(
    plan: ConversionPlan,
    model: EagleSpeculator,
    input_ids: Tensor,
    hidden_states: Tensor,
    before_head: Tensor,
) -> None:
    try:
        info = plan.verifier.head()
    except SpeculatorsError as error:
        logger.warning(f"Logits were not validated, since the verifier's head is not here: {error}")
        return
    head = read_tensor(info)
    for left_out in plan.left_out:
        if strip_prefix(left_out) == "lm_head.weight":
            _check_head_of_source(plan.source.tensors[left_out], info)
    output = model(input_ids=input_ids, hidden_states=hidden_states)
    _check_same(
        "The logits are not those of the verifier's head",
        output.logits,
        F.linear(before_head, head.float()),
    )


def _check_head_of_source(own: TensorInfo, verifiers: TensorInfo) -> None:
    ours, theirs = read_tensor(own), read_tensor(verifiers)
    dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    if ours.shape != theirs.shape or not torch.equal(ours.to(dtype), theirs.to(dtype)):
        raise ValidationError(
            f"{own.file} has an {own.name} that is not the verifier's, while an EAGLE draft uses "
            "the verifier's head; check that the verifier is the one it was trained for."
        )


def _drafted(model: EagleSpeculator, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
    output: EagleOutput = model.draft(input_ids, hidden_states)
    assert output.last_hidden_state is not None
    return output.last_hidden_state


def _embedded(plan: ConversionPlan, model: EagleSpeculator, ids: Tensor) -> Tensor:
    """Embeddings of the tokens, from the source's own tensor where it has one."""
    if info := plan.tensors.get("embed_tokens.weight"):
        return read_tensor(info)[ids].float()
    embedding = model.get_input_embeddings()
    assert embedding is not None
    embedded: Tensor = embedding(ids)
    return embedded


def _source_tensors(plan: ConversionPlan) -> dict[str, Tensor]:
    return {
        strip_prefix(info.name): read_tensor(info).float()
        for target, info in plan.tensors.items()
        if target != "embed_tokens.weight"
    }


def _check_same(problem: str, found: Tensor, expected: Tensor) -> None:
    difference = (found.float() - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    if not difference <= TOLERANCE * scale:
        raise ValidationError(
            f"{problem} (largest difference {difference:.2g} at values up to {scale:.2g})."
        )
    logger.debug(f"Largest difference {difference:.2g} at values up to {scale:.2g}")
