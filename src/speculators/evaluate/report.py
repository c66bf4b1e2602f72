"""The report of an evaluation: its schema, and how its figures follow from what was measured.

Without torch, so that a report can be read, added up and plotted anywhere. The JSON schema in
docs/evaluation.schema.json is made from these models.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from speculators.ending import Ending
from speculators.evaluate.defaults import MAX_NEW_TOKENS
from speculators.evaluate.metrics import (
    Acceptance,
    acceptance_length,
    acceptance_rates,
    conditional_acceptance_rates,
    recommended,
    total,
)
from speculators.format.config import ProposalMethod

__all__ = [
    "COMPARISON_FILE",
    "REPORT_FILE",
    "Comparison",
    "Difference",
    "Environment",
    "Measurement",
    "PromptResult",
    "ProposalResult",
    "Recommendation",
    "Report",
    "Served",
    "Settings",
    "SpeculativeMeasurement",
    "Summary",
    "first_difference",
    "recommend",
    "results_by_proposal",
    "summarize",
]

REPORT_FILE = "report.json"
COMPARISON_FILE = "comparison.json"

RULE = "the shortest draft whose speed-up is within 1 % of the highest measured"


class Model(BaseModel):
    """Base of all parts: a key that the schema does not have is an error."""

    model_config = ConfigDict(extra="forbid")


class Measurement(Model):
    """One generation."""

    new_tokens: int = Field(ge=0)
    """Tokens generated, an end-of-sequence token included."""
    seconds: float | None = Field(ge=0)
    """From the prompt's tokens to the last new token, the pass over the prompt included; ``null``
    if nothing was decoded with the draft: a recording was scored, or the draft followed along the
    verifier's own output."""


class Difference(Model):
    """Where a speculative output first differs from the plain one."""

    position: int = Field(ge=0)
    """Index among the new tokens."""
    plain: int | None
    """The token of plain decoding; ``null`` if it had ended there."""
    speculative: int | None
    """The token of speculative decoding; ``null`` if it had ended there."""


class SpeculativeMeasurement(Measurement):
    """One generation with the draft."""

    acceptance: Acceptance | None
    """``null`` where a server counted for several prompts together."""
    difference: Difference | None = None
    """``null`` if the output equalled the plain one, or was not compared."""


class PromptResult(Model):
    """What was measured on one prompt."""

    id: str
    category: str
    prompt_tokens: int = Field(ge=1)
    """Tokens of the prompt, those of the chat template included."""
    plain: Measurement | None
    """The verifier alone; ``null`` if only acceptance was measured."""
    speculative: list[SpeculativeMeasurement]
    """One for each of the report's ``results``, in their order."""


class Summary(Model):
    """Figures over several prompts: ratios of sums, not means of ratios."""

    prompts: int
    new_tokens: int
    """With the draft."""
    acceptance: Acceptance
    acceptance_length: float | None
    """Mean tokens per verification step, bonus token included."""
    acceptance_rates: list[float]
    """By position: accepted there, over all verification steps; as vLLM reports them."""
    conditional_acceptance_rates: list[float | None]
    """By position: accepted there, over the steps that drafted there and accepted all before."""
    tokens_per_second: float | None
    """With the draft."""
    plain_tokens_per_second: float | None
    """The verifier alone, in the same run; ``null`` if only acceptance was measured."""
    speedup: float | None
    """The one over the other."""
    identical: int | None
    """Prompts whose output equalled plain decoding token for token; ``null`` if not compared."""


class ProposalResult(Model):
    """The figures of one way of proposing tokens."""

    proposal: ProposalMethod
    overall: Summary
    categories: dict[str, Summary]

    @property
    def name(self) -> str:
        """For titles: ``greedy, draft of 3``."""
        return f"{self.proposal.proposal_type}, draft of {self.proposal.speculative_tokens}"


class Recommendation(Model):
    """What a sweep came to."""

    speculative_tokens: int
    speedup: float
    rule: str


class Settings(Model):
    """How it was measured."""

    prompts_file: str | None = None
    """``null`` for the prompts that come with speculators."""
    prompts_total: int = Field(ge=1)
    """How many were to be measured."""
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, ge=1)
    """The longest output, in tokens."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 is greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """For sampling: only the most probable tokens that together reach this probability."""
    seed: int = 0
    """Of the random numbers that sampling takes."""
    acceptance_only: bool = False
    """Whether plain decoding was left out."""
    recording: str | None = None
    """The recording that drafts were scored on; ``null`` if the verifier decoded."""
    concurrency: int | None = Field(default=None, ge=1)
    """On a server: how many prompts were answered at the same time."""

    @property
    def compared(self) -> bool:
        """Whether outputs are compared with plain ones: those of sampling are random."""
        return self.temperature == 0 and not self.acceptance_only


class Environment(Model):
    """Where and with what it was measured; speeds hold for this only."""

    device: str
    """``cpu``, or the accelerator by its name."""
    threads: int
    """Of torch on the CPU."""
    dtype: str
    """Of the verifier's weights."""
    draft_dtype: str
    torch: str
    transformers: str

    @property
    def where(self) -> str:
        """For sentences: ``in float32 on cpu``."""
        return f"in {self.dtype} on {self.device}"

    @property
    def conditions(self) -> str:
        """For sentences: all that speeds depend on."""
        drafted = f" (the draft in {self.draft_dtype})" if self.draft_dtype != self.dtype else ""
        threads = f" ({self.threads} thread{'s' * (self.threads != 1)})"
        return (
            f"in {self.dtype}{drafted} on {self.device}{threads if self.device == 'cpu' else ''}, "
            f"one prompt at a time, with torch {self.torch} and transformers {self.transformers}"
        )


class Served(Model):
    """The server that it was measured on."""

    url: str
    vllm: str | None
    """The version; ``null`` if the server does not say."""
    baseline_url: str | None
    """Of the server without the draft, if outputs were compared with one."""

    @property
    def where(self) -> str:
        """For sentences, also public ones: ``by vLLM 0.32.0``, without the address."""
        return f"by vLLM {self.vllm or ''}".rstrip()

    @property
    def conditions(self) -> str:
        """For sentences: all that is known of what speeds depend on."""
        return self.where


class Report(Ending, Model):
    """The whole report.json."""

    speculators_report: Literal[1] = 1
    """The version of this schema."""
    speculators_version: str
    complete: bool
    """Whether every prompt was measured; not if the run was stopped."""
    draft: str
    draft_commit: str | None = None
    """Of a draft on the Hub; ``null`` for a directory."""
    verifier: str
    chat_template: bool
    """Whether the verifier's chat template was applied; otherwise prompts are plain text."""
    settings: Settings
    environment: Environment | Served
    recommendation: Recommendation | None
    """``null`` unless several draft lengths were measured, with speed."""
    results: list[ProposalResult]
    prompts: list[PromptResult]
    """In the order of measuring."""

    @property
    def longest(self) -> ProposalResult:
        """The result of the longest draft, which knows all positions."""
        return max(self.results, key=lambda result: result.proposal.speculative_tokens)

    @property
    def shown(self) -> ProposalResult:
        """The result that stands for the draft: the recommended one, if one is."""
        if self.recommendation is None:
            return self.longest
        wanted = self.recommendation.speculative_tokens
        return next(r for r in self.results if r.proposal.speculative_tokens == wanted)


class Comparison(Ending, Model):
    """The whole comparison.json: several drafts, scored on one recording."""

    speculators_comparison: Literal[1] = 1
    """The version of this schema."""
    drafts: list[Report]
    """One report for each draft, in the order in which they were given."""


def summarize(
    prompts: Sequence[PromptResult],
    proposal: int,
    *,
    compared: bool,
    acceptance: Acceptance | None = None,
) -> Summary:
    """The figures of one way of proposing tokens over some prompts.

    Args:
        prompts: what was measured.
        proposal: the index among each prompt's ``speculative``.
        compared: whether outputs were compared with plain ones.
        acceptance: if it is not known prompt by prompt.

    """
    speculative = [prompt.speculative[proposal] for prompt in prompts]
    plain = [prompt.plain for prompt in prompts if prompt.plain is not None]
    acceptance = acceptance or total(run.acceptance or Acceptance() for run in speculative)
    fast, slow = _tokens_per_second(speculative), _tokens_per_second(plain)
    return Summary(
        prompts=len(prompts),
        new_tokens=sum(run.new_tokens for run in speculative),
        acceptance=acceptance,
        acceptance_length=acceptance_length(acceptance),
        acceptance_rates=acceptance_rates(acceptance),
        conditional_acceptance_rates=conditional_acceptance_rates(acceptance),
        tokens_per_second=fast,
        plain_tokens_per_second=slow,
        speedup=fast / slow if fast and slow else None,
        identical=sum(run.difference is None for run in speculative) if compared else None,
    )


def results_by_proposal(
    prompts: Sequence[PromptResult], proposals: Sequence[ProposalMethod], *, compared: bool
) -> list[ProposalResult]:
    """The figures of every way of proposing tokens, overall and by category."""
    categories = dict.fromkeys(prompt.category for prompt in prompts)
    return [
        ProposalResult(
            proposal=proposal,
            overall=summarize(prompts, index, compared=compared),
            categories={
                category: summarize(
                    [prompt for prompt in prompts if prompt.category == category],
                    index,
                    compared=compared,
                )
                for category in categories
            },
        )
        for index, proposal in enumerate(proposals)
    ]


def first_difference(plain: Sequence[int], speculative: Sequence[int]) -> Difference | None:
    """Where two outputs first differ, if they do; both are new tokens only."""
    for position, (one, other) in enumerate(zip_longest(plain, speculative)):
        if one != other:
            return Difference(position=position, plain=one, speculative=other)
    return None


def recommend(results: Sequence[ProposalResult]) -> Recommendation | None:
    """Recommend a draft length, if several were measured, and their speed."""
    speedups = [result.overall.speedup for result in results]
    known = [speedup for speedup in speedups if speedup is not None]
    if len(known) < max(2, len(results)):
        return None
    best = recommended(known)
    return Recommendation(
        speculative_tokens=results[best].proposal.speculative_tokens,
        speedup=known[best],
        rule=RULE,
    )


def _tokens_per_second(runs: Sequence[Measurement]) -> float | None:
    seconds = sum(run.seconds or 0.0 for run in runs)
    return sum(run.new_tokens for run in runs) / seconds if seconds else None
