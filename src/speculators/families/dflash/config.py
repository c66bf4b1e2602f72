"""The config.json of a DFlash, DFlash 2 or DSpark draft: upstream's format, with no gaps.

The keys are those of the PyPI project ``speculators`` 0.9.0 (``models/dflash/config.py``,
``models/dflash2/config.py`` and ``models/dspark/config.py`` there) and of vLLM 0.32 and 0.33
(``transformers_utils/configs/speculators/algos.py``), which read several of them with different
defaults when they are missing. So all of them are written.
"""

from typing import Any, Final, Literal

from pydantic import Field, model_validator

from speculators.families.states import LayerIds
from speculators.format.config import (
    LayerConfig,
    SpeculatorConfig,
    SpeculatorsConfig,
    dtype_in_both_spellings,
    rope_in_both_spellings,
)

__all__ = [
    "FULL",
    "MASK_FILE",
    "SLIDING",
    "DFlash2Config",
    "DFlashConfig",
    "DFlashLayerConfig",
    "DSparkConfig",
]

SCALES = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")
"""What DFlash 2 multiplies by, or bounds."""

MASK_FILE = "mask_embedding.pt"
"""The file beside the weights that holds a mask token's embedding, where the vocabulary's does not:
vLLM, SGLang and this package read it."""

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
"""Types of layers: whether a token sees all positions, or a window of them."""


class DFlashLayerConfig(LayerConfig):
    """The draft's decoder layers: Qwen3's, whose keys and values are also those of the context."""

    model_type: Literal["qwen3"] = "qwen3"
    """Queries and keys are normalised."""
    attention_bias: bool = False
    """Whether q, k, v and o have biases."""
    rope_parameters: dict[str, Any] | None = None
    """``rope_theta`` and ``rope_scaling`` as transformers 5 spells them."""
    is_neox_style: bool = True
    """How RoPE pairs the channels of a head: i with i + half (true), or 2i with 2i + 1 (false)."""
    layer_types: list[Literal["full_attention", "sliding_attention"]] = Field(default_factory=list)
    """Of each layer; all are ``full_attention`` if not given."""
    sliding_window: int | None = Field(default=None, ge=1)
    """How many positions a token of a sliding layer sees, itself included; in both directions if
    the layer is not causal. ``None`` if no layer slides."""
    use_sliding_window: bool = False
    """Whether a layer slides: transformers ignores ``sliding_window`` without it."""
    is_causal: bool | None = None
    """Whether all layers are causal inside a block, where ``sliding_window_non_causal`` does not
    say so; vLLM reads it first. Written only where it is needed; see ``causal`` of the config."""

    @model_validator(mode="before")
    @classmethod
    def _spell_rope_both_ways(cls, data: Any) -> Any:
        return rope_in_both_spellings(data)

    @model_validator(mode="after")
    def _check_windows(self) -> "DFlashLayerConfig":
        self.layer_types = self.layer_types or [FULL] * self.num_hidden_layers
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for "
                f"{self.num_hidden_layers} layers"
            )
        self.use_sliding_window = SLIDING in self.layer_types
        if not self.use_sliding_window:
            self.sliding_window = None
        elif self.sliding_window is None:
            raise ValueError("layer_types has sliding layers, but sliding_window is missing")
        return self

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; ``None`` for a layer that sees all positions."""
        return tuple(self.sliding_window if it == SLIDING else None for it in self.layer_types)


class DFlashConfig(SpeculatorConfig):
    """The whole config.json of a DFlash draft."""

    speculators_model_type: Literal["dflash"] = "dflash"
    """Marks the file as being in this format."""
    dtype: str | None = None
    """``torch_dtype`` as transformers 5 spells it."""
    transformer_layer_config: DFlashLayerConfig
    draft_vocab_size: int = Field(ge=1)
    """How many tokens the draft can propose: the rows of its head, if it has one, and otherwise
    the verifier's vocabulary."""
    block_size: int = Field(ge=1)
    """How many positions a block has: the last token that is certain (the anchor), and masks."""
    target_hidden_size: int | None = Field(default=None, ge=1)
    """The verifier's hidden size, if it is not the draft's."""
    aux_hidden_state_layer_ids: LayerIds
    """Which of the verifier's states are the context, in the order in which ``fc`` takes them:
    number i is the residual stream that enters its decoder layer i (the number of layers: what
    leaves the last one; 0: the embeddings), and so ``hidden_states[i]`` of transformers. Native
    configs count the layer that it leaves, from 0, which is one less."""
    mask_token_id: int = Field(ge=0)
    """The token that stands for those that are not drafted yet."""
    mask_embedding: bool | None = None
    """Whether the embedding of the mask token is that of the file mask_embedding.pt beside this
    one, and not the row of the embedding; not a key of upstream's, and so only written if it is."""
    sliding_window_non_causal: bool
    """Whether the positions of a block see later ones, as vLLM reads it: in all layers of DFlash
    and DFlash 2. Readers disagree on its default, so it has none."""
    sample_from_anchor: bool = False
    """Whether the anchor's position drafts a token, too: then a block drafts ``block_size`` tokens,
    and otherwise one less. Of DFlash and DFlash 2, only DeepSpec's and some of upstream's do."""
    num_target_layers: int | None = Field(default=None, ge=1)
    """How many layers the verifier has, as native configs say it; not a key of upstream's."""
    tie_word_embeddings: Literal[False] = False
    speculators_config: SpeculatorsConfig

    @model_validator(mode="before")
    @classmethod
    def _spell_dtype_both_ways(cls, data: Any) -> Any:
        return dtype_in_both_spellings(data)

    @model_validator(mode="after")
    def _check_together(self) -> "DFlashConfig":
        vocabulary = self.transformer_layer_config.vocab_size
        if self.draft_vocab_size > vocabulary:
            raise ValueError("draft_vocab_size is larger than the verifier's vocabulary")
        if self.mask_token_id >= vocabulary:
            raise ValueError(f"mask_token_id is not a token of the vocabulary of {vocabulary}")
        if self.drafted_per_block < 1:
            raise ValueError("a block of this block_size drafts nothing")
        self.mask_embedding = self.mask_embedding or None
        self._check_causality()
        return self

    def _check_causality(self) -> None:
        """Check that all readers take the layers to be causal, or not."""
        causal, non_causal = self.transformer_layer_config.is_causal, self.sliding_window_non_causal
        if causal is not None and causal == non_causal:
            raise ValueError("is_causal and sliding_window_non_causal contradict each other")
        if causal is None and not non_causal and FULL in self.transformer_layer_config.layer_types:
            raise ValueError(
                "sliding_window_non_causal is false, which makes full layers causal in vLLM, but "
                "not for the trainer that writes it; convert the draft again with --causal or "
                "--no-causal"
            )
        if non_causal or FULL not in self.transformer_layer_config.layer_types:
            self.transformer_layer_config.is_causal = None  # which adds nothing

    @property
    def companions(self) -> frozenset[str]:
        """The file of the mask token's embedding, if it has one."""
        return frozenset({MASK_FILE} if self.mask_embedding else ())

    @property
    def parallel(self) -> bool:
        """All tokens of a block are drafted in one pass."""
        return True

    @property
    def causal(self) -> tuple[bool, ...]:
        """Whether each layer is causal inside a block: sees no later position of it."""
        return (not self.sliding_window_non_causal,) * self.layers

    @property
    def drafted_per_block(self) -> int:
        """The most tokens that one block drafts."""
        return self.block_size - (not self.sample_from_anchor)

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        """The verifier's layers whose incoming states the draft reads."""
        return tuple(self.aux_hidden_state_layer_ids)

    @property
    def states(self) -> int:
        """How many of the verifier's states are read."""
        return len(self.verifier_layers)

    @property
    def target_layer_ids(self) -> list[int]:
        """The verifier's layers that these states leave, counted from 0, as native configs do."""
        return [layer - 1 for layer in self.aux_hidden_state_layer_ids]

    @property
    def verifier_hidden_size(self) -> int:
        """The width of each of the states."""
        return self.target_hidden_size or self.transformer_layer_config.hidden_size

    def facts(self) -> dict[str, str]:
        """What is worth telling about the draft: label → text."""
        layers = ", ".join(map(str, self.aux_hidden_state_layer_ids))
        of = self.transformer_layer_config.vocab_size
        return {
            "reads": f"{self.states} of the verifier's states: those entering its layers {layers}",
            "drafts": f"{self.draft_vocab_size} of {of} tokens, "
            f"{self.drafted_per_block} from a block of {self.block_size}",
            "attention": self._attention(),
            "mask token": f"{self.mask_token_id}"
            + (", with an embedding of its own" if self.mask_embedding else ""),
        }

    def _attention(self) -> str:
        """How the layers see a block, the same ones together."""
        windows = self.transformer_layer_config.windows
        kinds = [
            f"{'causal' if causal else 'bidirectional'}"
            f"{'' if window is None else f' within {window} positions'}"
            for causal, window in zip(self.causal, windows, strict=True)
        ]
        if len(set(kinds)) == 1:
            return kinds[0]
        return ", ".join(f"layer {layer} {kind}" for layer, kind in enumerate(kinds))

    @property
    def features(self) -> frozenset[str]:
        """The features that this config declares (never ``embedding``, nor a whole ``head``)."""
        layer = self.transformer_layer_config
        declared = {"attention_bias": layer.attention_bias}
        if self.draft_vocab_size != layer.vocab_size:
            declared |= {"draft_vocabulary": True, "head": True}
        return frozenset(name for name, there in declared.items() if there)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the layers, of the states and of the vocabularies."""
        layer = self.transformer_layer_config
        sizes = layer.sizes()
        return sizes | {
            "one": 1,
            "two": 2,
            "head": layer.head_dim or sizes["queries"] // layer.num_attention_heads,
            "drafted": self.draft_vocab_size,
            "states": self.states * self.verifier_hidden_size,
        }

    @property
    def verifier_sizes(self) -> tuple[int, int]:
        """The vocabulary and the hidden size that a verifier must have."""
        return self.transformer_layer_config.vocab_size, self.verifier_hidden_size


class DFlash2Config(DFlashConfig):
    """The whole config.json of a DFlash 2 draft."""

    speculators_model_type: Literal["dflash2"] = "dflash2"  # type: ignore[assignment]
    conv_kernel_size: int = Field(ge=1)
    """How many positions each convolution sees: its own and those before it in the block."""
    conv_group_size: int = Field(ge=1)
    """How many channels share what a convolution adds to its kernel for a position."""
    selector_rank: int = Field(ge=1)
    """The width of the selector's codebooks."""
    selector_top_k: int = Field(ge=1)
    """How many candidates of each position the selector chooses among."""
    input_embedding_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What embeddings are multiplied by, if not 1. This and the next two are not keys of
    upstream's: it and vLLM ignore them here, and so they are only written if they change
    something."""
    output_multiplier: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What logits are multiplied by, if not 1."""
    final_logit_softcapping: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The bound that tanh then keeps the logits within, if there is one."""

    @model_validator(mode="after")
    def _check_convolutions(self) -> "DFlash2Config":
        hidden, group = self.transformer_layer_config.hidden_size, self.conv_group_size
        if hidden % group:
            raise ValueError(f"conv_group_size {group} does not divide the hidden size {hidden}")
        if self.conv_kernel_size > self.block_size:
            raise ValueError("conv_kernel_size is larger than a block")
        for name in ("input_embedding_scale", "output_multiplier"):
            if getattr(self, name) == 1:
                setattr(self, name, None)
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the convolutions and of the selector, too."""
        sizes = super().sizes
        groups = sizes["hidden"] // self.conv_group_size
        return sizes | {
            "taps": self.conv_kernel_size,
            "kernels": 2 * self.conv_kernel_size * groups,
            "rank": self.selector_rank,
        }


class DSparkConfig(DFlashConfig):
    """The whole config.json of a DSpark draft."""

    speculators_model_type: Literal["dspark"] = "dspark"  # type: ignore[assignment]
    sample_from_anchor: bool
    """As of a DFlash draft, but usually true. Readers disagree on its default, so it has none."""
    markov_rank: int = Field(ge=1)
    """The width of the Markov head's factors."""
    markov_head_type: Literal["vanilla", "gated", "rnn"]
    """``vanilla`` adds a bias that depends on the token before; in ``gated`` it depends on the
    hidden state as well, and in ``rnn`` on all tokens of the block before."""
    enable_confidence_head: bool
    """Whether a head estimates how likely a token is to be accepted."""
    confidence_head_with_markov: bool
    """Whether that head takes the Markov embedding of the token before beside the hidden state;
    false without such a head."""

    @property
    def causal(self) -> tuple[bool, ...]:
        """Whether each layer is causal: all or none if ``is_causal`` says so, or those that slide.

        vLLM does not read ``sliding_window_non_causal`` of DSpark.
        """
        layer = self.transformer_layer_config
        if layer.is_causal is not None:
            return (layer.is_causal,) * self.layers
        return self._causal_by_type

    @property
    def _causal_by_type(self) -> tuple[bool, ...]:
        return tuple(it == SLIDING for it in self.transformer_layer_config.layer_types)

    def _check_causality(self) -> None:
        layer = self.transformer_layer_config
        if layer.is_causal is not None and layer.is_causal == self.sliding_window_non_causal:
            raise ValueError("is_causal and sliding_window_non_causal contradict each other")
        if layer.is_causal is None and self.sliding_window_non_causal and True in self.causal:
            raise ValueError(
                "sliding_window_non_causal is true, but vLLM takes sliding layers to be causal "
                "unless is_causal is false; convert the draft again"
            )
        if self.causal == self._causal_by_type:
            layer.is_causal = None  # which adds nothing
        self.sliding_window_non_causal = not any(self.causal)

    @model_validator(mode="after")
    def _check_confidence(self) -> "DSparkConfig":
        self.confidence_head_with_markov &= self.enable_confidence_head
        return self

    @property
    def features(self) -> frozenset[str]:
        """The kind of Markov head and the confidence head, too."""
        heads = {
            "gated_markov": self.markov_head_type == "gated",
            "rnn_markov": self.markov_head_type == "rnn",
            "confidence_head": self.enable_confidence_head,
        }
        return super().features | {name for name, there in heads.items() if there}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the heads, too."""
        sizes = super().sizes
        rank = self.markov_rank
        return sizes | {
            "rank": rank,
            "hidden+rank": sizes["hidden"] + rank,
            "hidden+2rank": sizes["hidden"] + 2 * rank,
            "3rank": 3 * rank,
            "confidence": sizes["hidden"] + (rank if self.confidence_head_with_markov else 0),
        }

    def facts(self) -> dict[str, str]:
        """The heads, too."""
        confidence = ", and a confidence head" if self.enable_confidence_head else ""
        return super().facts() | {
            "Markov head": f"{self.markov_head_type}, of rank {self.markov_rank}{confidence}"
        }
