"""Scoring a draft on a recording: what decoding would accept, without the verifier."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from speculators import __version__
from speculators.decode.block import BlockDrafter
from speculators.decode.cache import BlockCache
from speculators.decode.context import ContextDraft, ContextDrafter
from speculators.decode.proposals import drafter_of
from speculators.decode.recurrent import (
    DynamicTreeDrafter,
    FixedTreeDrafter,
    RecurrentDraft,
)
from speculators.decode.tree import EAGLE1_TREE, chain
from speculators.errors import EvaluationError
from speculators.evaluate.evaluation import environment_of
from speculators.evaluate.metrics import Acceptance, count_steps, expect_steps
from speculators.evaluate.recording.context import ContextTexts
from speculators.evaluate.recording.drafting import DraftedTexts
from speculators.evaluate.recording.manifest import Recording
from speculators.evaluate.recording.recurrent import RecurrentTexts
from speculators.evaluate.recording.shards import read_text
from speculators.evaluate.recording.texts import Text
from speculators.evaluate.recording.warping import recorded_warp
from speculators.evaluate.report import (
    PromptResult,
    Report,
    Settings,
    SpeculativeMeasurement,
    results_by_proposal,
)
from speculators.evaluate.subject.loading import torch_device
from speculators.evaluate.subject.opening import SPREAD, Opened
from speculators.format.config import ProposalMethod
from speculators.models.loading import load_converted, without_progress_bar
from speculators.models.speculator import Speculator

__all__ = ["Scoring", "load_scored"]

SCORED = (FixedTreeDrafter, DynamicTreeDrafter, BlockDrafter, ContextDrafter)
"""The ways of drafting that a subclass of ``DraftedTexts`` knows."""

TEXTS = 32
"""How many texts are drafted for at the same time, at most."""

SLOTS = 1 << 14
"""How many tokens they may have in total, padding included."""


def load_scored(opened: Opened, recording: Recording, device: str | None = None) -> Speculator:
    """Load a draft with the matrices that it takes from its verifier, in the recording's dtype.

    Args:
        opened: the draft and its verifier.
        recording: of that verifier.
        device: by torch's name; if not given, or ``auto``, one accelerator if there is any, else
            ``cpu``.

    Raises:
        FormatError, CheckpointError, HubError: if it cannot be read or downloaded.
        EvaluationError: if there is no such device.

    """
    place = torch_device(None if device == SPREAD else device)
    dtype = getattr(torch, recording.manifest.dtype)
    with without_progress_bar():
        draft = load_converted(opened.converted, verifier=opened.verifier, dtype=dtype)
    draft.to(place).eval()  # type: ignore[arg-type]
    return draft


class Scoring:
    """A score of a draft, which can be stopped and reported on after any prompts.

    Args:
        opened: the draft.
        draft: its model.
        recording: of its verifier, with the states that it reads, as ``open_scored`` checks.
        proposals: at least one.

    Attributes:
        measured: what has been scored so far, by prompt.

    Raises:
        GenerationError: if the draft cannot propose that way.
        EvaluationError: if the recorded texts are too short for a proposal, or drafts of its kind
            cannot be scored on them.

    """

    def __init__(
        self,
        opened: Opened,
        draft: Speculator,
        recording: Recording,
        proposals: Sequence[ProposalMethod],
    ) -> None:
        self.opened = opened
        self.draft = draft
        self.recording = recording
        self.proposals = list(proposals)
        self.measured: list[PromptResult] = []
        self._warp = recorded_warp(recording.manifest.settings)
        for proposal in proposals:
            drafter = drafter_of(draft, BlockCache([0]), proposal, self._warp)
            if not isinstance(drafter, SCORED):
                raise EvaluationError(
                    f"{opened.name}: a draft of the kind {type(draft).__name__} cannot be scored "
                    "on a recording; leave out --recording."
                )
            recording.check_depth(drafter.deepest)

    def run(self) -> Iterator[PromptResult]:
        """Score prompt by prompt; each result is added to ``measured`` once it is complete."""
        prompts = self.recording.manifest.prompts
        for some in self._groups():
            texts = [read_text(self.recording, index, self.draft.verifier_layers) for index in some]
            for index, counts in zip(some, self._score(texts), strict=True):
                prompt = prompts[index]
                result = PromptResult(
                    id=prompt.id,
                    category=prompt.category,
                    prompt_tokens=prompt.prompt_tokens,
                    plain=None,
                    speculative=[
                        SpeculativeMeasurement(
                            new_tokens=prompt.new_tokens, seconds=None, acceptance=acceptance
                        )
                        for acceptance in counts
                    ],
                )
                self.measured.append(result)
                yield result

    def report(self) -> Report:
        """The report on what has been scored so far."""
        manifest = self.recording.manifest
        return Report(
            speculators_version=__version__,
            complete=len(self.measured) == len(manifest.prompts),
            draft=self.opened.name,
            draft_commit=self.opened.converted.repository.commit,
            verifier=manifest.verifier.name,
            chat_template=manifest.chat_template,
            settings=scored_settings(manifest.settings, self.recording.directory),
            environment=environment_of(self.draft, self.draft.device, self.draft.dtype),
            recommendation=None,
            results=results_by_proposal(self.measured, self.proposals, compared=False),
            prompts=self.measured,
        )

    def _groups(self) -> Iterator[list[int]]:
        """The numbers of prompts, in groups that fit into memory."""
        group, longest = list[int](), 0
        for index, prompt in enumerate(self.recording.manifest.prompts):
            longest = max(longest, prompt.prompt_tokens + prompt.new_tokens)
            if group and (len(group) == TEXTS or longest * (len(group) + 1) > SLOTS):
                yield group
                group, longest = [], prompt.prompt_tokens + prompt.new_tokens
            group.append(index)
        yield group

    @torch.inference_mode()
    def _score(self, texts: Sequence[Text]) -> list[list[Acceptance]]:
        """The counts by text and proposal method."""
        # A text that ends with its first token has no steps.
        decoded = [text for text in texts if text.new_tokens > 1]
        counts = iter(self._score_decoded(decoded) if decoded else ())
        nothing = [Acceptance() for _ in self.proposals]
        return [next(counts) if text.new_tokens > 1 else nothing for text in texts]

    def _score_decoded(self, texts: Sequence[Text]) -> list[list[Acceptance]]:
        drafted = drafted_texts(self.draft, texts)
        by_proposal: dict[int, list[Acceptance]] = {}
        # All that is fixed at once, and all that is sampled, since drafts may share passes for it.
        fixed = {
            index: EAGLE1_TREE
            if it.proposal_type == "static_tree"
            else chain(it.speculative_tokens)
            for index, it in enumerate(self.proposals)
            if it.proposal_type in {"greedy", "static_tree"}
        }
        if fixed:
            for index, texts_survival in zip(
                fixed, drafted.survival([*fixed.values()]), strict=True
            ):
                by_proposal[index] = [expect_steps(survival) for survival in texts_survival]
        sampled = {
            index: it.speculative_tokens
            for index, it in enumerate(self.proposals)
            if it.proposal_type == "sampling"
        }
        if sampled:
            for index, texts_survival in zip(
                sampled, drafted.sampled_survival([*sampled.values()], self._warp), strict=True
            ):
                by_proposal[index] = [expect_steps(survival) for survival in texts_survival]
        for index, it in enumerate(self.proposals):
            if it.proposal_type == "dynamic_tree":
                assert it.tree_depth is not None
                assert it.tree_top_k is not None
                assert isinstance(self.draft, RecurrentDraft)
                grown = RecurrentTexts(self.draft, texts)
                steps = grown.grown(it.speculative_tokens, it.tree_depth, it.tree_top_k)
                by_proposal[index] = [count_steps(*counted) for counted in steps]
        return [
            [by_proposal[index][text] for index in range(len(self.proposals))]
            for text in range(len(texts))
        ]


def drafted_texts(draft: Speculator, texts: Sequence[Text]) -> DraftedTexts:
    """What a draft makes of texts, however it drafts."""
    if isinstance(draft, ContextDraft):
        return ContextTexts(draft, texts)
    assert isinstance(draft, RecurrentDraft)
    return RecurrentTexts(draft, texts)


def scored_settings(recorded: Settings, directory: Path) -> Settings:
    """The settings of a score on a recording."""
    return recorded.model_copy(update={"acceptance_only": True, "recording": str(directory)})
