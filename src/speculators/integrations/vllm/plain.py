"""vLLM's own EAGLE model, made to refuse drafts that it would compute wrongly.

With a checkpoint that was not converted, vLLM's model ignores ``fc.bias``, and if the config sets
``bias``, it gives attention biases that no tensor fills: the server starts, but hardly any drafted
token is accepted.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM

from speculators.errors import ConversionError
from speculators.families.eagle import EAGLE

__all__ = ["PlainEagle"]


class PlainEagle(EagleLlamaForCausalLM):
    """``EagleLlamaForCausalLM`` with a check for features that it does not compute."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the tensors of an EAGLE checkpoint as published.

        Raises:
            ConversionError: if it has a feature that vLLM's model lacks.

        """
        super().load_weights(self._checked(weights))

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        computed = {"embedding"}
        if getattr(self.config, "qkv_bias", False):
            computed.add("attention_bias")
        for name, tensor in weights:
            for feature in EAGLE.features_of({EAGLE.names.in_format(name)}) - computed:
                raise ConversionError(
                    f"{self.config.name_or_path} has {EAGLE.features[feature]} ({name}), which "
                    "vLLM's own EAGLE model does not compute; convert it, and serve the result: "
                    f"speculators convert eagle {self.config.name_or_path} OUTPUT BASE_MODEL"
                )
            yield name, tensor
