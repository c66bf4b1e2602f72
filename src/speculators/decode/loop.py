"""The loop of speculative decoding: propose, verify, keep what the verifier agrees with."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from speculators.decode.cache import BlockCache
from speculators.decode.drafter import Draft
from speculators.decode.gpu.cuda_graphs import ReplayedSteps, Workspace
from speculators.decode.linear import linear_layers
from speculators.decode.proposals import drafter_of
from speculators.decode.refusals import (
    check_arguments,
    check_batch,
    check_generation,
    check_inputs,
    check_linear,
    check_proposal,
    left_padding,
)
from speculators.decode.sampling import Choice, Warp, for_row, warp_of
from speculators.decode.steps import Steps
from speculators.decode.stopping import Stopping
from speculators.decode.tree import Tree
from speculators.decode.verification import VerifierPass, children_of, depth_of, walk
from speculators.format.config import ProposalMethod

__all__ = ["Generation", "VerifiedStep", "speculate"]


@dataclass
class Generation:
    """The result of speculative decoding.

    A *step* is one pass of the verifier over a proposal. The first new token comes from the prefill
    and belongs to no step.

    Attributes:
        sequences: (batch, length), prompts and generated tokens, padded as ``generate`` pads.
        accepted: by prompt and step, the number of drafted tokens that the verifier accepted; the
            step yields one more token, the verifier's own. In a prompt's last step some of them
            may lie beyond the end of its sequence.
        offered: by prompt and step, the most drafted tokens that could have been accepted: the
            length of the chain or the depth of the tree.

    """

    sequences: Tensor
    accepted: list[list[int]]
    offered: list[list[int]]


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """What was proposed for one prompt in a step, and what the verifier made of it.

    The prefill counts as a step without proposals here.

    Attributes:
        prompt: which of the prompts.
        drafted: the proposed tokens, by the verifier's ids, parents before their children.
        parents: for each of them, the index of its parent among them; -1 for those that follow the
            last confirmed token.
        accepted: the indices of those that the verifier accepted, in order.
        added: the tokens that were added to the sequence: the accepted ones and one of the
            verifier's own, or fewer if the sequence ended before.

    """

    prompt: int
    drafted: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: tuple[int, ...]
    added: tuple[int, ...]


def speculate(
    draft: Draft,
    verifier: PreTrainedModel,
    input_ids: Tensor,
    *,
    proposal: ProposalMethod,
    attention_mask: Tensor | None = None,
    generation: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    workspace: Workspace | None = None,
    on_step: Callable[[VerifiedStep], None] | None = None,
    **settings: Any,
) -> Generation:
    """Generate what the verifier's own ``generate`` would, in fewer passes of the verifier.

    Args:
        draft: a draft for the verifier.
        verifier: a causal language model of transformers.
        input_ids: (batch, length), prompts, padded at the left.
        proposal: how the draft proposes.
        attention_mask: (batch, length), 0 where a prompt is padded.
        generation: as for the verifier's ``generate``, with the same defaults.
        streamer: receives each token as the verifier confirms it; for a single prompt only.
        workspace: keeps what the next generation with both models can reuse, and lets steps be
            replayed as CUDA graphs where possible.
        on_step: called after each step, for each prompt that has not ended.
        **settings: further arguments of the verifier's ``generate``.

    Raises:
        GenerationError: if the settings, the proposal, the draft or the verifier do not allow it.

    """
    check_proposal(proposal)
    check_arguments(settings)
    tokenizer = settings.pop("tokenizer", None)
    stop_strings = settings.get("stop_strings") or getattr(generation, "stop_strings", None)
    if tokenizer is not None and stop_strings:
        # transformers does not pass the tokenizer on to a custom decoding loop.
        criteria = settings.get("stopping_criteria") or []
        stop = StopStringCriteria(tokenizer, stop_strings)
        settings["stopping_criteria"] = StoppingCriteriaList([*criteria, stop])
        settings.pop("stop_strings", None)
        if generation is not None:
            generation = copy.deepcopy(generation)
            generation.stop_strings = None
    result: Generation = verifier.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=attention_mask,
        generation_config=generation,
        # ``generate`` puts the prompt into the streamer, but does not pass the streamer on.
        streamer=streamer,
        custom_generate=partial(
            _decode,
            draft=draft,
            proposal=proposal,
            streamer=streamer,
            workspace=workspace,
            on_step=on_step,
        ),
        **settings,
    )
    return result


@dataclass
class Continuation:
    """One prompt and the tokens generated for it so far.

    Attributes:
        prompt: its number.
        tokens: of both, padding included.
        choice: how the verifier chooses its tokens.
        stopping: tells when it ends.
        streamer: receives each new token.
        on_step: as for ``speculate``.
        ended: whether it has ended.
        accepted: as for ``Generation``.
        offered: as for ``Generation``.

    """

    prompt: int
    tokens: list[int]
    choice: Choice
    stopping: Stopping
    streamer: BaseStreamer | None
    on_step: Callable[[VerifiedStep], None] | None
    ended: bool = False
    accepted: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)

    def extend(
        self,
        tokens: Sequence[int],
        drafted: Sequence[int] = (),
        parents: Sequence[int] = (),
        accepted: Sequence[int] = (),
    ) -> None:
        """Add the tokens of a step, up to the one that ends the sequence.

        Args:
            tokens: those that the verifier chose.
            drafted: as for ``VerifiedStep``, as are the others.
            parents: of the drafted tokens.
            accepted: among the drafted tokens.

        """
        before = len(self.tokens)
        self._add(tokens)
        if self.on_step is not None:
            added = tuple(self.tokens[before:])
            self.on_step(
                VerifiedStep(self.prompt, tuple(drafted), tuple(parents), tuple(accepted), added)
            )

    def _add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if self.stopping(self.tokens):
                self.ended = True
                return


def _decode(
    verifier: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: Draft,
    proposal: ProposalMethod,
    streamer: BaseStreamer | None,
    workspace: Workspace | None,
    on_step: Callable[[VerifiedStep], None] | None,
    **inputs: Any,
) -> Generation:
    """The decoding loop that transformers' ``generate`` calls once it has prepared its inputs."""
    do_sample, device = bool(generation_config.do_sample), input_ids.device
    stopping = Stopping(stopping_criteria, input_ids.device)
    check_generation(generation_config, logits_processor)
    check_inputs(inputs)
    if linear_layers(verifier):
        check_linear(type(verifier).__name__, proposal)
    if len(input_ids) > 1:
        check_batch(logits_processor, stopping, streamer)
    attention_mask = inputs.get("attention_mask")
    padding = left_padding(input_ids, attention_mask)
    warp = warp_of(logits_processor)
    max_length = int(generation_config.max_length or 0)

    continuations = [
        Continuation(
            row,
            tokens,
            Choice(for_row(logits_processor, row), do_sample, device),
            stopping,
            streamer,
            on_step,
        )
        for row, tokens in enumerate(input_ids.tolist())
    ]
    with steps_of(draft, verifier, padding, proposal, warp, max_length, workspace) as steps:
        logits = steps.prefill(input_ids, attention_mask, inputs.get("position_ids"))
        for continuation, last in zip(continuations, logits, strict=True):
            continuation.extend([continuation.choice(continuation.tokens, last)])
        unseen = [continuation.tokens[-1:] for continuation in continuations]  # by the draft
        active = continuations
        while remaining := [row for row, one in enumerate(active) if not one.ended]:
            if len(remaining) < len(active):
                active = [active[row] for row in remaining]
                unseen = [unseen[row] for row in remaining]
                steps.select(remaining)
            tree = steps.propose(unseen)
            paths, unseen = _follow(
                tree, *steps.verify(tree), dict(zip(steps.rows, active, strict=True))
            )
            steps.keep(tree, paths)
    if streamer is not None:
        streamer.end()
    return Generation(
        sequences=_right_padded(continuations, generation_config).to(input_ids.device),
        accepted=[continuation.accepted for continuation in continuations],
        offered=[continuation.offered for continuation in continuations],
    )


@contextmanager
def steps_of(
    draft: Draft,
    verifier: PreTrainedModel,
    padding: Sequence[int],
    proposal: ProposalMethod,
    warp: Warp,
    max_length: int,
    workspace: Workspace | None,
) -> Iterator[Steps]:
    """The steps of one generation, replayed as CUDA graphs if the workspace can be used for it."""
    unused = nullcontext(enter_result=False)
    tokens = len(padding) * (1 + proposal.speculative_tokens)
    with workspace.acquire(draft, verifier, padding, tokens) if workspace else unused as acquired:
        if workspace is not None and acquired:
            drafter = drafter_of(draft, workspace.draft_cache, proposal, warp)
            cache, layers = workspace.verifier_cache, draft.verifier_layers
            verifier_pass = VerifierPass(verifier, cache, max_length, layers)
            steps: Steps = ReplayedSteps(drafter, verifier_pass, workspace, proposal, max_length)
        else:
            drafter = drafter_of(draft, BlockCache(padding), proposal, warp)
            cache = BlockCache(padding, linear_layers(verifier))
            layers = draft.verifier_layers
            steps = Steps(drafter, VerifierPass(verifier, cache, max_length, layers))
        with steps.verifier_pass:
            yield steps


def _follow(
    tree: Tree,
    logits: Tensor,
    packed: Tensor,
    continuations: Mapping[int, Continuation],
) -> tuple[list[list[int]], list[list[int]]]:
    """Follow the verifier's choices down each row's tree, and add its tokens to the continuations.

    Args:
        tree: the proposal.
        logits: (rows, nodes, vocabulary), the verifier's.
        packed: see ``packed_for_host``.
        continuations: by row.

    Returns:
        in the same order, the nodes on the path, and the verifier's token after each of them.

    """
    tokens, parents, best = packed.tolist()
    paths, chosen = [], []
    for row, continuation in continuations.items():
        choose = _chooser(tree, logits, row, continuation)
        if continuation.choice.is_argmax:
            choose = best[row].__getitem__
        path, drawn = walk(children_of(tokens[row], parents[row]), choose)
        continuation.accepted.append(len(path) - 1)
        continuation.offered.append(depth_of(parents[row]))
        continuation.extend(
            drawn,
            drafted=tokens[row][1:],
            parents=[parent - 1 for parent in parents[row][1:]],
            accepted=[node - 1 for node in path[1:]],
        )
        paths.append(path)
        chosen.append(drawn)
    return paths, chosen


def _chooser(
    tree: Tree, logits: Tensor, row: int, continuation: Continuation
) -> Callable[[int], int]:
    """A function from a node of a row to the verifier's choice after it.

    It must be called for the nodes of one path, in order, starting at the root.
    """
    before = [*continuation.tokens]

    def choose(node: int) -> int:
        proposed = q = None
        if tree.probabilities is not None and node < tree.probabilities.shape[1]:
            proposed, q = tree.tokens[row, node + 1 : node + 2], tree.probabilities[row, node]
        before.append(continuation.choice(before, logits[row, node], proposed, q))
        return before[-1]

    return choose


def _right_padded(
    continuations: Sequence[Continuation], generation_config: GenerationConfig
) -> Tensor:
    """The tokens of all as one tensor, padded at the right."""
    sequences = [torch.tensor(continuation.tokens) for continuation in continuations]
    # The only place where transformers keeps the padding token it has settled on. Without an
    # end-of-sequence token there is none, and all sequences have the same length.
    pad = getattr(generation_config, "_pad_token_tensor", None)
    return pad_sequence(sequences, batch_first=True, padding_value=0 if pad is None else int(pad))
