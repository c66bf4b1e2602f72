"""The config.json of an EAGLE-3, EAGLE-3.1 or P-EAGLE draft: upstream's format, with no gaps.

The keys are those of the PyPI project ``speculators`` 0.9.0 (``models/eagle3/config.py`` and
``models/peagle/config.py`` there) and of vLLM 0.32, which read several of them with different
defaults when they are missing. So all of them are written.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from speculators.families.states import LayerIds
from speculators.format.config import (
    LayerConfig,
    SpeculatorConfig,
    SpeculatorsConfig,
    dtype_in_both_spellings,
    rope_in_both_spellings,
)

__all__ = ["USUAL_STATES", "Eagle3Config", "Eagle3LayerConfig"]

USUAL_STATES = 3
"""How many states of the verifier a draft usually reads; vLLM assumes it of a Llama layer."""


class Eagle3LayerConfig(LayerConfig):
    """The draft's decoder layers; the first one takes the embedding beside the hidden state."""

    model_type: Literal["llama", "qwen3"] = "llama"
    """``qwen3`` where queries and keys are normalised."""
    attention_bias: bool = False
    """Whether q, k, v and o have biases."""
    mlp_bias: bool = False
    """Whether the MLP's projections have biases."""
    rope_parameters: dict[str, Any] | None = None
    """``rope_theta`` and ``rope_scaling`` as transformers 5 spells them."""
    num_aux_hidden_states: int | None = None
    """How many states are read, where vLLM would otherwise take it to be three."""

    @model_validator(mode="before")
    @classmethod
    def _spell_rope_both_ways(cls, data: Any) -> Any:
        return rope_in_both_spellings(data)


class Eagle3SpeculatorsConfig(SpeculatorsConfig):
    """How to speculate with the draft."""

    algorithm: Literal["eagle3", "peagle"] = "eagle3"


class Eagle3Config(SpeculatorConfig):
    """The whole config.json."""

    architectures: list[str]
    """``Eagle3Speculator``, or ``PEagleDraftModel`` for P-EAGLE."""
    speculators_model_type: Literal["eagle3", "peagle"] = "eagle3"
    """Marks the file as being in this format; ``peagle`` for a draft that drafts in parallel."""
    dtype: str | None = None
    """``torch_dtype`` as transformers 5 spells it."""
    transformer_layer_config: Eagle3LayerConfig
    draft_vocab_size: int = Field(ge=1)
    """How many tokens the draft can propose: the rows of its head."""
    eagle_aux_hidden_state_layer_ids: LayerIds
    """Which of the verifier's states are read: number i is the residual stream that enters its
    decoder layer i (0: the embeddings; the number of layers: what leaves the last one)."""
    target_hidden_size: int | None = Field(default=None, ge=1)
    """The verifier's hidden size, if it is not the draft's."""
    norm_before_residual: bool
    """Whether the first layer's residual is the normalised hidden state. Readers disagree on its
    default, so it has none."""
    norm_before_fc: bool = False
    """Whether the states are normalised together before ``fc`` (``input_norm``)."""
    fc_norm: bool = False
    """EAGLE-3.1: whether each of the states is normalised by itself before ``fc``."""
    norm_output: bool = False
    """EAGLE-3.1: whether what is fed back is the output after the final norm."""
    fc_bias: bool | None = None
    """Whether ``fc`` has a bias; not a key of upstream's, and so only written if it has."""
    mask_token_id: int | None = Field(default=None, ge=0)
    """P-EAGLE: the token whose embedding stands for the tokens that are not drafted yet."""
    embed_requires_grad: bool = False
    """Whether the embedding was trained with the draft."""
    tie_word_embeddings: Literal[False] = False
    speculators_config: Eagle3SpeculatorsConfig

    @model_validator(mode="before")
    @classmethod
    def _spell_dtype_both_ways(cls, data: Any) -> Any:
        return dtype_in_both_spellings(data)

    @model_validator(mode="after")
    def _check_together(self) -> "Eagle3Config":
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        if self.parallel and self.mask_token_id is None:
            raise ValueError("a peagle draft needs mask_token_id")
        if self.draft_vocab_size > self.transformer_layer_config.vocab_size:
            raise ValueError("draft_vocab_size is larger than the verifier's vocabulary")
        self.fc_bias = self.fc_bias or None
        usual = self.transformer_layer_config.model_type != "llama" or self.states == USUAL_STATES
        self.transformer_layer_config.num_aux_hidden_states = None if usual else self.states
        return self

    @property
    def parallel(self) -> bool:
        """Whether all tokens are drafted in one pass (P-EAGLE)."""
        return self.speculators_model_type == "peagle"

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        """The verifier's layers whose incoming states the draft reads."""
        return tuple(self.eagle_aux_hidden_state_layer_ids)

    @property
    def states(self) -> int:
        """How many of the verifier's states are read."""
        return len(self.verifier_layers)

    @property
    def verifier_hidden_size(self) -> int:
        """The width of each of them."""
        return self.target_hidden_size or self.transformer_layer_config.hidden_size

    def facts(self) -> dict[str, str]:
        """What is worth knowing about the draft: label → text."""
        layers = ", ".join(map(str, self.eagle_aux_hidden_state_layer_ids))
        of = self.transformer_layer_config.vocab_size
        return {
            "reads": f"{self.states} of the verifier's states: those entering its layers {layers}",
            "drafts": f"{self.draft_vocab_size} of {of} tokens",
            "feeds back": f"its output {'after' if self.norm_output else 'before'} the final norm",
            "residual": f"taken {'after' if self.norm_before_residual else 'before'} hidden_norm",
        }

    @property
    def features(self) -> frozenset[str]:
        """The features that this config declares (never ``embedding``)."""
        layer = self.transformer_layer_config
        declared = {
            "draft_vocabulary": self.draft_vocab_size != layer.vocab_size,
            "fc_bias": bool(self.fc_bias),
            "fc_norm": self.fc_norm,
            "input_norm": self.norm_before_fc,
            "attention_bias": layer.attention_bias,
            "mlp_bias": layer.mlp_bias,
            "qk_norm": layer.model_type == "qwen3",
            "mask_hidden": self.parallel,
        }
        return frozenset(name for name, there in declared.items() if there)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of layers and of states."""
        return {"layer": self.layers, "state": self.states}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the layers, of the states and of the vocabularies."""
        sizes = self.transformer_layer_config.sizes()
        return sizes | {
            "one": 1,
            "head": self.transformer_layer_config.head_dim
            or sizes["queries"] // self.transformer_layer_config.num_attention_heads,
            "embedding+hidden": 2 * sizes["hidden"],
            "drafted": self.draft_vocab_size,
            "state": self.verifier_hidden_size,
            "states": self.states * self.verifier_hidden_size,
        }

    @property
    def verifier_sizes(self) -> tuple[int, int]:
        """The vocabulary and the hidden size that a verifier must have."""
        return self.transformer_layer_config.vocab_size, self.verifier_hidden_size
