"""What speculative decoding refuses, since its output would not be what the verifier generates."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from speculators.decode.stopping import Stopping
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod
from speculators.format.proposals import CHAINS

__all__ = [
    "check_arguments",
    "check_batch",
    "check_generation",
    "check_inputs",
    "check_linear",
    "check_proposal",
    "left_padding",
]

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

ARGUMENTS = ("assistant_model", "custom_generate", "inputs_embeds", "past_key_values", "cache")
"""Arguments of ``generate`` that would replace a part of speculative decoding."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "prefill_chunk_size": (None,),
}
"""Settings that must have one of these values."""

STATEFUL = (
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)
"""Processors that must see each token exactly once and in order."""

BY_ROW = (
    PrefixConstrainedLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
)
"""Processors that treat the rows of a batch differently."""

INPUTS = ("attention_mask", "cache_position", "position_ids")
"""Tensors beside the tokens that are given to the verifier, or follow from them."""

INSTEAD = "leave it out, or call the verifier's own generate"


def check_proposal(method: ProposalMethod) -> None:
    """Refuse proposal methods that accept tokens the verifier would not have chosen.

    Raises:
        GenerationError: if this is one.

    """
    lossy = {"verifier_accept_k": 1, "accept_tolerance": 0.0}
    for name, exact in lossy.items():
        if (value := getattr(method, name)) != exact:
            raise GenerationError(
                f"With {name} {value} the output would not be the verifier's; "
                f"set it to {exact} in the proposal method."
            )


def check_linear(verifier: str, method: ProposalMethod) -> None:
    """Refuse trees for a verifier with linear attention, whose state goes along one path.

    Raises:
        GenerationError: if the method proposes trees.

    """
    if method.proposal_type not in CHAINS:
        raise GenerationError(
            f"{verifier} has linear attention, which runs along a single path, so it cannot verify "
            f"{method.proposal_type!r}; choose {' or '.join(CHAINS)}."
        )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of ``generate`` that speculative decoding does not support.

    Raises:
        GenerationError: if one is given.

    """
    for name in ARGUMENTS:
        if arguments.get(name) is not None:
            raise GenerationError(f"Speculative decoding does not work with {name}; {INSTEAD}.")


def check_inputs(inputs: Mapping[str, Any]) -> None:
    """Refuse inputs of the verifier beside tokens, such as images: the draft does not know them.

    Types of tokens may be given if they are all 0, which stands for text.

    Raises:
        GenerationError: if there is one.

    """
    for name, value in inputs.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        is_text = name.endswith("token_type_ids") and not any(part.any() for part in tensors)
        if tensors and name not in INPUTS and not is_text:
            raise GenerationError(
                f"Speculative decoding takes tokens only, and no {name}; {INSTEAD}."
            )


def check_generation(config: GenerationConfig, processors: LogitsProcessorList) -> None:
    """Refuse decoding modes, settings and processors that cannot be reproduced exactly.

    Raises:
        GenerationError: if there is one.

    """
    mode = config.get_generation_mode()
    if mode not in MODES:
        raise GenerationError(
            f"Speculative decoding is greedy or samples; for {mode.value.replace('_', ' ')}, call "
            "the verifier's own generate."
        )
    for name, neutral in NEUTRAL.items():
        if (value := getattr(config, name, None)) not in neutral:
            raise GenerationError(
                f"Speculative decoding does not work with {name}={value!r}; {INSTEAD}."
            )
    for processor in processors:
        if isinstance(processor, STATEFUL):
            raise GenerationError(
                f"Speculative decoding does not work with {type(processor).__name__}, "
                f"which must see every token exactly once; {INSTEAD}."
            )


def check_batch(
    processors: LogitsProcessorList, stopping: Stopping, streamer: BaseStreamer | None
) -> None:
    """Refuse what only works with one prompt, since prompts of a batch advance at different rates.

    Raises:
        GenerationError: if there is such a processor, streamer or stopping criterion.

    """
    for processor in processors:
        if isinstance(processor, BY_ROW):
            raise GenerationError(
                f"Speculative decoding with {type(processor).__name__} takes one prompt at a time."
            )
    if streamer is not None:
        raise GenerationError("Speculative decoding with a streamer takes one prompt at a time.")
    if stopping.others and not stopping.ends:
        raise GenerationError(
            "Several prompts with custom stopping criteria need an eos_token_id; set one, or pass "
            "one prompt at a time."
        )


def left_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """By row, the number of padding tokens at the left.

    Raises:
        GenerationError: if there is padding elsewhere.

    """
    if attention_mask is None:
        return [0] * len(input_ids)
    real = attention_mask.bool()
    if not bool((real.cummax(1).values == real).all() and real[:, -1].all()):
        raise GenerationError(
            "The attention_mask has zeros after ones; pad the prompts on the left "
            "(padding_side='left' of the tokenizer)."
        )
    padding: list[int] = (~real).sum(1).tolist()
    return padding
