"""Decoding texts of a verifier in batches, with its hidden states.

The verifier's own ``generate`` prepares the inputs, and each pass is one of ``VerifierPass``, as in
speculative decoding: what is recorded is what decoding with a draft would give. A text goes on for
some tokens after its end, since the last proposal may reach that far.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from speculators.decode.cache import BlockCache
from speculators.decode.linear import linear_layers
from speculators.decode.refusals import check_generation, left_padding
from speculators.decode.sampling import draw, warp_of
from speculators.decode.stopping import Stopping
from speculators.decode.tree import Tree
from speculators.decode.verification import VerifierPass
from speculators.errors import EvaluationError
from speculators.evaluate.recording.warping import recorded_warp
from speculators.evaluate.report import Settings
from speculators.evaluate.subject.loading import generation_config

__all__ = ["Text", "decode_texts", "layer_states"]

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, what the verifier answered, and what it would go on with.

    Attributes:
        prompt_tokens: the number of tokens of the prompt.
        new_tokens: the number of tokens of the answer, a token that ends it included.
        tokens: (prompt + new + beyond), int64.
        states: (prompt + new - 1, verifier width), the verifier's last hidden states at all tokens
            of prompt and answer but the last one.
        probabilities: (new + beyond), float32, those with which tokens were sampled; ``None`` for
            greedy decoding.

    """

    prompt_tokens: int
    new_tokens: int
    tokens: Tensor
    states: Tensor
    probabilities: Tensor | None


@torch.no_grad()
def decode_texts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    beyond: int,
    device: torch.device,
    advance: Advance = lambda: None,
) -> list[Text]:
    """Decode the answers to some prompts at the same time.

    Args:
        model: the verifier.
        prompts: the tokens of each.
        settings: how to decode.
        beyond: the number of tokens by which to go on after the end of an answer.
        device: of the prompts.
        advance: called after each token.

    Raises:
        GenerationError: if the verifier, or its generation_config.json, does not allow it.
        EvaluationError: likewise.

    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    generation = generation_config(model, settings, settings.max_new_tokens)
    rows = [
        [generation.pad_token_id] * pad + [*prompt]
        for pad, prompt in zip(padding, prompts, strict=True)
    ]
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=device)
    texts: list[Text] = model.generate(  # type: ignore[operator]
        torch.tensor(rows, device=device),
        attention_mask=mask,
        generation_config=generation,
        custom_generate=partial(_decode, settings=settings, beyond=beyond, advance=advance),
    )
    return texts


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    settings: Settings,
    beyond: int,
    advance: Advance,
    **inputs: Any,
) -> list[Text]:
    """The decoding loop that transformers' ``generate`` calls once it has prepared its inputs."""
    check_generation(generation_config, logits_processor)
    if warp_of(logits_processor) != recorded_warp(settings):
        raise EvaluationError(
            "The generation_config.json of the verifier asks for more than temperature, top_k and "
            "top_p (min_p, for example), and no recording can be made with that; remove it there."
        )
    attention_mask = inputs.get("attention_mask")
    padding = left_padding(input_ids, attention_mask)
    stopping = Stopping(stopping_criteria, input_ids.device)
    width, rows = input_ids.shape[1], len(input_ids)
    lengths = [0] * rows  # of the answers that have ended
    node = _single_node(input_ids.device)
    cache = BlockCache(padding, linear_layers(model))
    max_length = int(generation_config.max_length or 0)
    tokens, states, probabilities = input_ids, list[Tensor](), list[Tensor]()
    with VerifierPass(model, cache, max_length) as verifier_pass:
        logits, passed = verifier_pass.prefill(
            input_ids, attention_mask, inputs.get("position_ids")
        )
        while True:
            states.append(passed)
            # As ``generate`` does it; the prompts' padding included.
            scores = logits_processor(tokens, logits.to(tokens.device, torch.float32))  # type: ignore[arg-type]
            if generation_config.do_sample:
                p = scores.softmax(-1)
                drawn = draw(p)
                probabilities.append(p.gather(1, drawn))
            else:
                drawn = scores.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, drawn), 1)
            new = tokens.shape[1] - width
            for row, text in enumerate(tokens.tolist()):
                if not lengths[row] and stopping(text):
                    lengths[row] = new
            advance()
            if all(lengths) and new >= max(lengths) + beyond:
                break
            logits, passed = _next(verifier_pass, node(drawn))
    return list(_cut(tokens, states, probabilities, padding, width, lengths, beyond))


def _single_node(device: torch.device) -> Callable[[Tensor], Tree]:
    """A function from the last tokens, (rows, 1), to trees that consist of them."""
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    itself = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    return lambda tokens: Tree(tokens, parents=zero, depths=zero, ancestors=itself, is_chain=True)


def _next(verifier_pass: VerifierPass, tree: Tree) -> tuple[Tensor, Tensor]:
    """Run the verifier on one more token in each row, and keep it.

    Returns:
        the logits, (rows, vocabulary), and the hidden states, (rows, 1, verifier width).

    """
    logits, _ = verifier_pass.verify(tree)
    return logits[:, 0], verifier_pass.keep(tree, [[0]] * len(tree.tokens))


def _cut(
    tokens: Tensor,
    states: Sequence[Tensor],
    probabilities: Sequence[Tensor],
    padding: Sequence[int],
    width: int,
    lengths: Sequence[int],
    beyond: int,
) -> Iterator[Text]:
    """The text of each row, without padding and what follows it."""
    all_states = torch.cat(list(states), 1)
    drawn = torch.cat(list(probabilities), 1).float() if probabilities else None
    if drawn is not None and drawn.isnan().any():
        raise EvaluationError(
            "There is no token to sample: the verifier's logits are not numbers, or the sampling "
            "settings leave none. If it overflows in float16, run it in bfloat16."
        )
    for row, (pad, new) in enumerate(zip(padding, lengths, strict=True)):
        yield Text(
            prompt_tokens=width - pad,
            new_tokens=new,
            tokens=tokens[row, pad : width + new + beyond].cpu().clone(),
            states=all_states[row, pad : width + new - 1].cpu().clone(),
            probabilities=None if drawn is None else drawn[row, : new + beyond].cpu().clone(),
        )


@torch.no_grad()
def layer_states(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    layers: Sequence[int],
    device: torch.device,
) -> list[dict[int, Tensor]]:
    """The states that enter layers of the verifier, by one pass over texts that are known.

    Args:
        model: the verifier.
        texts: (length), the tokens of each.
        layers: whose inputs, as for ``Draft.verifier_layers``; at least one.
        device: of the texts.

    Returns:
        by text and layer, (length, hidden).

    Raises:
        GenerationError: if the verifier does not have a layer.

    """
    rows = torch.nn.utils.rnn.pad_sequence([*texts], batch_first=True).to(device)
    cache = BlockCache([0] * len(rows), linear_layers(model))
    with VerifierPass(model, cache, rows.shape[1], layers) as verifier_pass:
        # What is padded at the right is seen by nothing before it.
        _, states = verifier_pass.prefill(rows, None, None)
    by_layer = states.chunk(len(layers), -1)
    return [
        {
            layer: of_layer[row, : len(text)].cpu().clone()
            for layer, of_layer in zip(layers, by_layer, strict=True)
        }
        for row, text in enumerate(texts)
    ]
