"""Capturing hidden states of the verifier while it runs."""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from speculators.errors import GenerationError

__all__ = ["StateCapture", "decoder_layers"]


class ThreadStates(threading.local):
    """Captured states, separate for each thread: several may run the same model at a time."""

    def __init__(self) -> None:
        self.by_layer: dict[int | None, Any] = {}


class StateCapture:
    """Forward hooks that keep hidden states of a model; a context manager.

    Only the states that are asked for are kept, unlike with ``output_hidden_states``, which also
    lacks the residual stream that leaves the last layer.

    Args:
        model: a causal language model.
        layers: whose inputs to capture, as for ``Draft.verifier_layers``; if empty, the last hidden
            state after the final norm.

    Raises:
        GenerationError: if the model's decoder layers cannot be found, or it has too few.

    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self._model = model
        self._wanted = tuple(layers) or (None,)
        self._modules = decoder_layers(model) if layers else nn.ModuleList()
        last = len(self._modules)
        for layer in layers:
            if not 0 <= layer <= last:
                raise GenerationError(
                    f"The draft reads the hidden state of number {layer}, but "
                    f"{type(model).__name__} has {last} layers, so the numbers are 0 to {last}; "
                    "use the verifier that the draft was trained for."
                )
        self._states = ThreadStates()
        self._hooks = ExitStack()

    def __enter__(self) -> "StateCapture":
        for wanted in set(self._wanted):
            self._hooks.enter_context(self._register(wanted))
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def take(self) -> Tensor:
        """The states of this thread's last forward pass, which are not kept any longer.

        Returns:
            (rows, length, hidden), or (rows, length, layers * hidden) in the order of the layers;
            on the device of the last of them.

        Raises:
            GenerationError: if the model did not show them.

        """
        states = [self._states.by_layer.get(wanted) for wanted in self._wanted]
        self._states.by_layer.clear()
        shown = [state for state in states if isinstance(state, Tensor) and state.ndim == 3]
        if len(shown) < len(states):
            raise GenerationError(
                f"The hidden states of {type(self._model).__name__}, which the draft reads, could "
                "not be captured; drafts cannot be used with this verifier."
            )
        if len(shown) == 1:
            return shown[0]
        return torch.cat([state.to(shown[-1].device) for state in shown], -1)

    def _register(self, wanted: int | None) -> RemovableHandle:
        if wanted is None:
            # The decoder's output is what the head sees, whatever is done to the logits later.
            decoder: nn.Module = self._model.get_decoder()
            return decoder.register_forward_hook(self._keep_last)
        if wanted == len(self._modules):
            return self._modules[-1].register_forward_hook(partial(self._keep_output, wanted))
        return self._modules[wanted].register_forward_pre_hook(
            partial(self._keep_input, wanted), with_kwargs=True
        )

    def _keep_last(self, _module: object, _arguments: object, output: Any) -> None:
        # A model that is its own decoder has only logits in its output.
        self._states.by_layer[None] = getattr(output, "last_hidden_state", None)

    def _keep_input(
        self, wanted: int, _module: object, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        self._states.by_layer[wanted] = arguments[0] if arguments else named.get("hidden_states")

    def _keep_output(self, wanted: int, _module: object, _arguments: object, output: Any) -> None:
        self._states.by_layer[wanted] = output[0] if isinstance(output, tuple) else output


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal language model, whatever they are called.

    They are the list of modules nearest to the root of the decoder that has as many entries as the
    config has layers.

    Raises:
        GenerationError: if there is no such list, or more than one.

    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    level: list[nn.Module] = [model.get_decoder()]
    found: list[nn.ModuleList] = []
    while level and not found:
        level = [child for module in level for child in module.children()]
        found = [one for one in level if isinstance(one, nn.ModuleList) and len(one) == count]
    if len(found) != 1:
        raise GenerationError(
            f"The decoder layers of {type(model).__name__} could not be found, but the draft reads "
            "hidden states between them; it cannot be used with this verifier."
        )
    return found[0]
