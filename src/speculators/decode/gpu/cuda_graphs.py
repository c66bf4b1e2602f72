"""Steps of speculation as CUDA graphs, recorded once and replayed.

With few prompts, a step is a thousand small kernels, which the host launches more slowly than a
GPU runs them. A CUDA graph launches all of them at once, but always on the same memory and with the
same shapes. So newly confirmed tokens are padded to the longest path through a tree, numbers of
confirmed slots are read from a tensor, attention covers a number of slots that is a power of two,
with a mask over those that are not in use, and there may be rows without a prompt. Prefill is
recorded in the same way, for prompts that are not long. What is recorded is fused first
(``fusion.py``).

The graphs, and the caches that they were recorded over, are kept for the next generation. Steps
that cannot be recorded run eagerly.
"""

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.decode.cache import BlockCache
from speculators.decode.drafter import Draft, Drafter
from speculators.decode.gpu.fusion import fused
from speculators.decode.linear import linear_layers
from speculators.decode.steps import Steps
from speculators.decode.tree import Tree
from speculators.decode.verification import MASKABLE, VerifierPass
from speculators.format.config import ProposalMethod

__all__ = ["ReplayedSteps", "Workspace", "power_of_two"]

R = TypeVar("R", "Recording", "PromptRecording")

MIN_SLOTS = 256
"""The smallest number of slots that attention covers."""

RESERVED_TOKENS = 1024
"""The number of new tokens that the caches make room for before prefill."""

MIN_PROMPT = 32
"""The smallest number of tokens that prefill is recorded for."""

MAX_TOKENS = 2048
"""The greatest number of tokens that the verifier runs on in a step that is recorded.

Steps of more keep a GPU busy anyway, and graphs keep the memory for their results, the logits.
"""

MAX_PROMPT_TOKENS = 4096
"""Likewise for prefill, of which only few logits are kept."""

HEADER = 4
"""How many numbers the host tells the graphs about each row besides tokens."""

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
        inputs: as for ``propose``, for which recording starts. Nothing is written before the end of
            the confirmed slots that they give.
        padded: whether rows may have padding.
        limit: the number of slots.
        states: hidden states of the verifier, of which only width, dtype and device matter.

    Attributes:
        proposing: the graph of the draft's part.
        verifying: the graph of the verifier's part.
        gathering: the graph that moves kept nodes of a tree to the front; ``None`` for a chain.
        tree: the last proposal; the next ``propose`` overwrites its tensors.
        verified: the result of ``VerifierPass.verify`` for it; the next ``verify`` overwrites its
            tensors.
        states: (rows, longest path, verifier width), the verifier's states along the last path that
            was kept in each row.

    Raises:
        UnrecordableVerifierError: if the verifier's part cannot be recorded.
        RuntimeError: if the draft's part cannot be recorded.

    """

    def __init__(
        self,
        drafter: Drafter,
        verifier_pass: VerifierPass,
        inputs: Sequence[Sequence[int]],
        limit: int,
        states: Tensor,
        *,
        padded: bool,
    ) -> None:
        device, longest = states.device, drafter.deepest + 1
        draft: Any = drafter.draft
        # All input from the host, in one tensor so that one copy is enough.
        self._inputs = torch.tensor(inputs, device=device)
        count, draft_length, verifier_length, padding = self._inputs[:, :HEADER].unbind(1)
        unseen = self._inputs[:, HEADER:]
        pads = padding if padded else None
        # The path through each row's tree that the verifier accepted.
        self._path = torch.zeros(len(inputs), longest, dtype=torch.long, device=device)
        self.states = states.new_zeros(len(inputs), longest, states.shape[2])
        self._warp = drafter.warp  # keeps tensors of warpers alive, which the graphs read
        record = RECORDERS[device.type]

        def propose() -> Tree:
            with drafter.cache.recording(draft_length, pads, limit), fused(draft, drafter.cache):
                return drafter.propose(unseen, self.states, count)

        def verify() -> tuple[Tensor, Tensor, Tensor]:
            cache = verifier_pass.cache
            with cache.recording(verifier_length, pads, limit), fused(verifier_pass.model, cache):
                logits, packed = verifier_pass.verify(self.tree)
            if self.tree.is_chain:  # its accepted nodes are already at the front
                self.states.copy_(verifier_pass.states)
            return logits, packed, verifier_pass.states

        def gather() -> None:
            with verifier_pass.cache.recording(verifier_length, pads, limit):
                self.states.copy_(verifier_pass.gather(self._verified_states, self._path))

        self.proposing = record(propose, device)
        self.tree: Tree = self.proposing.result
        try:
            self.verifying = record(verify, device)
            *self.verified, self._verified_states = self.verifying.result
            self.gathering = None if self.tree.is_chain else record(gather, device)
        except RuntimeError as error:
            raise UnrecordableVerifierError(*error.args) from error

    def propose(self, inputs: Sequence[Sequence[int]], states: Tensor) -> None:
        """Propose what may follow the last confirmed token of each row.

        Args:
            inputs: by row, see ``ReplayedSteps.inputs_of``.
            states: (rows or fewer, length or less, verifier width), the verifier's hidden states at
                the tokens before those that the draft has not seen.

        """
        self._inputs.copy_(torch.tensor(inputs), non_blocking=True)
        if states.data_ptr() != self.states.data_ptr():  # not from this recording's last step
            rows, length = states.shape[:2]
            self.states[:rows, :length].copy_(states)
        self.proposing.replay()

    def verify(self) -> None:
        """Run the verifier on the last proposal."""
        self.verifying.replay()

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Move the nodes of each row's path to the front."""
        if self.gathering is not None:
            length = self._path.shape[1]
            padded = [[*path, *[0] * (length - len(path))] for path in paths]
            self._path.copy_(torch.tensor(padded), non_blocking=True)
            self.gathering.replay()


class PromptRecording:
    """A graph of prefill, for prompts of up to ``length`` tokens.

    Args:
        drafter: keeps the prompts in its cache.
        verifier_pass: runs on them first.
        rows: the number of prompts.
        length: the number of tokens.
        padded: whether prompts may be padded at the left.

    Raises:
        RuntimeError: if it cannot be recorded.

    """

    def __init__(
        self, drafter: Drafter, verifier_pass: VerifierPass, rows: int, length: int, *, padded: bool
    ) -> None:
        draft: Any = drafter.draft
        device = draft.device
        self._tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        # By row, the place of the last token, and the number of padding tokens.
        self._ends = torch.zeros(rows, 2, dtype=torch.long, device=device)
        last, padding = self._ends[0, :1], self._ends[:, 1]
        self._nothing = torch.zeros_like(padding)  # kept, since the graph reads it
        pads = padding if padded else None

        def prefill() -> tuple[Tensor, Tensor]:
            cache = verifier_pass.cache
            with cache.recording(self._nothing, pads, length), fused(verifier_pass.model, cache):
                logits, states = verifier_pass.prefill_recorded(self._tokens, last)
            with drafter.cache.recording(self._nothing, pads, length), fused(draft, drafter.cache):
                drafter.prefill(self._tokens[:, 1:], states[:, :-1])
            return logits, states.index_select(1, last)

        self.graph = RECORDERS[device.type](prefill, device)

    def run(self, tokens: Tensor, padding: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run on prompts, (rows, length), of which there may be fewer, and shorter ones.

        Args:
            tokens: padded at the left.
            padding: by row, the number of padding tokens.

        Returns:
            the verifier's logits after the last tokens, (rows, vocabulary), and its hidden states
            at them, (rows, 1, verifier width).

        """
        rows, length = tokens.shape
        # What was left in other rows, and further right, is computed too, and never read.
        self._tokens[:rows, :length].copy_(tokens)
        ends = torch.tensor([[length - 1, padded] for padded in padding])
        self._ends[:rows].copy_(ends, non_blocking=True)
        self.graph.replay()
        logits, states = self.graph.result
        return logits[:rows], states[:rows]


class Workspace:
    """What is kept for a draft from one generation to the next: caches, and graphs over them.

    It belongs to one draft and the verifier attached to it, and serves one generation at a time.
    A copy of it, by pickle too, is empty.

    Attributes:
        verifier_unrecordable: whether the verifier turned out not to be recordable; nothing is
            recorded then.
        recordings: the ``MAX_RECORDINGS`` most recently used recordings of steps, the latest last,
            keyed by all that they depend on besides the models; ``None`` where a step cannot be
            recorded.
        prompts: likewise, of prefill.
        draft_cache: the draft's cache, which they were recorded over.
        verifier_cache: the verifier's cache, likewise.

    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: tuple[Hashable, ...] | None = None
        self.verifier_unrecordable = False
        self.recordings: dict[Hashable, Recording | None] = {}
        self.prompts: dict[Hashable, PromptRecording | None] = {}
        self.draft_cache = self.verifier_cache = BlockCache([0])
        self._known: set[Hashable] = set()

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()

    def is_known(self, key: Hashable) -> bool:
        """Whether this was asked for the same key before."""
        known = key in self._known
        self._known.add(key)
        return known

    @contextmanager
    def acquire(
        self, draft: Draft, verifier: PreTrainedModel, padding: Sequence[int], tokens: int
    ) -> Iterator[bool]:
        """Acquire the workspace for one generation, if it is free and the steps can be recorded.

        Args:
            draft: the model.
            verifier: the model attached to it.
            padding: by prompt, the number of padding tokens at the left.
            tokens: the number of tokens that the verifier runs on in each step.

        Yields:
            whether it was acquired.

        """
        if self.verifier_unrecordable or tokens > MAX_TOKENS or not recordable(draft, verifier):
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
                cache.restart(padding)
            # Tensors made in inference mode could not be written outside of it later.
            with torch.inference_mode(mode=False), torch.no_grad():
                yield True
        finally:
            self._lock.release()

    def clear(self) -> None:
        """Drop the graphs and the caches, and free their memory."""
        self._forget()
        self.draft_cache, self.verifier_cache = BlockCache([0]), BlockCache([0])
        self._models = None

    def reserve(self, slots: int, rows: int) -> None:
        """Make room in both caches; the graphs are dropped if keys and values had to be moved."""
        moved = [cache.reserve(slots, rows) for cache in (self.draft_cache, self.verifier_cache)]
        if any(moved):
            self._forget()

    def recorded(
        self, kept: dict[Hashable, R | None], key: Hashable, record: Callable[[], R]
    ) -> R | None:
        """The recording for a key, made if there is none yet; ``None`` if it cannot be made.

        Args:
            kept: ``recordings`` or ``prompts``.
            key: the key.
            record: makes it.

        If proposing cannot be recorded, this holds for this key only, since a sampling setting may
        be the cause. A verifier that cannot be recorded is not tried again.

        Args:
            kept: ``recordings`` or ``prompts``.
            key: the key.
            record: makes it.

        """
        recording = None
        if key in kept:
            recording = kept.pop(key)
        elif not self.verifier_unrecordable:
            try:
                recording = record()
            except UnrecordableVerifierError as error:
                self.verifier_unrecordable = True
                log_unrecordable(error, "the verifier")
            except RuntimeError as error:
                log_unrecordable(error, "the proposal")
        kept[key] = recording  # now the most recently used
        if len(kept) > MAX_RECORDINGS:
            del kept[next(iter(kept))]
        return recording

    def _forget(self) -> None:
        """Drop the graphs."""
        self.recordings.clear()
        self.prompts.clear()


def log_unrecordable(error: RuntimeError, part: str) -> None:
    """Log why a part of a step cannot be recorded."""
    reason = str(error).partition("\n")[0]
    logger.debug(f"No CUDA graphs, since {part} cannot be recorded: {reason}")


class ReplayedSteps(Steps):
    """Steps that are recorded once for each number of slots, and then replayed.

    For numbers of slots that could not be recorded for, steps run as in ``Steps``. The recorded
    number of rows stays the same when sequences end: their rows then run on a single token.

    Args:
        drafter: with the workspace's draft cache.
        verifier_pass: with the workspace's verifier cache.
        workspace: acquired for this generation.
        proposal: the drafter's method.
        slots: the greatest number of slots that the prompts and their continuations can take.

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
        self._padded = any(verifier_pass.cache.padding)
        self._recorded_rows = rows_for(len(self.rows))

    def prefill(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """See ``Steps``; makes room in the caches first.

        A graph is recorded for a length when it comes up for the second time, since recording takes
        as long as several prompts do.
        """
        rows, length = tokens.shape
        slots = min(self.slots, length + RESERVED_TOKENS)
        self._reserve(limit_for(slots + self.drafter.reach))
        recorded = max(MIN_PROMPT, power_of_two(length))
        shape = (self._recorded_rows, recorded, self._padded, self.verifier_pass.last_position)
        recording = None
        if self._recorded_rows * recorded <= MAX_PROMPT_TOKENS and self.workspace.is_known(shape):
            recording = self.workspace.recorded(
                self.workspace.prompts, shape, lambda: self._prompt_recording(recorded)
            )
        if recording is None:
            return super().prefill(tokens, attention_mask, position_ids)
        logits, self.states = recording.run(tokens, self.verifier_pass.cache.padding)
        self.verifier_pass.cache.confirm([length] * rows)
        self.drafter.cache.confirm([length - 1] * rows)
        return logits

    def propose(self, unseen: Sequence[Sequence[int]]) -> Tree:
        """See ``Steps``."""
        limit = limit_for(self.verifier_pass.cache.start + self.drafter.reach)
        if limit != self.limit:
            self.limit, self.recording = limit, self._recording(limit, unseen)
        if self.recording is None:
            if len(self.rows) < len(self.verifier_pass.cache.lengths):
                super().select(range(len(self.rows)))
            return super().propose(unseen)
        self.recording.propose(self.inputs_of(unseen), self.states)
        counts = [0] * len(self.drafter.cache.lengths)
        for row, tokens in zip(self.rows, unseen, strict=True):
            counts[row] = len(tokens)
        self.drafter.cache.confirm(counts)
        return self.recording.tree

    def verify(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """See ``Steps``."""
        if self.recording is None:
            return super().verify(tree)
        self.recording.verify()
        logits, packed = self.recording.verified
        return logits, packed

    def keep(self, tree: Tree, paths: Sequence[Sequence[int]]) -> None:
        """See ``Steps``."""
        if self.recording is None:
            super().keep(tree, paths)
            return
        by_row: list[Sequence[int]] = [()] * self._recorded_rows
        for row, path in zip(self.rows, paths, strict=True):
            by_row[row] = path
        self.recording.keep(by_row)
        self.states = self.recording.states
        cache = self.verifier_pass.cache
        cache.confirm([len(path) for path in by_row[: len(cache.lengths)]])

    def select(self, kept: Sequence[int]) -> None:
        """See ``Steps``; recorded rows stay where they are."""
        if self.recording is None:
            super().select(kept)
        else:
            self.rows = [self.rows[place] for place in kept]

    def inputs_of(self, unseen: Sequence[Sequence[int]]) -> list[list[int]]:
        """What the host tells the graphs of a step, by recorded row.

        Returns:
            the number of tokens that the draft has not seen, the confirmed lengths of the draft's
            and the verifier's cache, the number of slots with padding, and the tokens, padded to
            the longest path through a tree. Rows without a sequence have one token, at the first
            slot.

        """
        longest = self.drafter.deepest + 1
        inputs = [[1, *[0] * (HEADER - 1 + longest)] for _ in range(self._recorded_rows)]
        draft, verifier = self.drafter.cache, self.verifier_pass.cache
        for row, tokens in zip(self.rows, unseen, strict=True):
            header = (len(tokens), draft.lengths[row], verifier.lengths[row], verifier.padding[row])
            inputs[row][: HEADER + len(tokens)] = (*header, *tokens)
        return inputs

    def _recording(self, limit: int, unseen: Sequence[Sequence[int]]) -> Recording | None:
        """The graphs for ``limit`` slots; ``None`` if they cannot be made."""
        self._reserve(limit)

        def record() -> Recording:
            inputs = self.inputs_of(unseen)
            return Recording(
                self.drafter, self.verifier_pass, inputs, limit, self.states, padded=self._padded
            )

        shape = (self._recorded_rows, limit, self._padded, self.verifier_pass.last_position)
        return self.workspace.recorded(self.workspace.recordings, (self.proposal, shape), record)

    def _prompt_recording(self, length: int) -> PromptRecording:
        rows, padded = self._recorded_rows, self._padded
        return PromptRecording(self.drafter, self.verifier_pass, rows, length, padded=padded)

    def _reserve(self, slots: int) -> None:
        self.workspace.reserve(slots, self._recorded_rows)


def limit_for(slots: int) -> int:
    """The number of slots for attention to cover if this many are needed."""
    return max(MIN_SLOTS, power_of_two(slots))


def rows_for(prompts: int) -> int:
    """The number of rows to record for this many prompts: a power of two, or a multiple of 8."""
    return power_of_two(prompts) if prompts < 8 else -(-prompts // 8) * 8


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least this number."""
    return 1 << (number - 1).bit_length()


def recordable(draft: Draft, verifier: PreTrainedModel) -> bool:
    """Whether the steps of a generation can be recorded, as far as can be told beforehand.

    Both models must be in eval mode, on one device that has a recorder, and take 4D masks. The
    states of linear attention are taken back on the host.
    """
    if not isinstance(draft, nn.Module) or verifier.training or draft.training:
        return False
    if linear_layers(verifier):
        return False
    devices = {tensor.device for tensor in tensors_of(draft, verifier)}
    return (
        len(devices) == 1
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
