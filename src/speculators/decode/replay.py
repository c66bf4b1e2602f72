"""Steps of speculation as CUDA graphs, recorded once and replayed.

With one prompt a step is a thousand small kernels, which a host launches more slowly than a GPU
runs them. A CUDA graph launches all of them at once, always on the same memory and with the same
shapes. So the confirmed tokens are padded to the longest way through a tree, how much is confirmed
is told by a tensor, and the attention goes over a power of two of slots, the rest of them masked.

The graphs and the caches that they were recorded over stay for the next generation.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.decode.cache import BlockCache
from speculators.decode.drafting import Draft, Drafter
from speculators.decode.steps import Steps
from speculators.decode.tree import Tree
from speculators.decode.verification import MASKABLE, VerifierPass
from speculators.format.config import ProposalMethod

__all__ = ["ReplayedSteps", "Workspace"]

FEWEST_SLOTS = 256
"""Of the numbers of slots that an attention goes over, the smallest."""

AHEAD = 1024
"""For how many new tokens room is made at once."""


class Graph:
    """What a function does to a GPU's memory, recorded once, to be done again and again.

    Args:
        run: the function. It finds its tensors itself, always the same ones, which must be kept as
            long as the graph is.
        device: the GPU.

    Attributes:
        result: what the function returned; its tensors are written by each ``replay``.

    Raises:
        RuntimeError: if the function needs the host while it runs.

    """

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        with torch.cuda.device(device):
            now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                run()  # what is only done at the first time
                mode = torch.cuda.get_sync_debug_mode()
                # To be told of it here, since a recording that fails leaves things behind.
                torch.cuda.set_sync_debug_mode("error")
                try:
                    run()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
            now.wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.result = run()

    def replay(self) -> None:
        """Do it again."""
        self._graph.replay()


RECORDERS: dict[str, Callable[[Callable[[], Any], torch.device], Graph]] = {"cuda": Graph}
"""By the type of device, what records; other devices have no graphs."""


class Recording:
    """A step as graphs, for blocks within the first ``limit`` slots of both caches.

    Args:
        drafter: proposes from its cache, as it was when this was made.
        target: verifies.
        limit: the number of slots.
        states: the verifier's hidden states, of which only shape, dtype and device matter.

    Attributes:
        tree: what was proposed last.
        logits: (1, nodes, vocabulary), the verifier's for it.
        states: (1, nodes, hidden), its hidden states.

    """

    def __init__(self, drafter: Drafter, target: VerifierPass, limit: int, states: Tensor) -> None:
        device, longest = states.device, drafter.deepest + 1
        self._unseen = torch.zeros(1, longest, dtype=torch.long, device=device)
        self._before = states.new_zeros(1, longest, states.shape[2])
        self._count = torch.ones(1, dtype=torch.long, device=device)
        # Behind what is confirmed already when recording runs the steps.
        self._drafted = torch.tensor(drafter.cache.lengths, device=device)
        self._verified = torch.tensor(target.cache.lengths, device=device)
        self._path = torch.zeros(1, longest, dtype=torch.long, device=device)
        record = RECORDERS[device.type]

        def propose() -> Tree:
            with drafter.cache.recording(self._drafted, limit):
                return drafter.propose(self._unseen, self._before, self._count)

        def verify() -> tuple[Tensor, Tensor]:
            with target.cache.recording(self._verified, limit):
                return target.verify(self.tree), target.states

        def gather() -> Tensor:
            with target.cache.recording(self._verified, limit):
                kept: Tensor = target.gather(self.states, self._path)
                return kept

        self._propose = record(propose, device)
        self.tree: Tree = self._propose.result
        self._verify = record(verify, device)
        self.logits: Tensor = self._verify.result[0]
        self.states: Tensor = self._verify.result[1]
        self._gather = None if self.tree.is_chain else record(gather, device)

    def propose(self, unseen: Sequence[int], states: Tensor, drafted: int, verified: int) -> None:
        """Propose what may follow tokens, after so many slots that are confirmed in the caches."""
        count = len(unseen)
        self._unseen[0, :count].copy_(torch.tensor(unseen), non_blocking=True)
        self._before[:, :count].copy_(states)
        self._count.fill_(count)
        self._drafted.fill_(drafted)
        self._verified.fill_(verified)
        self._propose.replay()

    def verify(self) -> None:
        """Run the verifier on what was proposed last."""
        self._verify.replay()

    def keep(self, path: Sequence[int]) -> Tensor:
        """Bring nodes to the front; their hidden states, (1, nodes, hidden)."""
        if self._gather is None:
            return self.states[:, : len(path)]
        self._path[0, : len(path)].copy_(torch.tensor(path), non_blocking=True)
        self._gather.replay()
        kept: Tensor = self._gather.result[:, : len(path)]
        return kept


class Workspace:
    """What a draft keeps from one generation to the next: caches, and graphs over them.

    It belongs to one draft and the verifier that is attached to it, and serves one generation at
    a time. Copied or pickled, it is empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: tuple[Hashable, ...] | None = None
        self._refused = False
        self.recordings: dict[Hashable, Recording] = {}
        self.draft_cache = self.verifier_cache = BlockCache([0])

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()

    @contextmanager
    def lent(
        self,
        draft: Draft,
        verifier: PreTrainedModel,
        padding: Sequence[int],
        proposal: ProposalMethod,
    ) -> Iterator[bool]:
        """Take the workspace for one generation, if its steps can be recorded and it is free.

        Yields:
            whether they can and it is.

        """
        if self._refused or not replayable(draft, verifier, padding, proposal):
            yield False
            return
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            models = addresses(draft, verifier)
            if models != self._models:
                self.clear()
                self._models = models
            for cache in (self.draft_cache, self.verifier_cache):
                cache.lengths, cache.tried = [0], 0
            # Tensors of an inference mode could not be written outside of one later.
            with torch.inference_mode(mode=False), torch.no_grad():
                yield True
        finally:
            self._lock.release()

    def clear(self) -> None:
        """Forget the graphs, and free their memory and the caches'."""
        self.recordings.clear()
        self.draft_cache, self.verifier_cache = BlockCache([0]), BlockCache([0])
        self._models = None

    def reserve(self, slots: int) -> None:
        """Make room in both caches; if they have to be moved, the graphs are forgotten."""
        moved = [cache.reserve(slots) for cache in (self.draft_cache, self.verifier_cache)]
        if any(moved):
            self.recordings.clear()

    def refuse(self, error: RuntimeError) -> None:
        """Record nothing any more, since the models cannot be recorded."""
        self._refused = True
        reason = str(error).partition("\n")[0]
        logger.debug(f"No CUDA graphs, since the step cannot be recorded: {reason}")


class ReplayedSteps(Steps):
    """Steps that are recorded once for each number of slots, and then replayed.

    Args:
        drafter: with the workspace's cache.
        target: likewise.
        workspace: lent for this generation.
        proposal: what the drafter proposes by.
        slots: how many slots the prompt and all that may follow it take.

    """

    def __init__(
        self,
        drafter: Drafter,
        target: VerifierPass,
        workspace: Workspace,
        proposal: ProposalMethod,
        slots: int,
    ) -> None:
        super().__init__(drafter, target)
        self.workspace = workspace
        self.proposal = proposal.model_dump_json()
        self.slots = slots
        self.recording: Recording | None = None

    def prefill(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``Steps``; here room is made first."""
        ahead = min(self.slots, tokens.shape[1] + AHEAD)
        self.workspace.reserve(limit_for(ahead + self.drafter.reach))
        return super().prefill(tokens, attention_mask, position_ids)

    def propose(self, unseen: Sequence[Sequence[int]], states: Tensor) -> Tree:
        """See ``Steps``."""
        self.recording = self._recording(states)
        if self.recording is None:
            return super().propose(unseen, states)
        drafted, verified = self.drafter.cache.lengths[0], self.target.cache.lengths[0]
        self.recording.propose(unseen[0], states, drafted, verified)
        self.drafter.cache.confirm([len(unseen[0])])
        return self.recording.tree

    def verify(self, tree: Tree) -> Tensor:
        """See ``Steps``."""
        if self.recording is None:
            return super().verify(tree)
        self.recording.verify()
        logits: Tensor = self.recording.logits
        return logits

    def keep(self, tree: Tree, paths: Sequence[Sequence[int]]) -> Tensor:
        """See ``Steps``."""
        if self.recording is None:
            return super().keep(tree, paths)
        states = self.recording.keep(paths[0])
        self.target.cache.confirm([len(paths[0])])
        return states

    def _recording(self, states: Tensor) -> Recording | None:
        """The graphs for the slots that the next step takes; ``None`` if they cannot be made."""
        workspace = self.workspace
        if workspace._refused:
            return None
        limit = limit_for(self.target.cache.start + self.drafter.reach)
        workspace.reserve(limit)
        key = (self.proposal, limit, self.target.last_position)
        if key not in workspace.recordings:
            try:
                workspace.recordings[key] = Recording(self.drafter, self.target, limit, states)
            except RuntimeError as error:
                workspace.refuse(error)
                return None
        return workspace.recordings[key]


def limit_for(slots: int) -> int:
    """The number of slots that an attention goes over, of which so many are needed."""
    return max(FEWEST_SLOTS, 1 << (slots - 1).bit_length())


def replayable(
    draft: Draft, verifier: PreTrainedModel, padding: Sequence[int], proposal: ProposalMethod
) -> bool:
    """Whether the steps of a generation could be recorded, so far as can be told before.

    Both models must be on one device that records, and take masks; there must be one prompt without
    padding; and proposals must not be drawn, since drawing waits for the host.
    """
    if not isinstance(draft, nn.Module) or verifier.training or draft.training:
        return False
    devices = {tensor.device for tensor in tensors_of(draft, verifier)}
    return (
        list(padding) == [0]
        and len(devices) == 1
        and next(iter(devices)).type in RECORDERS
        and proposal.proposal_type != "sampling"
        and all(takes_masks(model) for model in (draft, verifier))
    )


def takes_masks(model: Any) -> bool:
    """Whether the attention of a model takes a mask of four dimensions."""
    return model.config._attn_implementation in MASKABLE


def addresses(draft: Draft, verifier: PreTrainedModel) -> tuple[Hashable, ...]:
    """What changes whenever a model's tensors are moved, cast or exchanged."""
    implementation = verifier.config._attn_implementation
    return (
        implementation,
        *((tensor.data_ptr(), tensor.dtype) for tensor in tensors_of(draft, verifier)),
    )


def tensors_of(draft: Any, verifier: PreTrainedModel) -> Iterator[Tensor]:
    """All parameters and buffers of both models."""
    for model in (draft, verifier):
        yield from chain(model.parameters(), model.buffers())
