"""Steps of speculation as CUDA graphs, recorded once and replayed.

With one prompt a step is a thousand small kernels, which a host launches more slowly than a GPU
runs them. A CUDA graph launches all of them at once, always on the same memory and with the same
shapes. So the confirmed tokens are padded to the longest way through a tree, how much is confirmed
is told by a tensor, and the attention goes over a power of two of slots, the rest of them masked.

The graphs and the caches that they were recorded over stay for the next generation. What cannot be
recorded is run step by step.
"""

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
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

KEPT = 16
"""How many recordings are kept: those used last. Settings of sampling may come in any number."""

ONE_RECORDS = threading.Lock()
"""Held while something is recorded: PyTorch records on a stream that all threads share."""


class Graph:
    """What a function does to a GPU's memory, recorded once, to be done again and again.

    Each replay draws new random numbers from PyTorch's default generator of the GPU, the same ones
    as the function would (see the note on them in ATen/cuda/CUDAGeneratorImpl.h). Recording draws
    none, so that a seed gives the same whether a step is recorded first or only replayed.

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
        with ONE_RECORDS, torch.cuda.device(device):
            now, aside = torch.cuda.current_stream(), stream_aside(device)
            random_state = torch.cuda.get_rng_state(device)
            aside.wait_stream(now)
            try:
                with torch.cuda.stream(aside):
                    run()  # what is only done at the first time
                    with forbidden_to_wait():
                        run()
            finally:
                # After a failure, too: what did run must not write while later steps are run.
                now.wait_stream(aside)
                torch.cuda.set_rng_state(random_state, device)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.result = run()

    def replay(self) -> None:
        """Do it again."""
        self._graph.replay()


@cache  # libraries keep workspaces of megabytes for every stream that they have been used on
def stream_aside(device: torch.device) -> torch.cuda.Stream:
    """Where functions run before they are recorded."""
    return torch.cuda.Stream(device)


@contextmanager
def forbidden_to_wait() -> Iterator[None]:
    """Let waiting for the GPU be an error.

    A recording would fail by it too, but would leave things behind.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


RECORDERS: dict[str, Callable[[Callable[[], Any], torch.device], Graph]] = {"cuda": Graph}
"""By the type of device, what records; other devices have no graphs."""


class UnrecordableVerifierError(RuntimeError):
    """The verifier's part of a step cannot be recorded, whatever is proposed."""


class Recording:
    """A step as graphs, for blocks within the first ``limit`` slots of both caches.

    Args:
        drafter: proposes.
        target: verifies.
        limit: the number of slots.
        states: the verifier's hidden states, of which only shape, dtype and device matter.

    Attributes:
        proposing: the graph of the draft's part.
        verifying: the graph of the verifier's part.
        gathering: the graph that keeps what is scattered in a tree; ``None`` for a chain.
        tree: what was proposed last; the next ``propose`` writes over its tensors.
        verified: what ``VerifierPass.verify`` gave for it; likewise, by the next ``verify``.

    Raises:
        UnrecordableVerifierError: if the verifier needs the host while it runs.
        RuntimeError: if proposing does.

    """

    def __init__(self, drafter: Drafter, target: VerifierPass, limit: int, states: Tensor) -> None:
        device, self.longest = states.device, drafter.deepest + 1
        # What the host says, in one tensor, so that it is sent at once: how many tokens the draft
        # has not seen, how full the caches are, and the tokens. The caches are as full as they are
        # now while the steps are recorded, so that nothing confirmed is written over.
        full = (drafter.cache.lengths[0], target.cache.lengths[0])
        self._said = torch.tensor([1, *full, *[0] * self.longest], device=device)
        count, drafted, verified = self._said[:3].split(1)
        unseen = self._said[None, 3:]
        # The way through a tree that the verifier agreed with, and its hidden states on it, which
        # are what the draft takes in next.
        self._path = torch.zeros(1, self.longest, dtype=torch.long, device=device)
        self._kept = states.new_zeros(1, self.longest, states.shape[2])
        self._warp = drafter.warp  # some warpers have tensors, which the graphs read
        record = RECORDERS[device.type]

        def propose() -> Tree:
            with drafter.cache.recording(drafted, limit):
                return drafter.propose(unseen, self._kept, count)

        def verify() -> tuple[Tensor, Tensor, Tensor]:
            with target.cache.recording(verified, limit):
                told = target.verify(self.tree)
            if self.tree.is_chain:  # a beginning of it is kept, which need not be gathered
                self._kept.copy_(target.states)
            return *told, target.states

        def gather() -> None:
            with target.cache.recording(verified, limit):
                self._kept.copy_(target.gather(self._states, self._path))

        self.proposing = record(propose, device)
        self.tree: Tree = self.proposing.result
        try:
            self.verifying = record(verify, device)
            *self.verified, self._states = self.verifying.result
            self.gathering = None if self.tree.is_chain else record(gather, device)
        except RuntimeError as error:
            raise UnrecordableVerifierError(*error.args) from error

    def propose(self, unseen: Sequence[int], states: Tensor, drafted: int, verified: int) -> None:
        """Propose what may follow.

        Args:
            unseen: the tokens that the draft has not seen.
            states: (1, tokens, hidden), the verifier's hidden state before each of them.
            drafted: how many slots of the draft's cache are confirmed.
            verified: likewise, of the verifier's.

        """
        count = len(unseen)
        said = [count, drafted, verified, *unseen, *[0] * (self.longest - count)]
        self._said.copy_(torch.tensor(said), non_blocking=True)
        if states.data_ptr() != self._kept.data_ptr():  # they are not of this recording's last step
            self._kept[:, :count].copy_(states)
        self.proposing.replay()

    def verify(self) -> None:
        """Run the verifier on what was proposed last."""
        self.verifying.replay()

    def keep(self, path: Sequence[int]) -> Tensor:
        """Bring nodes to the front; their hidden states, (1, nodes, hidden)."""
        if self.gathering is not None:
            self._path[0, : len(path)].copy_(torch.tensor(path), non_blocking=True)
            self.gathering.replay()
        return self._kept[:, : len(path)]


class Workspace:
    """What a draft keeps from one generation to the next: caches, and graphs over them.

    It belongs to one draft and the verifier that is attached to it, and serves one generation at
    a time. Copied or pickled, it is empty.

    Attributes:
        refused: whether the verifier cannot be recorded, so that nothing is any more.
        recordings: the last ``KEPT`` ones that were used, in that order, by all that they depend
            on besides the models; ``None`` where proposing cannot be recorded.
        draft_cache: the draft's, over which they were recorded.
        verifier_cache: likewise, the verifier's.

    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: tuple[Hashable, ...] | None = None
        self.refused = False
        self.recordings: dict[Hashable, Recording | None] = {}
        self.draft_cache = self.verifier_cache = BlockCache([0])

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()

    @contextmanager
    def lent(
        self, draft: Draft, verifier: PreTrainedModel, padding: Sequence[int]
    ) -> Iterator[bool]:
        """Take the workspace for one generation, if its steps can be recorded and it is free.

        Yields:
            whether they can and it is.

        """
        if self.refused or not replayable(draft, verifier, padding):
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

    def recorded(self, key: Hashable, record: Callable[[], Recording]) -> Recording | None:
        """The recording of a key, made if there is none yet; ``None`` if it cannot be made.

        Where proposing cannot be recorded, this is only known for this key: it may be owed to a
        setting of sampling. A verifier that cannot be recorded is not tried again.
        """
        recording = None
        if key in self.recordings:
            recording = self.recordings.pop(key)
        elif not self.refused:
            try:
                recording = record()
            except UnrecordableVerifierError as error:
                self.refused = True
                log_that_not(error, "the verifier")
            except RuntimeError as error:
                log_that_not(error, "the proposal")
        self.recordings[key] = recording  # as the last one
        if len(self.recordings) > KEPT:
            del self.recordings[next(iter(self.recordings))]
        return recording


def log_that_not(error: RuntimeError, part: str) -> None:
    """Tell why a part of a step cannot be recorded."""
    reason = str(error).partition("\n")[0]
    logger.debug(f"No CUDA graphs, since {part} cannot be recorded: {reason}")


class ReplayedSteps(Steps):
    """Steps that are recorded once for each number of slots, and then replayed.

    The steps of a number of slots for which there is no recording are run as ``Steps`` runs them.

    Args:
        drafter: with the workspace's cache.
        target: likewise.
        workspace: lent for this generation.
        proposal: what the drafter proposes by.
        slots: how many slots the prompt and all that may follow it take.

    Attributes:
        limit: how many slots the attention of the current step goes over.
        recording: the graphs for so many, if there are any.

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
        self.proposal = proposal.model_dump_json(), drafter.warp
        self.slots = slots
        self.limit = 0
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
        limit = limit_for(self.target.cache.start + self.drafter.reach)
        if limit != self.limit:
            self.limit, self.recording = limit, self._recording(limit, states)
        if self.recording is None:
            return super().propose(unseen, states)
        drafted, verified = self.drafter.cache.lengths[0], self.target.cache.lengths[0]
        self.recording.propose(unseen[0], states, drafted, verified)
        self.drafter.cache.confirm([len(unseen[0])])
        return self.recording.tree

    def verify(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """See ``Steps``."""
        if self.recording is None:
            return super().verify(tree)
        self.recording.verify()
        logits, told = self.recording.verified
        return logits, told

    def keep(self, tree: Tree, paths: Sequence[Sequence[int]]) -> Tensor:
        """See ``Steps``."""
        if self.recording is None:
            return super().keep(tree, paths)
        states = self.recording.keep(paths[0])
        self.target.cache.confirm([len(paths[0])])
        return states

    def _recording(self, limit: int, states: Tensor) -> Recording | None:
        """The graphs for so many slots; ``None`` if they cannot be made."""
        self.workspace.reserve(limit)
        return self.workspace.recorded(
            (self.proposal, limit, self.target.last_position),
            lambda: Recording(self.drafter, self.target, limit, states),
        )


def limit_for(slots: int) -> int:
    """The number of slots that an attention goes over, of which so many are needed."""
    return max(FEWEST_SLOTS, 1 << (slots - 1).bit_length())


def replayable(draft: Draft, verifier: PreTrainedModel, padding: Sequence[int]) -> bool:
    """Whether the steps of a generation could be recorded, so far as can be told before.

    Both models must be on one device that records, and take masks; and there must be one prompt
    without padding.
    """
    if not isinstance(draft, nn.Module) or verifier.training or draft.training:
        return False
    devices = {tensor.device for tensor in tensors_of(draft, verifier)}
    return (
        list(padding) == [0]
        and len(devices) == 1
        and next(iter(devices)).type in RECORDERS
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
