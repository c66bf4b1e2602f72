"""Steps of speculation as CUDA graphs, recorded once and replayed.

With one prompt, a step is a thousand small kernels, which the host launches more slowly than a GPU
runs them. A CUDA graph launches all of them at once, but always on the same memory and with the
same shapes. So newly confirmed tokens are padded to the longest path through a tree, the number of
confirmed slots is read from a tensor, and attention covers a number of slots that is a power of
two, with a mask over those that are not in use.

The graphs, and the caches that they were recorded over, are kept for the next generation. Steps
that cannot be recorded run eagerly.
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
from speculators.decode.drafter import Draft, Drafter
from speculators.decode.steps import Steps
from speculators.decode.tree import Tree
from speculators.decode.verification import MASKABLE, VerifierPass
from speculators.format.config import ProposalMethod

__all__ = ["ReplayedSteps", "Workspace"]

MIN_SLOTS = 256
"""The smallest number of slots that attention covers."""

RESERVED_TOKENS = 1024
"""The number of new tokens that the caches make room for before prefill."""

MAX_RECORDINGS = 16
"""How many recordings are kept: there is no end of sampling settings to record for."""

RECORDING_LOCK = threading.Lock()
"""Held while recording, since PyTorch records on a stream that all threads share."""


class Graph:
    """A CUDA graph of a function, recorded once and replayed any number of times.

    Each replay draws new random numbers from PyTorch's default generator of the GPU, the same ones
    that the function would draw (see the note on CUDA graphs in ATen/cuda/CUDAGeneratorImpl.h).
    Recording leaves the generator as it was, so a seed gives the same output whether a step is
    recorded first or only replayed.

    Args:
        run: the function. It takes no arguments and always uses the same tensors, which must live
            as long as the graph.
        device: the GPU.

    Attributes:
        result: what the function returned; each ``replay`` overwrites its tensors.

    Raises:
        RuntimeError: if the function cannot be recorded, as when it waits for the GPU.

    """

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        with RECORDING_LOCK, torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), side_stream(device)
            random_state = torch.cuda.get_rng_state(device)
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    run()  # one-time initialisation may wait for the GPU
                    with synchronization_forbidden():
                        run()
            finally:
                # After a failure too: kernels already launched must not write during later steps.
                current.wait_stream(side)
                torch.cuda.set_rng_state(random_state, device)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may keep using the GPU meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.result = run()

    def replay(self) -> None:
        """Run the recorded work again."""
        self._graph.replay()


@cache  # libraries keep megabytes of workspace for every stream that they have run on
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which functions run before they are recorded."""
    return torch.cuda.Stream(device)


@contextmanager
def synchronization_forbidden() -> Iterator[None]:
    """Make it an error to wait for the GPU.

    Recording would fail on that too, but leave state behind.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


RECORDERS: dict[str, Callable[[Callable[[], Any], torch.device], Graph]] = {"cuda": Graph}
"""The recorder for each type of device; other devices have no graphs."""


class UnrecordableVerifierError(RuntimeError):
    """The verifier's part of a step cannot be recorded, whatever the proposal."""


class Recording:
    """The graphs of a step, for blocks within the first ``limit`` slots of both caches.

    Args:
        drafter: proposes the tree.
        verifier_pass: verifies it.
        limit: the number of slots.
        states: hidden states of the verifier, of which only shape, dtype and device matter.

    Attributes:
        proposing: the graph of the draft's part.
        verifying: the graph of the verifier's part.
        gathering: the graph that moves kept nodes of a tree to the front; ``None`` for a chain.
        tree: the last proposal; the next ``propose`` overwrites its tensors.
        verified: the result of ``VerifierPass.verify`` for it; the next ``verify`` overwrites its
            tensors.

    Raises:
        UnrecordableVerifierError: if the verifier's part cannot be recorded.
        RuntimeError: if the draft's part cannot be recorded.

    """

    def __init__(
        self, drafter: Drafter, verifier_pass: VerifierPass, limit: int, states: Tensor
    ) -> None:
        device, self.longest = states.device, drafter.deepest + 1
        # All input from the host, in one tensor so that one copy is enough: the number of tokens
        # that the draft has not seen, the confirmed lengths of both caches, and the tokens.
        # Recording starts from the current lengths, so that no confirmed slot is overwritten.
        lengths = (drafter.cache.lengths[0], verifier_pass.cache.lengths[0])
        self._inputs = torch.tensor([1, *lengths, *[0] * self.longest], device=device)
        count, draft_length, verifier_length = self._inputs[:3].split(1)
        unseen = self._inputs[None, 3:]
        # The path through a tree that the verifier accepted, and its hidden states along the path,
        # which the draft reads next.
        self._path = torch.zeros(1, self.longest, dtype=torch.long, device=device)
        self._path_states = states.new_zeros(1, self.longest, states.shape[2])
        self._warp = drafter.warp  # keeps tensors of warpers alive, which the graphs read
        record = RECORDERS[device.type]

        def propose() -> Tree:
            with drafter.cache.recording(draft_length, limit):
                return drafter.propose(unseen, self._path_states, count)

        def verify() -> tuple[Tensor, Tensor, Tensor]:
            with verifier_pass.cache.recording(verifier_length, limit):
                logits, packed = verifier_pass.verify(self.tree)
            if self.tree.is_chain:  # its accepted nodes are already at the front
                self._path_states.copy_(verifier_pass.states)
            return logits, packed, verifier_pass.states

        def gather() -> None:
            with verifier_pass.cache.recording(verifier_length, limit):
                self._path_states.copy_(verifier_pass.gather(self._states, self._path))

        self.proposing = record(propose, device)
        self.tree: Tree = self.proposing.result
        try:
            self.verifying = record(verify, device)
            *self.verified, self._states = self.verifying.result
            self.gathering = None if self.tree.is_chain else record(gather, device)
        except RuntimeError as error:
            raise UnrecordableVerifierError(*error.args) from error

    def propose(
        self, unseen: Sequence[int], states: Tensor, draft_length: int, verifier_length: int
    ) -> None:
        """Propose what may follow the last confirmed token.

        Args:
            unseen: the confirmed tokens that the draft has not seen.
            states: (1, tokens, verifier width), the verifier's hidden state at the token before
                each.
            draft_length: the number of confirmed slots in the draft's cache.
            verifier_length: the number of confirmed slots in the verifier's cache.

        """
        count = len(unseen)
        inputs = [count, draft_length, verifier_length, *unseen, *[0] * (self.longest - count)]
        self._inputs.copy_(torch.tensor(inputs), non_blocking=True)
        if states.data_ptr() != self._path_states.data_ptr():  # not from this recording's last step
            self._path_states[:, :count].copy_(states)
        self.proposing.replay()

    def verify(self) -> None:
        """Run the verifier on the last proposal."""
        self.verifying.replay()

    def keep(self, path: Sequence[int]) -> Tensor:
        """Move the nodes of a path to the front.

        Returns:
            the verifier's hidden states at them, (1, nodes, verifier width).

        """
        if self.gathering is not None:
            self._path[0, : len(path)].copy_(torch.tensor(path), non_blocking=True)
            self.gathering.replay()
        return self._path_states[:, : len(path)]


class Workspace:
    """What is kept for a draft from one generation to the next: caches, and graphs over them.

    It belongs to one draft and the verifier attached to it, and serves one generation at a time.
    A copy of it, by pickle too, is empty.

    Attributes:
        verifier_unrecordable: whether the verifier turned out not to be recordable; nothing is
            recorded then.
        recordings: the ``MAX_RECORDINGS`` most recently used recordings, the latest last, keyed by
            all that they depend on besides the models; ``None`` where proposing cannot be recorded.
        draft_cache: the draft's cache, which they were recorded over.
        verifier_cache: the verifier's cache, likewise.

    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: tuple[Hashable, ...] | None = None
        self.verifier_unrecordable = False
        self.recordings: dict[Hashable, Recording | None] = {}
        self.draft_cache = self.verifier_cache = BlockCache([0])

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()

    @contextmanager
    def acquire(
        self, draft: Draft, verifier: PreTrainedModel, padding: Sequence[int]
    ) -> Iterator[bool]:
        """Acquire the workspace for one generation, if it is free and the steps can be recorded.

        Yields:
            whether it was acquired.

        """
        if self.verifier_unrecordable or not recordable(draft, verifier, padding):
            yield False
            return
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            models = fingerprint(draft, verifier)
            if models != self._models:
                self.clear()
                self._models = models
            for cache in (self.draft_cache, self.verifier_cache):
                cache.lengths, cache.unconfirmed = [0], 0
            # Tensors made in inference mode could not be written outside of it later.
            with torch.inference_mode(mode=False), torch.no_grad():
                yield True
        finally:
            self._lock.release()

    def clear(self) -> None:
        """Drop the graphs and the caches, and free their memory."""
        self.recordings.clear()
        self.draft_cache, self.verifier_cache = BlockCache([0]), BlockCache([0])
        self._models = None

    def reserve(self, slots: int) -> None:
        """Make room in both caches; the graphs are dropped if keys and values had to be moved."""
        moved = [cache.reserve(slots) for cache in (self.draft_cache, self.verifier_cache)]
        if any(moved):
            self.recordings.clear()

    def recorded(self, key: Hashable, record: Callable[[], Recording]) -> Recording | None:
        """The recording for a key, made if there is none yet; ``None`` if it cannot be made.

        If proposing cannot be recorded, this holds for this key only, since a sampling setting may
        be the cause. A verifier that cannot be recorded is not tried again.
        """
        recording = None
        if key in self.recordings:
            recording = self.recordings.pop(key)
        elif not self.verifier_unrecordable:
            try:
                recording = record()
            except UnrecordableVerifierError as error:
                self.verifier_unrecordable = True
                log_unrecordable(error, "the verifier")
            except RuntimeError as error:
                log_unrecordable(error, "the proposal")
        self.recordings[key] = recording  # now the most recently used
        if len(self.recordings) > MAX_RECORDINGS:
            del self.recordings[next(iter(self.recordings))]
        return recording


def log_unrecordable(error: RuntimeError, part: str) -> None:
    """Log why a part of a step cannot be recorded."""
    reason = str(error).partition("\n")[0]
    logger.debug(f"No CUDA graphs, since {part} cannot be recorded: {reason}")


class ReplayedSteps(Steps):
    """Steps that are recorded once for each number of slots, and then replayed.

    For numbers of slots that could not be recorded for, steps run as in ``Steps``.

    Args:
        drafter: with the workspace's draft cache.
        verifier_pass: with the workspace's verifier cache.
        workspace: acquired for this generation.
        proposal: the drafter's method.
        slots: the greatest number of slots that the prompt and its continuation can take.

    Attributes:
        limit: the number of slots that attention covers in the current step.
        recording: the graphs for this number, if there are any.

    """

    def __init__(
        self,
        drafter: Drafter,
        verifier_pass: VerifierPass,
        workspace: Workspace,
        proposal: ProposalMethod,
        slots: int,
    ) -> None:
        super().__init__(drafter, verifier_pass)
        self.workspace = workspace
        self.proposal = proposal.model_dump_json(), drafter.warp
        self.slots = slots
        self.limit = 0
        self.recording: Recording | None = None

    def prefill(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``Steps``; makes room in the caches first."""
        slots = min(self.slots, tokens.shape[1] + RESERVED_TOKENS)
        self.workspace.reserve(limit_for(slots + self.drafter.reach))
        return super().prefill(tokens, attention_mask, position_ids)

    def propose(self, unseen: Sequence[Sequence[int]], states: Tensor) -> Tree:
        """See ``Steps``."""
        limit = limit_for(self.verifier_pass.cache.start + self.drafter.reach)
        if limit != self.limit:
            self.limit, self.recording = limit, self._recording(limit, states)
        if self.recording is None:
            return super().propose(unseen, states)
        draft_length = self.drafter.cache.lengths[0]
        verifier_length = self.verifier_pass.cache.lengths[0]
        self.recording.propose(unseen[0], states, draft_length, verifier_length)
        self.drafter.cache.confirm([len(unseen[0])])
        return self.recording.tree

    def verify(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """See ``Steps``."""
        if self.recording is None:
            return super().verify(tree)
        self.recording.verify()
        logits, packed = self.recording.verified
        return logits, packed

    def keep(self, tree: Tree, paths: Sequence[Sequence[int]]) -> Tensor:
        """See ``Steps``."""
        if self.recording is None:
            return super().keep(tree, paths)
        states = self.recording.keep(paths[0])
        self.verifier_pass.cache.confirm([len(paths[0])])
        return states

    def _recording(self, limit: int, states: Tensor) -> Recording | None:
        """The graphs for ``limit`` slots; ``None`` if they cannot be made."""
        self.workspace.reserve(limit)
        return self.workspace.recorded(
            (self.proposal, limit, self.verifier_pass.last_position),
            lambda: Recording(self.drafter, self.verifier_pass, limit, states),
        )


def limit_for(slots: int) -> int:
    """The number of slots for attention to cover if this many are needed."""
    return max(MIN_SLOTS, 1 << (slots - 1).bit_length())


def recordable(draft: Draft, verifier: PreTrainedModel, padding: Sequence[int]) -> bool:
    """Whether the steps of a generation can be recorded, as far as can be told beforehand.

    Both models must be in eval mode, on one device that has a recorder, and take 4D masks; and
    there must be a single prompt, without padding.
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
    """Whether the attention of a model takes a 4D mask."""
    return model.config._attn_implementation in MASKABLE


def fingerprint(draft: Draft, verifier: PreTrainedModel) -> tuple[Hashable, ...]:
    """A key that changes when tensors of a model are moved, cast or replaced.

    It also holds their attention implementations, which can be changed after loading.
    """
    models: tuple[Any, ...] = (draft, verifier)
    return (
        *(model.config._attn_implementation for model in models),
        *((tensor.data_ptr(), tensor.dtype) for tensor in tensors_of(draft, verifier)),
    )


def tensors_of(draft: Any, verifier: PreTrainedModel) -> Iterator[Tensor]:
    """All parameters and buffers of both models."""
    for model in (draft, verifier):
        yield from chain(model.parameters(), model.buffers())
