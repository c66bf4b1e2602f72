"""Measuring a draft: each prompt is decoded plainly and with each proposal method, in turns."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
import transformers
from loguru import logger
from transformers import GenerationConfig

from speculators import __version__
from speculators.decode import Generation
from speculators.decode.along import draft_along
from speculators.decode.gpu.cuda_graphs import RECORDERS, power_of_two
from speculators.decode.verification import is_stateful
from speculators.errors import EvaluationError
from speculators.evaluate.metrics import Acceptance, count_steps
from speculators.evaluate.prompts import Prompt
from speculators.evaluate.report import (
    Environment,
    Measurement,
    PromptResult,
    Report,
    Settings,
    SpeculativeMeasurement,
    first_difference,
    recommend,
    results_by_proposal,
)
from speculators.evaluate.subject.loading import Subject, generation_config
from speculators.format.config import ProposalMethod
from speculators.models.mtp import QwenMtp
from speculators.models.speculator import Speculator

__all__ = ["Evaluation", "environment_of"]

WARM_UP_TOKENS = 16
"""Enough new tokens to run every kind of step once."""


@dataclass(frozen=True, slots=True)
class Output:
    """One generation: new tokens, seconds, and verification steps if there were any."""

    tokens: list[int]
    seconds: float | None
    acceptance: Acceptance


class Evaluation:
    """An evaluation of a draft, which can be stopped and reported on after any prompt.

    Every prompt is decoded by the verifier's own ``generate`` and with each proposal method, one
    right after the other, so that all of them find the machine in the same state; the order
    rotates from prompt to prompt. A warm-up round before the first prompt is not counted.

    Args:
        subject: the draft.
        prompts: at least one.
        proposals: at least one, shorter drafts first.
        settings: how to measure.

    Attributes:
        measured: what has been measured so far, by prompt.

    Of a verifier whose state cannot be rolled back, only acceptance is measured, along its own
    greedy output.

    Raises:
        EvaluationError: if the verifier is such a one, and more is asked for.
        PromptsError: if a prompt cannot be encoded for the verifier.

    """

    def __init__(
        self,
        subject: Subject,
        prompts: Sequence[Prompt],
        proposals: Sequence[ProposalMethod],
        settings: Settings,
    ) -> None:
        _check_verifier(subject, settings)
        self.subject = subject
        self.proposals = list(proposals)
        self.settings = settings
        self.measured: list[PromptResult] = []
        self._contestants: list[ProposalMethod | None] = [*proposals]
        if not settings.acceptance_only:
            self._contestants.insert(0, None)
        self._encoded = [(prompt, subject.verifier.encode(prompt)) for prompt in prompts]

    def run(self) -> Iterator[PromptResult]:
        """Measure prompt by prompt; each result is added to ``measured`` once it is complete."""
        self._warm_up()
        for index, (prompt, tokens) in enumerate(self._encoded):
            torch.manual_seed(self.settings.seed + index)
            result = self._measure(prompt, tokens, turn=index)
            logger.debug(f"Measured prompt {prompt.id} ({prompt.category})")
            self.measured.append(result)
            yield result

    def report(self) -> Report:
        """The report on what has been measured so far."""
        subject = self.subject
        results = results_by_proposal(
            self.measured, self.proposals, compared=self.settings.compared
        )
        return Report(
            speculators_version=__version__,
            complete=len(self.measured) == len(self._encoded),
            draft=subject.name,
            draft_commit=subject.commit,
            verifier=subject.verifier.name,
            chat_template=subject.verifier.has_chat_template,
            settings=self.settings,
            environment=environment_of(
                subject.draft, subject.verifier.device, subject.verifier.model.dtype
            ),
            recommendation=recommend(results),
            results=results,
            prompts=self.measured,
        )

    def _warm_up(self) -> None:
        """Do what is only done once: load kernels, and record CUDA graphs.

        Graphs are recorded for each number of cache slots that a step may need: from those of the
        shortest prompt to those of the longest prompt with its output. The longest comes first,
        since the caches are moved when they grow, and the graphs over them are lost. Prefill is
        recorded for each power of two of prompt lengths, when it comes up for the second time.
        """
        by_length = sorted((tokens for _, tokens in self._encoded), key=len)
        shortest, longest = by_length[0], by_length[-1]
        most = self.settings.max_new_tokens
        once = [(longest, min(WARM_UP_TOKENS, most))]
        all_slots = [(longest, most), (shortest, len(longest) - len(shortest) + most)]
        by_power = {power_of_two(len(tokens)): tokens for tokens in by_length}
        all_slots += [(tokens, 2) for tokens in by_power.values()] * 2
        for contestant in self._contestants:
            recorded = contestant is not None and self.subject.verifier.device.type in RECORDERS
            for tokens, new_tokens in all_slots if recorded else once:
                generation = generation_config(
                    self.subject.verifier.model, self.settings, new_tokens
                )
                generation.eos_token_id = None
                self._generate(tokens, generation, contestant)

    def _measure(self, prompt: Prompt, tokens: list[int], turn: int) -> PromptResult:
        generation = generation_config(
            self.subject.verifier.model, self.settings, self.settings.max_new_tokens
        )
        count = len(self._contestants)
        outputs: dict[int, Output] = {}
        for index in (number % count for number in range(turn, turn + count)):
            outputs[index] = self._generate(tokens, generation, self._contestants[index])
        plain = outputs.pop(0) if self._contestants[0] is None else None
        return PromptResult(
            id=prompt.id,
            category=prompt.category,
            prompt_tokens=len(tokens),
            plain=None
            if plain is None
            else Measurement(new_tokens=len(plain.tokens), seconds=plain.seconds),
            speculative=[
                SpeculativeMeasurement(
                    new_tokens=len(output.tokens),
                    seconds=output.seconds,
                    acceptance=output.acceptance,
                    difference=first_difference(plain.tokens, output.tokens)
                    if plain is not None and self.settings.compared
                    else None,
                )
                for _, output in sorted(outputs.items())
            ],
        )

    def _generate(
        self, tokens: list[int], generation: GenerationConfig, proposal: ProposalMethod | None
    ) -> Output:
        verifier = self.subject.verifier
        input_ids = torch.tensor([tokens], device=verifier.device)
        mask = torch.ones_like(input_ids)
        acceptance = Acceptance()
        start = perf_counter()
        if proposal is None:
            sequences = verifier.model.generate(  # type: ignore[operator]
                input_ids, attention_mask=mask, generation_config=generation
            )
        elif is_stateful(verifier.model):
            along = draft_along(
                self.subject.draft,
                verifier.model,
                input_ids,
                attention_mask=mask,
                proposal=proposal,
                generation=generation,
            )
            new_tokens = along.sequences[0, len(tokens) :].tolist()
            acceptance = count_steps(along.accepted[0], along.offered[0])
            return Output(new_tokens, None, acceptance)
        else:
            counted = copy.copy(generation)
            counted.return_dict_in_generate = True  # as an argument it is deprecated
            generated = self.subject.draft.generate(
                input_ids, attention_mask=mask, proposal=proposal, generation_config=counted
            )
            assert isinstance(generated, Generation)
            sequences = generated.sequences
            acceptance = count_steps(generated.accepted[0], generated.offered[0])
        new_tokens = sequences[0, len(tokens) :].tolist()  # waits for an accelerator
        return Output(new_tokens, perf_counter() - start, acceptance)


def _check_verifier(subject: Subject, settings: Settings) -> None:
    greedy = settings.temperature == 0 and settings.acceptance_only
    model = subject.verifier.model
    if is_stateful(model) and not greedy:
        raise EvaluationError(
            f"The state of {type(model).__name__} cannot be rolled back when drafted tokens are "
            "rejected, so nothing is decoded with a draft here; --acceptance-only measures what "
            "would be accepted along its own greedy output (temperature 0)."
        )


def environment_of(
    draft: Speculator | QwenMtp, device: torch.device, dtype: torch.dtype
) -> Environment:
    """Where and with what a draft is measured.

    Args:
        draft: the model.
        device: the verifier's.
        dtype: the verifier's.

    """
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        dtype=_name(dtype),
        draft_dtype=_name(draft.dtype),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
