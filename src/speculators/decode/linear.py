"""Taking linear attention back to the tokens of a block that were accepted.

A layer of linear attention has no keys and values of single tokens but one state, which every token
changes, so a rejected token cannot be left out of it afterwards. Therefore its state before a block
is kept, and what the layer's attention is given for the block. If a part of the block is rejected,
that attention alone runs again, from the kept state and over the accepted tokens. Nothing else of
the layer has to: what comes out of it is known.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.decode.cache import BlockCache
from speculators.decode.capture import decoder_layers
from speculators.errors import GenerationError

__all__ = ["LINEAR_ATTENTION", "LinearStates", "linear_layers"]

LINEAR_ATTENTION = "linear_attention"
"""What transformers calls this type of layer."""

CONTINUING = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""The ``model_type`` of models whose linear attention runs from its state over several tokens.

Others of this type of layer take one token at a time, or start anew with several."""


def linear_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The numbers of a verifier's layers of linear attention, if its state can be taken back."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in CONTINUING:
        return ()
    types: Sequence[str] = getattr(config, "layer_types", None) or ()
    return tuple(number for number, it in enumerate(types) if it == LINEAR_ATTENTION)


@dataclass(frozen=True, slots=True)
class _Call:
    """What a layer's attention was given for a block.

    Attributes:
        attention: the module.
        inputs: (rows, length, hidden).
        settings: its other arguments.
        before: the layer's part of the cache before.

    """

    attention: nn.Module
    inputs: Tensor
    settings: dict[str, Any]
    before: Any


class LinearStates:
    """The states of a verifier's linear attention while it runs on blocks; a context manager.

    Args:
        model: the verifier.
        cache: its cache, made with ``linear_layers``.

    """

    def __init__(self, model: PreTrainedModel, cache: BlockCache) -> None:
        self._cache = cache
        numbers = linear_layers(model)
        layers = decoder_layers(model) if numbers else nn.ModuleList()
        self._layers = {number: layers[number] for number in numbers}
        self._calls: dict[int, _Call] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "LinearStates":
        for number, layer in self._layers.items():
            for part in layer.children():
                hook = part.register_forward_pre_hook(partial(self._note, number), with_kwargs=True)
                self._hooks.enter_context(hook)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        self._calls.clear()

    def keep(self, counts: Sequence[int]) -> None:
        """Take the states back to some tokens of the last block.

        Args:
            counts: by row, how many of the block's first tokens to keep.

        Raises:
            GenerationError: if the model did not show what its attention was given.

        """
        if self._calls.keys() != self._layers.keys():
            raise GenerationError(
                "The linear attention of the verifier could not be followed, so rejected tokens "
                "cannot be taken back; call the verifier's own generate."
            )
        for number, call in self._calls.items():
            if {*counts} == {counts[0]} != {call.inputs.shape[1]}:
                self._run_again(number, call, call.before, slice(None), counts[0])
                continue
            whole = self._cache.layers[number]
            for count in {*counts} - {call.inputs.shape[1]}:
                rows = [row for row, kept in enumerate(counts) if kept == count]
                again = _rows_of(call.before, rows)
                self._run_again(number, call, again, rows, count)
                for states, some in zip(_tensors_of(whole), _tensors_of(again), strict=True):
                    states[rows] = some
            self._cache.layers[number] = whole
        self._calls.clear()

    def _run_again(
        self, number: int, call: _Call, before: Any, rows: slice | list[int], count: int
    ) -> None:
        """Run a layer's attention over the first tokens of some rows, from their state before."""
        self._cache.layers[number] = before
        call.attention(call.inputs[rows, :count], **call.settings)

    def _note(
        self, number: int, part: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Note what a layer's attention is given: the part of the layer that gets the cache.

        Of prompts nothing is noted, since nothing of them is taken back. Other threads may run the
        same model with caches of their own.
        """
        if not self._cache.start or number in self._calls:
            return
        if all(it is not self._cache for it in named.values()):
            return
        settings = dict(named)
        inputs = arguments[0] if arguments else settings.pop("hidden_states")
        before = copy.deepcopy(self._cache.layers[number])
        self._calls[number] = _Call(part, inputs, settings, before)


def _rows_of(layer: Any, rows: Sequence[int]) -> Any:
    """A layer of a cache with the states of some rows; the layer itself keeps its own."""
    some = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(some, name, dict(value))
    some.reorder_cache(torch.tensor(rows))
    return some


def _tensors_of(layer: Any) -> Iterator[Tensor]:
    """The states of a layer, whose cache may have several of a kind."""
    for value in vars(layer).values():
        states = value.values() if isinstance(value, dict) else (value,)
        yield from (it for it in states if isinstance(it, Tensor))
