"""What a draft is called with: wrong inputs are refused in one sentence, with both numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import InputError

__all__ = ["check_labels", "check_mask", "check_prompts", "check_states"]

TOKENIZE = "tokenizer(text, return_tensors='pt')"


def check_labels(arguments: Mapping[str, Any]) -> None:
    """Refuse labels, which transformers' models compute a loss from.

    Raises:
        InputError: if there are any.

    """
    if arguments.get("labels") is not None:
        raise InputError(
            "A draft computes no loss from labels, since it is trained to agree with its verifier: "
            "leave labels out, and compare the output's logits and last_hidden_state with the "
            "verifier's."
        )


def check_states(input_ids: Any, **given: tuple[Any, int]) -> None:
    """Check what ``forward`` takes.

    Args:
        input_ids: the tokens.
        **given: name of an argument with states → its value, and the width that it must have.

    Raises:
        InputError: if the tokens are not (batch, sequence), not exactly one of the states is given,
            or those do not go with them.

    """
    _check_ids(input_ids, "forward")
    states = {name: it for name, it in given.items() if it[0] is not None}
    if len(states) != 1:
        raise InputError(
            "Give either hidden_states, which are the verifier's, or draft_states, which an "
            "earlier call returned as last_hidden_state."
        )
    ((name, (value, width)),) = states.items()
    if not isinstance(value, Tensor):
        raise InputError(f"{name} has to be a tensor, not {_kind(value)}.")
    expected = (*input_ids.shape, width)
    if tuple(value.shape) != expected:
        raise InputError(
            f"{name} has the shape {describe_shape(tuple(value.shape))}, and with input_ids of "
            f"shape {describe_shape(tuple(input_ids.shape))} this draft takes "
            f"{describe_shape(expected)}: (batch, sequence, width)."
        )


def check_mask(attention_mask: Any, input_ids: Tensor, past: int) -> None:
    """Check the mask that ``forward`` takes, if it is not one of four axes.

    Args:
        attention_mask: which tokens are real, if given.
        input_ids: the tokens, (batch, sequence).
        past: how many tokens the cache holds.

    Raises:
        InputError: if it is not (batch, past + sequence).

    """
    expected = (len(input_ids), past + input_ids.shape[1])
    if getattr(attention_mask, "ndim", None) == 2 and tuple(attention_mask.shape) != expected:
        raise InputError(
            f"attention_mask has the shape {describe_shape(tuple(attention_mask.shape))}, and "
            f"{describe_shape(expected)} is expected: a row for each of the batch, with the "
            f"{past} tokens of the cache and the {input_ids.shape[1]} of input_ids."
        )


def check_prompts(input_ids: Any, attention_mask: Any, vocabulary: int) -> None:
    """Check what ``generate`` takes.

    Args:
        input_ids: the prompts.
        attention_mask: which tokens of them are real, if given.
        vocabulary: the number of the verifier's tokens.

    Raises:
        InputError: if the prompts are not (batch, length) with tokens of the vocabulary, or the
            mask has another shape.

    """
    _check_ids(input_ids, "generate")
    least, most = torch.stack(input_ids.aminmax()).tolist()
    if least < 0 or most >= vocabulary:
        raise InputError(
            f"input_ids has the token {least if least < 0 else most}, and the verifier's "
            f"vocabulary has {vocabulary}: tokenize with the verifier's own tokenizer."
        )
    if isinstance(attention_mask, Tensor) and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has the shape {describe_shape(tuple(attention_mask.shape))}, and "
            f"input_ids {describe_shape(tuple(input_ids.shape))}: give both as the tokenizer "
            "returns them."
        )


def _check_ids(input_ids: Any, method: str) -> None:
    if isinstance(input_ids, str):
        raise InputError(
            f"{method} takes token ids, not text: give {method}(**{TOKENIZE}), with the verifier's "
            "tokenizer."
            if method == "generate"
            else f"{method} takes token ids, not text: {TOKENIZE}.input_ids, with the verifier's "
            "tokenizer."
        )
    if isinstance(input_ids, Mapping):
        raise InputError(f"Unpack what the tokenizer returns: {method}(**inputs).")
    if not isinstance(input_ids, Tensor):
        raise InputError(f"input_ids has to be a tensor of token ids, not {_kind(input_ids)}.")
    if input_ids.is_floating_point() or input_ids.is_complex():
        raise InputError(f"input_ids has the type {input_ids.dtype}, and token ids are integers.")
    shape = describe_shape(tuple(input_ids.shape))
    if input_ids.dim() != 2:
        raise InputError(
            f"input_ids has the shape {shape}, and (batch, length) is expected: for one prompt, "
            "give input_ids[None]."
        )
    if 0 in input_ids.shape:
        raise InputError(
            f"input_ids has the shape {shape}, so there is no token to start from: give at least "
            "one, such as the verifier's bos_token_id."
        )


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
