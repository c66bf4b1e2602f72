"""vLLM's own EAGLE model, made to refuse the drafts that it would compute wrongly.

Given a checkpoint that was not converted, it passes over ``fc.bias`` and, where the config says
``bias``, gives the attention biases that no tensor fills: the server starts, and the draft is
hardly ever right.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM

from speculators.convert.eagle import LAYERNORM_MAPPINGS
from speculators.errors import ConversionError
from speculators.format.tensors import FEATURES, features_of

__all__ = ["PlainEagle"]


class PlainEagle(EagleLlamaForCausalLM):
    """``EagleLlamaForCausalLM``, which computes the same and says what it cannot."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the tensors of an EAGLE checkpoint as published.

        Raises:
            ConversionError: if it has a feature that vLLM's model has not.

        """
        super().load_weights(self._checked(weights))

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        computed = {"embedding"}
        if getattr(self.config, "qkv_bias", False):
            computed.add("attention_bias")
        for name, tensor in weights:
            for feature in features_of({LAYERNORM_MAPPINGS.get(name, name)}) - computed:
                raise ConversionError(
                    f"{self.config.name_or_path} has {FEATURES[feature]} ({name}), which vLLM's "
                    "own EAGLE model does not compute; convert it, and name the result instead: "
                    f"speculators convert eagle {self.config.name_or_path} OUTPUT BASE_MODEL"
                )
            yield name, tensor
