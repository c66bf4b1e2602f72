"""EAGLE-1, EAGLE-2 and HASS drafts as a transformers model.

The draft fuses the embedding of each token with the verifier's hidden state at the token before
it, and passes the result through one decoder layer; the verifier's own head turns its output into
logits (EAGLE, arXiv:2401.15077, section 4.1; SafeAILab/EAGLE, eagle/model/cnets1.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from speculators.families.eagle import EAGLE
from speculators.models.config import SpeculatorPretrainedConfig
from speculators.models.layers import LAYER_CLASSES
from speculators.models.output import DraftOutput
from speculators.models.speculator import Speculator

__all__ = ["EagleOutput", "EagleSpeculator", "EagleSpeculatorConfig"]

EagleOutput = DraftOutput
"""The name of ``DraftOutput`` from before there were other drafts than EAGLE's."""


class EagleSpeculatorConfig(SpeculatorPretrainedConfig):
    """The config of an ``EagleSpeculator``; its JSON is ``families.eagle.EagleConfig``.

    Attributes:
        transformer_layer_config: a transformers config for the draft's decoder layer; a dictionary
            with ``model_type`` is turned into one.
        transformer_layer_architecture: the name of the layer's class.
        layernorms: whether the draft has the three extra layernorms.
        fusion_bias: whether ``fc`` has a bias.
        speculators_config: proposal methods and the verifier, as a dictionary.

    """

    family = EAGLE
    layer_switches = frozenset({"attention_bias", "mlp_bias", "use_sliding_window"})

    transformer_layer_architecture: str = "auto"
    layernorms: bool = False
    fusion_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.transformer_layer_architecture == "auto":
            decoder_layer = LAYER_CLASSES[self.layer.model_type].decoder_layer
            self.transformer_layer_architecture = decoder_layer.__name__
        self.architectures = self.draft_architectures

    @property
    def draft_architectures(self) -> list[str]:
        """The draft's class, then that of its layer."""
        return ["EagleSpeculator", self.transformer_layer_architecture]


class EagleSpeculator(Speculator):
    """An EAGLE draft: fusion, one decoder layer, and the verifier's head.

    Load one with its verifier, and generate what the verifier would, in fewer of its passes:

        draft = EagleSpeculator.from_pretrained("./converted", verifier="auto")
        output = draft.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=32)

    Its own methods are ``from_pretrained``, ``generate``, ``forward``, ``draft``, ``logits``,
    ``attach_verifier``, ``detach_verifier``, ``save_pretrained`` and ``push_to_hub``; all others
    are those of every transformers model.

    Args:
        config: see ``EagleSpeculatorConfig``.
        own_embedding: whether the draft has its own embedding; otherwise it uses the verifier's.

    """

    config_class = EagleSpeculatorConfig  # type: ignore[misc]
    config: EagleSpeculatorConfig
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer"]  # noqa: RUF012

    def __init__(self, config: EagleSpeculatorConfig, own_embedding: bool = True) -> None:
        super().__init__(config, own_embedding)
        layer_config = config.layer
        classes = LAYER_CLASSES[layer_config.model_type]
        hidden = layer_config.hidden_size

        def norm() -> nn.Module:
            if not config.layernorms:
                return nn.Identity()
            return classes.norm(hidden, eps=layer_config.rms_norm_eps)

        self.post_embedding_layernorm = norm()
        self.hidden_layernorm = norm()
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.fusion_bias)
        layer = classes.decoder_layer(layer_config, layer_idx=0)
        layer.input_layernorm = nn.Identity()  # the first layer has none in the reference
        self.layers = nn.ModuleList([layer])
        self.rotary_emb = classes.rotary_embedding(layer_config)
        self.pre_lm_head_layernorm = norm()
        self.post_init()  # type: ignore[no-untyped-call]

    def draft(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DraftOutput:
        """Run ``forward`` without the head; ``logits`` is ``None`` in the output."""
        device, dtype = self.device, self.fc.weight.dtype
        input_ids = input_ids.to(device)
        hidden_states = hidden_states.to(device=device, dtype=dtype)
        fused = self.fc(
            torch.cat(
                (
                    self.post_embedding_layernorm(self._embed(input_ids)),
                    self.hidden_layernorm(hidden_states),
                ),
                dim=-1,
            )
        )
        cache, attention = self._attention_inputs(
            fused, attention_mask, position_ids, past_key_values, use_cache
        )
        x = self.layers[0](fused, **attention, **kwargs)
        return DraftOutput(last_hidden_state=x.to(device), cache=cache)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Apply the head, as ``forward`` does after the layer.

        Args:
            hidden_states: (batch, sequence, hidden), ``last_hidden_state`` or a part of it.

        Returns:
            (batch, sequence, vocabulary), in the head's dtype and on its device.

        Raises:
            VerifierError: as ``forward``.

        """
        return super().logits(self.pre_lm_head_layernorm(hidden_states))
