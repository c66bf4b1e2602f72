"""Measuring a draft where it is served: what vLLM counts while it answers prompts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from loguru import logger

from speculators import __version__
from speculators.errors import EvaluationError
from speculators.evaluate.metrics import Acceptance, total
from speculators.evaluate.prompts import Prompt
from speculators.evaluate.report import (
    Measurement,
    PromptResult,
    ProposalResult,
    Report,
    Served,
    Settings,
    SpeculativeMeasurement,
    first_difference,
    recommend,
    summarize,
)
from speculators.evaluate.server.client import Answer, Server
from speculators.format.config import ProposalMethod

__all__ = ["ServedEvaluation"]


class ServedEvaluation:
    """An evaluation on a server, which can be stopped and reported on after some prompts.

    The server counts for all prompts together. So prompts of one category are answered together,
    and the counters are read before and after; one prompt at a time, if no more are to be answered
    at the same time.

    Args:
        name: of the draft that the server was started with, which the server does not tell.
        commit: the draft's commit on the Hub; ``None`` for a directory.
        server: the server.
        baseline: one that serves the verifier alone, to compare with.
        prompts: at least one.
        settings: how to decode; ``concurrency`` is how many prompts are answered at the same time,
            one if it is not given.

    Attributes:
        measured: what has been measured so far, by prompt.

    Raises:
        EvaluationError: if the server does not serve a draft.

    """

    def __init__(
        self,
        name: str,
        commit: str | None,
        server: Server,
        baseline: Server | None,
        prompts: Sequence[Prompt],
        settings: Settings,
    ) -> None:
        self.name = name
        self.commit = commit
        self.server = server
        self.baseline = baseline
        self.concurrency = concurrency = settings.concurrency or 1
        self.settings = settings.model_copy(
            update={"acceptance_only": baseline is None, "concurrency": concurrency}
        )
        self.measured: list[PromptResult] = []
        self._counts: dict[str, list[Acceptance]] = {}
        self._seeds = {prompt.id: settings.seed + at for at, prompt in enumerate(prompts)}
        self._groups = _grouped(prompts, together=concurrency > 1)
        if (largest := max(map(len, self._groups))) < concurrency and len(self._groups) > 1:
            logger.warning(
                f"No category has more than {largest} prompts, so that many are answered at the "
                f"same time, not {concurrency}"
            )
        counters = server.counters()
        positions = len(counters.accepted)
        if not positions:
            raise EvaluationError(
                f"{server.url} counts no drafted tokens (vllm:spec_decode_num_drafts in /metrics): "
                "it serves the verifier alone. Start vLLM with the draft."
            )
        self._proposal = ProposalMethod(speculative_tokens=positions)
        for one in (server, baseline):
            if one is not None:
                one.check_template(prompts[0])
        server.counters(counters.generated + 1)  # the check is counted, before all else

    def run(self) -> Iterator[PromptResult]:
        """Measure group by group; results are added to ``measured`` once a group is complete."""
        for prompts in self._groups:
            before = self.server.counters()
            answers = self._answers(self.server, prompts)
            told = sum(len(answer.tokens) for answer in answers)
            after = self.server.counters(before.generated + told)
            if after.generated != before.generated + told:
                logger.warning(
                    f"{self.server.url} counted {after.generated - before.generated} new tokens, "
                    f"but answered {told} here: its answers to others are counted, too"
                )
            counted = after.since(before)
            plain = self._answers(self.baseline, prompts) if self.baseline is not None else None
            self._counts.setdefault(prompts[0].category, []).append(counted)
            for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                result = PromptResult(
                    id=prompt.id,
                    category=prompt.category,
                    prompt_tokens=answer.prompt_tokens,
                    plain=None if plain is None else _measured(plain[at]),
                    speculative=[
                        SpeculativeMeasurement(
                            new_tokens=len(answer.tokens),
                            seconds=answer.seconds,
                            acceptance=counted if len(prompts) == 1 else None,
                            difference=first_difference(plain[at].tokens, answer.tokens)
                            if plain is not None and self.settings.compared
                            else None,
                        )
                    ],
                )
                self.measured.append(result)
                yield result

    def report(self) -> Report:
        """The report on what has been measured so far."""
        compared = self.settings.compared
        results = [
            ProposalResult(
                proposal=self._proposal,
                overall=summarize(
                    self.measured,
                    0,
                    compared=compared,
                    acceptance=total(it for counts in self._counts.values() for it in counts),
                ),
                categories={
                    category: summarize(
                        [prompt for prompt in self.measured if prompt.category == category],
                        0,
                        compared=compared,
                        acceptance=total(counts),
                    )
                    for category, counts in self._counts.items()
                },
            )
        ]
        return Report(
            speculators_version=__version__,
            complete=len(self.measured) == sum(map(len, self._groups)),
            draft=self.name,
            draft_commit=self.commit,
            verifier=self.server.model,
            chat_template=self.server.uses_chat,
            settings=self.settings,
            environment=Served(
                url=self.server.url,
                vllm=self.server.version,
                baseline_url=None if self.baseline is None else self.baseline.url,
            ),
            recommendation=recommend(results),
            results=results,
            prompts=self.measured,
        )

    def _answers(self, server: Server, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers of a server to prompts, some of them at the same time."""
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            asked = [
                pool.submit(server.answer, prompt, self.settings, self._seeds[prompt.id])
                for prompt in prompts
            ]
            return [answer.result() for answer in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _grouped(prompts: Sequence[Prompt], *, together: bool) -> list[list[Prompt]]:
    """Prompts by category, or each by itself."""
    if not together:
        return [[prompt] for prompt in prompts]
    categories = dict.fromkeys(prompt.category for prompt in prompts)
    return [[prompt for prompt in prompts if prompt.category == one] for one in categories]


def _measured(answer: Answer) -> Measurement:
    return Measurement(new_tokens=len(answer.tokens), seconds=answer.seconds)
