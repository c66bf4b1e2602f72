"""Proof that a written directory holds and computes what its source does."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.progress import Progress, silent
from speculators.checkpoint.reader import read_tensors
from speculators.checkpoint.tensor import (
    DTYPE_BITS,
    Constant,
    PlannedTensor,
    TensorInfo,
    float_name,
)
from speculators.checkpoint.verifier import Verifier
from speculators.convert.plan import ConversionPlan, head_left_out
from speculators.errors import (
    IncompleteVerifierError,
    SpeculatorsError,
    ValidationError,
    VerifierError,
)
from speculators.families.converted import Converted
from speculators.families.family import imported
from speculators.families.recognition import recognise
from speculators.models.loading import load_converted, without_progress_bar
from speculators.models.speculator import Speculator
from speculators.models.tensors import TORCH_DTYPES, read_planned, read_tensor

__all__ = ["TOLERANCE", "validate_conversion", "validate_model"]

TOLERANCE = 1e-4
"""Largest difference allowed from the reference, over its largest value (at least 1)."""

SEED, BATCH, LENGTH = 20240126, 2, 24

SLOTS = 4
"""How many tokens are drafted in one pass to check a draft that can do so."""

FRESH_DEVIATIONS = (0.02, 1.0)
"""The standard deviations that embeddings are initialised with: transformers', and torch's."""

NORMAL_KURTOSIS, KURTOSIS_TOLERANCE = 3.0, 0.15
"""Of a normal distribution; training gives an embedding heavier tails."""

LIKENESS = 0.5
"""Correlation from which on an embedding is the verifier's, or was trained from it."""

SAMPLED_ROWS = 4096

NOT_OF_THE_SOURCE = {"speculators_version", "speculators_config"}
"""Keys of config.json that do not come from the source: who wrote it, and how to speculate."""


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
    _compare_configs(plan, written)
    _compare_tensors(plan, written, progress)
    _tell_of_untrained_embedding(plan)
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
    check = _ForwardCheck(plan, model)
    with torch.inference_mode():
        check.run()
    logger.success("Forward pass successful")
    return check.unchecked


def _compare_configs(plan: ConversionPlan, converted: Converted) -> None:
    planned = json.loads(plan.config.model_dump_json(exclude_none=True))
    written = converted.checkpoint.config
    differing = [
        key
        for key in sorted((planned.keys() | written.keys()) - NOT_OF_THE_SOURCE)
        if planned.get(key) != written.get(key)
    ]
    if differing:
        raise ValidationError(
            f"{converted.checkpoint.config_file} is not what the source gives: it has another "
            f"{', '.join(differing)}."
        )


def _compare_tensors(plan: ConversionPlan, converted: Converted, progress: Progress) -> None:
    written = converted.checkpoint.tensors
    if plan.tensors.keys() != written.keys():
        raise ValidationError(
            "The converted checkpoint has other tensors than planned: "
            f"{', '.join(sorted(plan.tensors.keys() ^ written.keys()))}."
        )
    advance = progress("Comparing", plan.nbytes)
    for name, tensor in plan.tensors.items():
        copy = written[name]
        same_type = (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        if not same_type or not _same_numbers(tensor, copy, advance):
            files = " and ".join(sorted({str(info.file) for info in tensor.sources}))
            raise ValidationError(
                f"{name} differs from {tensor.label} of the source {files}"
                f"{f' rounded to {float_name(plan.rounded_to)}' if plan.rounded_to else ''}."
            )
    logger.debug(f"{len(written)} tensors are those of the source")


def _tell_of_untrained_embedding(plan: ConversionPlan) -> None:
    """Tell of an embedding that is as an initialisation leaves it, and not the verifier's."""
    planned = plan.tensors.get("embed_tokens.weight")
    if planned is None or len(planned.sources) != 1:
        return
    sample = _sample(planned.sources[0])
    deviation, mean = sample.std().item(), sample.mean().item()
    kurtosis = ((sample - mean) / max(deviation, 1e-30)).pow(4).mean().item()
    layer = plan.config.transformer_layer_config
    fresh = any(
        math.isclose(deviation, usual, rel_tol=0.03) and abs(mean) < 0.03 * usual
        for usual in {*FRESH_DEVIATIONS, layer.initializer_range}
    )
    if not fresh or abs(kurtosis - NORMAL_KURTOSIS) > KURTOSIS_TOLERANCE:
        return
    try:
        verifiers = _sample(plan.verifier.embedding())
    except (SpeculatorsError, KeyError):
        others = "the verifier's is not there to compare"
    else:
        if _correlation(sample, verifiers) > LIKENESS:
            return
        others = "it is not like the verifier's"
    logger.warning(
        f"{planned.label} looks untrained: its values are normally distributed with a deviation of "
        f"{deviation:.2g}, as initialisation leaves them, and {others}; check that the draft was "
        "saved whole, or remove it to draft with the verifier's embedding"
    )


def _correlation(one: Tensor, other: Tensor) -> float:
    """The correlation of two matrices' values; 0 if their shapes differ."""
    if one.shape != other.shape:
        return 0.0
    return torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1].item()


def _sample(info: TensorInfo) -> Tensor:
    """Rows from the middle of a matrix, in float32."""
    rows = min(info.shape[0], SAMPLED_ROWS)
    start = (info.shape[0] - rows) // 2
    return read_tensor(info.slice(start, start + rows)).float()


def _same_numbers(tensor: PlannedTensor, copy: TensorInfo, advance: Callable[[int], None]) -> bool:
    """Whether ``copy``, which is contiguous, has the pieces' values, rounded if dtypes differ."""
    with copy.file.open("rb") as file:
        file.seek(copy.offset)
        for piece in tensor.pieces:
            chunks = [piece.data] if isinstance(piece, Constant) else contiguous_chunks(piece)
            for chunk in chunks:
                data = file.read(len(chunk) * DTYPE_BITS[copy.dtype] // DTYPE_BITS[piece.dtype])
                if piece.dtype == copy.dtype:
                    same = data == chunk
                else:
                    found = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[copy.dtype])
                    source = torch.frombuffer(bytearray(chunk), dtype=TORCH_DTYPES[piece.dtype])
                    same = torch.allclose(
                        found, source.to(found.dtype), rtol=0, atol=0, equal_nan=True
                    )
                if not same:
                    return False
                advance(len(data))
    return True


class _ForwardCheck:
    """Compares what a draft computes on seeded random inputs with what its tensors say.

    Args:
        plan: the plan of the conversion; its tensors are the source's.
        model: the loaded model, in float32.

    Attributes:
        unchecked: sentences on what could not be checked, and why.

    """

    def __init__(self, plan: ConversionPlan, model: Speculator) -> None:
        self.plan, self.model, self.unchecked = plan, model, list[str]()
        self.reference = imported(plan.family.reference)
        generator = torch.Generator().manual_seed(SEED)
        vocabulary, hidden = plan.config.verifier_sizes
        width = hidden * max(1, len(model.verifier_layers))
        self.input_ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=generator)
        self.hidden_states = torch.randn(BATCH, LENGTH, width, generator=generator)
        if model.get_input_embeddings() is None:
            _refuse_incomplete(plan.verifier)
            self._leave_unchecked(
                "The verifier's embedding is not available: a random one takes its place"
            )
            stand_in = torch.randn(vocabulary, hidden, generator=generator)
            model.embed_tokens = nn.Embedding.from_pretrained(stand_in)

    def run(self) -> None:
        drafted = self._drafted(self.input_ids, self.hidden_states)
        if not drafted.isfinite().all():
            raise ValidationError(
                "The forward pass gives values that are not finite; "
                "the source's weights are too large."
            )
        self._check_causality(drafted)
        reference = self.reference(self._tensors(self.plan), self.plan.config)
        if reason := reference.cannot_evaluate():
            self._leave_unchecked(f"The output was not compared with the reference: {reason}")
            expected = drafted
        else:
            expected = self._evaluate(reference, self.plan)
            _check_same("The output is not what the source's tensors compute", drafted, expected)
            if self.plan.rounded_to:
                self._log_effect_of_rounding(expected)
        self._check_logits(reference, expected)
        if self.plan.config.parallel and not reason:
            self._check_slots(reference)

    def _leave_unchecked(self, sentence: str) -> None:
        logger.warning(sentence)
        self.unchecked.append(sentence)

    def _drafted(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        drafted: Tensor = self.model.draft(
            input_ids, self.model.project(hidden_states)
        ).last_hidden_state
        return drafted

    def _check_causality(self, drafted: Tensor) -> None:
        vocabulary, _ = self.plan.config.verifier_sizes
        changed_ids, changed_states = self.input_ids.clone(), self.hidden_states.clone()
        changed_ids[:, -1] = (changed_ids[:, -1] + 1) % vocabulary
        changed_states[:, -1] = -changed_states[:, -1]
        _check_same(
            "The output depends on later positions: the attention is not causal",
            self._drafted(changed_ids, changed_states)[:, :-1],
            drafted[:, :-1],
        )

    def _check_logits(self, reference: Any, drafted: Tensor) -> None:
        head = None
        if "head" in self.plan.family.borrows and "head" not in self.plan.features:
            try:
                info = self.plan.verifier.head()
            except SpeculatorsError as error:
                _refuse_draft_as_verifier(self.plan.verifier)
                if isinstance(error, IncompleteVerifierError):
                    raise
                self._leave_unchecked(
                    "Logits were not validated, since the verifier's head is not available: "
                    f"{error}"
                )
                for own in self.plan.heads:
                    self._leave_unchecked(head_left_out(own))
                return
            head = read_tensor(info)
            for own in self.plan.heads:
                _check_head_of_source(own, info)
        _check_same(
            f"The logits are not those of the {'draft' if head is None else 'verifier'}'s head",
            self.model(input_ids=self.input_ids, hidden_states=self.hidden_states).logits,
            reference.logits(drafted, None if head is None else head.float()),
        )

    def _check_slots(self, reference: Any) -> None:
        config: Any = self.plan.config
        mask = self._embedded(self.plan, torch.tensor([config.mask_token_id]))
        expected = [
            reference.slots(self._embedded(self.plan, ids), states, mask, SLOTS)
            for ids, states in zip(self.input_ids, self.hidden_states, strict=True)
        ]
        _check_same(
            "What it drafts in one pass is not what the source's tensors compute",
            self.model(
                input_ids=self.input_ids,
                hidden_states=self.hidden_states,
                num_draft_tokens=SLOTS,
            ).logits,
            torch.stack(expected),
        )

    def _log_effect_of_rounding(self, rounded: Tensor) -> None:
        exact_plan = replace(
            self.plan,
            rounded_to=None,
            tensors={
                name: replace(tensor, dtype=tensor.sources[0].dtype) if tensor.sources else tensor
                for name, tensor in self.plan.tensors.items()
            },
        )
        exact = self._evaluate(
            self.reference(self._tensors(exact_plan), self.plan.config), exact_plan
        )
        logger.info(
            f"With its tensors rounded to {self.plan.config.torch_dtype}, the output differs from "
            f"the source's by up to {(rounded - exact).abs().max().item():.2g}, "
            f"at values up to {exact.abs().max().item():.2g}"
        )

    def _evaluate(self, reference: Any, plan: ConversionPlan) -> Tensor:
        return torch.stack(
            [
                reference(self._embedded(plan, ids), states)
                for ids, states in zip(self.input_ids, self.hidden_states, strict=True)
            ]
        )

    def _embedded(self, plan: ConversionPlan, ids: Tensor) -> Tensor:
        """Embeddings of the tokens, from the source's own tensor where it has one."""
        if tensor := plan.tensors.get("embed_tokens.weight"):
            return read_planned(tensor)[ids].float()
        embedding = self.model.get_input_embeddings()
        assert embedding is not None
        embedded: Tensor = embedding(ids)
        return embedded

    def _tensors(self, plan: ConversionPlan) -> dict[str, Tensor]:
        """The planned tensors, by their names in research checkpoints, weights in float32."""
        return {
            plan.family.names.in_research(name): _float(read_planned(tensor))
            for name, tensor in plan.tensors.items()
            if name != "embed_tokens.weight"
        }


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _refuse_draft_as_verifier(verifier: Verifier) -> None:
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


def _refuse_incomplete(verifier: Verifier) -> None:
    """Refuse a verifier whose weights are there, but not its embedding."""
    try:
        verifier.embedding()
    except IncompleteVerifierError:
        _refuse_draft_as_verifier(verifier)
        raise
    except SpeculatorsError:
        return  # the caller says that it is not available


def _check_head_of_source(own: TensorInfo, verifiers: TensorInfo) -> None:
    ours, theirs = read_tensor(own), read_tensor(verifiers)
    dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    if ours.shape != theirs.shape or not torch.equal(ours.to(dtype), theirs.to(dtype)):
        raise ValidationError(
            f"{own.file} has an {own.name} that is not the verifier's, while such a draft uses "
            "the verifier's head; check that the verifier is the one it was trained for."
        )


def _check_same(problem: str, found: Tensor, expected: Tensor) -> None:
    difference = (found.float() - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    if not difference <= TOLERANCE * scale:
        raise ValidationError(
            f"{problem} (largest difference {difference:.2g} at values up to {scale:.2g})."
        )
    logger.debug(f"Largest difference {difference:.2g} at values up to {scale:.2g}")
