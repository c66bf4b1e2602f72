"""The loop of speculative decoding: propose, verify, keep what the verifier agrees with."""

import copy
from collections.abc import Callable, Iterator, Sequence
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
from speculators.decode.drafting import Draft, drafter_of
from speculators.decode.limits import (
    check_arguments,
    check_batch,
    check_generation,
    check_proposal,
    left_padding,
)
from speculators.decode.replay import ReplayedSteps, Workspace
from speculators.decode.sampling import Choice, Warp, warp_of
from speculators.decode.steps import Steps
from speculators.decode.stopping import Stopping
from speculators.decode.tree import Tree
from speculators.decode.verification import VerifierPass, children_of, depth_of, walk
from speculators.format.config import ProposalMethod

__all__ = ["Generation", "speculate"]


@dataclass
class Generation:
    """What speculative decoding gave.

    A *step* is one pass of the verifier over a proposal. The first token, which the pass over the
    prompt gives, belongs to no step.

    Attributes:
        sequences: (batch, length), prompts and what was generated, padded as ``generate`` pads.
        accepted: by prompt and step, how many drafted tokens in a row the verifier agreed with;
            the step gives one token more, the verifier's own. In a prompt's last step some of
            them may lie behind its end.
        offered: by prompt and step, how many in a row the draft offered: the length of the
            chain or the depth of the tree.

    """

    sequences: Tensor
    accepted: list[list[int]]
    offered: list[list[int]]


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
    **settings: Any,
) -> Generation:
    """Generate what the verifier's own ``generate`` would, in fewer of its passes.

    Args:
        draft: an EAGLE draft for the verifier.
        verifier: a causal language model of transformers.
        input_ids: (batch, length), prompts, padded at the left.
        proposal: how the draft proposes.
        attention_mask: (batch, length), 0 where a prompt is padded.
        generation: as the verifier's ``generate`` takes it, and with its defaults.
        streamer: is given each token as the verifier confirms it; for one prompt.
        workspace: keeps what can be used again by the next generation with both models, and lets
            steps be replayed as CUDA graphs where that can be done.
        **settings: more of what the verifier's ``generate`` takes.

    Raises:
        GenerationError: if the settings, the proposal or the verifier do not allow it.

    """
    check_proposal(proposal)
    check_arguments(settings)
    tokenizer = settings.pop("tokenizer", None)
    stop_strings = settings.get("stop_strings") or getattr(generation, "stop_strings", None)
    if tokenizer is not None and stop_strings:
        # transformers does not hand the tokenizer on to a decoding loop that is not its own.
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
        # It gives the prompt to the streamer, but does not hand the streamer on.
        streamer=streamer,
        custom_generate=partial(
            _decode, draft=draft, proposal=proposal, streamer=streamer, workspace=workspace
        ),
        **settings,
    )
    return result


@dataclass
class Prompt:
    """One prompt and what was generated after it."""

    tokens: list[int]
    stopping: Stopping
    streamer: BaseStreamer | None
    ended: bool = False
    accepted: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens up to the one that ends the sequence."""
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
    **inputs: Any,
) -> Generation:
    """What ``generate`` of transformers calls, with everything prepared, as its decoding loop."""
    choice = Choice(logits_processor, bool(generation_config.do_sample), input_ids.device)
    stopping = Stopping(stopping_criteria, input_ids.device)
    check_generation(generation_config, logits_processor)
    if len(input_ids) > 1:
        check_batch(logits_processor, stopping, streamer)
    attention_mask = inputs.get("attention_mask")
    padding = left_padding(input_ids, attention_mask)
    warp = warp_of(logits_processor)
    max_length = int(generation_config.max_length or 0)

    prompts = [Prompt(tokens, stopping, streamer) for tokens in input_ids.tolist()]
    with steps_of(draft, verifier, padding, proposal, warp, max_length, workspace) as steps:
        logits, states = steps.prefill(input_ids, attention_mask, inputs.get("position_ids"))
        for prompt, last in zip(prompts, logits, strict=True):
            prompt.extend([choice(prompt.tokens, last)])
        unseen = [prompt.tokens[-1:] for prompt in prompts]  # by the draft
        active = prompts
        while going_on := [row for row, prompt in enumerate(active) if not prompt.ended]:
            if len(going_on) < len(active):
                active = [active[row] for row in going_on]
                unseen = [unseen[row] for row in going_on]
                states = states[going_on, : max(map(len, unseen))]
                steps.select(going_on)
            tree = steps.propose(unseen, states)
            paths, unseen = _follow(tree, *steps.verify(tree), active, choice)
            states = steps.keep(tree, paths)
    if streamer is not None:
        streamer.end()
    return Generation(
        sequences=_right_padded(prompts, generation_config).to(input_ids.device),
        accepted=[prompt.accepted for prompt in prompts],
        offered=[prompt.offered for prompt in prompts],
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
    """The steps of one generation, replayed if the workspace can be had for it."""
    nothing = nullcontext(enter_result=False)
    with workspace.lent(draft, verifier, padding) if workspace else nothing as lent:
        if workspace is not None and lent:
            drafter = drafter_of(draft, workspace.draft_cache, proposal, warp)
            target = VerifierPass(verifier, workspace.verifier_cache, max_length)
            steps: Steps = ReplayedSteps(drafter, target, workspace, proposal, max_length)
        else:
            drafter = drafter_of(draft, BlockCache(padding), proposal, warp)
            steps = Steps(drafter, VerifierPass(verifier, BlockCache(padding), max_length))
        with steps.target:
            yield steps


def _follow(
    tree: Tree, logits: Tensor, told: Tensor, prompts: Sequence[Prompt], choice: Choice
) -> tuple[list[list[int]], list[list[int]]]:
    """Follow the tree in each row as the verifier chooses, and add its tokens to the prompts.

    Returns:
        by row, the nodes on the way, and the verifier's token after each of them.

    """
    tokens, parents, best = told.tolist()
    paths, chosen = [], []
    for row, prompt in enumerate(prompts):
        choose = _chooser(tree, logits, row, prompt, choice)
        if choice.is_best:
            choose = best[row].__getitem__
        path, drawn = walk(children_of(tokens[row], parents[row]), choose)
        prompt.accepted.append(len(path) - 1)
        prompt.offered.append(depth_of(parents[row]))
        prompt.extend(drawn)
        paths.append(path)
        chosen.append(drawn)
    return paths, chosen


def _chooser(
    tree: Tree, logits: Tensor, row: int, prompt: Prompt, choice: Choice
) -> Callable[[int], int]:
    """The verifier's choice after a node of a row, for nodes in the order of a way down."""
    before = [*prompt.tokens]

    def choose(node: int) -> int:
        proposed = q = None
        if tree.probabilities is not None and node < tree.probabilities.shape[1]:
            proposed, q = tree.tokens[row, node + 1 : node + 2], tree.probabilities[row, node]
        before.append(choice(before, logits[row, node], proposed, q))
        return before[-1]

    return choose


def _right_padded(prompts: Sequence[Prompt], generation_config: GenerationConfig) -> Tensor:
    """The prompts' tokens as one tensor, padded behind."""
    sequences = [torch.tensor(prompt.tokens) for prompt in prompts]
    # The only place where transformers keeps what it has settled on; without an end of sequence
    # there is none, and all sequences have the same length.
    pad = getattr(generation_config, "_pad_token_tensor", None)
    return pad_sequence(sequences, batch_first=True, padding_value=0 if pad is None else int(pad))
