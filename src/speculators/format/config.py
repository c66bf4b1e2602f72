"""What the config.json of every family consists of, as pydantic models.

The keys are those that speculators has written since 0.1.0, so existing readers understand
them. ``transformer_layer_config`` is a transformers config as a dictionary: the keys that the draft
computes with are typed here, and any other key is kept unchanged.
"""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

__all__ = [
    "PROPOSALS",
    "LayerConfig",
    "Model",
    "ProposalMethod",
    "SpeculatorConfig",
    "SpeculatorsConfig",
    "VerifierReference",
    "dtype_in_both_spellings",
    "rope_in_both_spellings",
]


PROPOSALS: dict[str, dict[str, int]] = {
    "greedy": {"speculative_tokens": 5},
    "sampling": {"speculative_tokens": 5},
    "static_tree": {"speculative_tokens": 25},
    "dynamic_tree": {"speculative_tokens": 59, "tree_depth": 7, "tree_top_k": 10},
}
"""Proposal type → the sizes that it has, and their defaults.

In order: a chain of the draft's best tokens; a chain of tokens sampled from the draft's
distribution; the fixed tree of EAGLE-1; the tree that EAGLE-2 grows at each step, in its
reference's size.
"""

SIZES = frozenset(name for sizes in PROPOSALS.values() for name in sizes)


class Model(BaseModel):
    """Base of all parts: a key that this version does not know is kept."""

    model_config = ConfigDict(extra="allow")


class ProposalMethod(Model):
    """One way of proposing tokens."""

    proposal_type: str = "greedy"
    """``greedy``, ``sampling``, ``static_tree`` or ``dynamic_tree``; another one can be carried
    along, but not decoded with."""
    speculative_tokens: int = Field(default=5, ge=1)
    """How many tokens are proposed for one pass of the verifier: the length of a chain, or the
    nodes of a tree without its root (EAGLE-2's reference counts the root in ``total_token``)."""
    tree_depth: int | None = Field(default=None, ge=1)
    """``dynamic_tree`` only: how many times the tree is grown after its first level, so that it
    has up to one level more (``depth`` of EAGLE-2's reference)."""
    tree_top_k: int | None = Field(default=None, ge=1)
    """``dynamic_tree`` only: how many nodes a level has, and how many children each of them is
    given (``top_k`` of EAGLE-2's reference)."""
    verifier_accept_k: int = Field(default=1, ge=1)
    """A token is accepted if it is among the verifier's k best."""
    accept_tolerance: float = Field(default=0.0, ge=0.0)
    """For ``verifier_accept_k`` over 1: how far below the best one it may lie, in nats."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Fill in missing sizes with the defaults of the proposal type."""
        if not isinstance(data, dict):
            return data
        said = {key: value for key, value in data.items() if key not in SIZES or value is not None}
        return PROPOSALS.get(said.get("proposal_type", "greedy"), {}) | said

    @model_validator(mode="after")
    def _check_sizes(self) -> "ProposalMethod":
        sizes = PROPOSALS.get(self.proposal_type, SIZES)
        foreign = sorted(key for key in SIZES.difference(sizes) if getattr(self, key) is not None)
        if foreign:
            raise PydanticCustomError(
                "foreign_size",
                "{type} has no {sizes}",
                {"type": self.proposal_type, "sizes": " and no ".join(foreign)},
            )
        return self


class VerifierReference(BaseModel):
    """The model that the draft was trained for."""

    name_or_path: str | None = None
    """A directory or a Hub id; ``None`` if unknown."""
    architectures: list[str]
    """The verifier's, from its config.json, such as ``["LlamaForCausalLM"]``."""


class SpeculatorsConfig(Model):
    """How to speculate with the draft."""

    algorithm: str
    """The name of the family."""
    proposal_methods: list[ProposalMethod] = Field(default_factory=lambda: [ProposalMethod()])
    """Ways of proposing, with their sizes."""
    default_proposal_method: str = "greedy"
    """The ``proposal_type`` that is used if none is asked for."""
    verifier: VerifierReference


def _keep_whole(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A whole number as it is, and not as a float."""
    checked = check(value)
    return value if type(value) is int else checked


class LayerConfig(Model):
    """The draft's decoder layers.

    The defaults are those of transformers' Llama config: earlier versions of speculators wrote
    only what differs from them.
    """

    model_type: str = "llama"
    """The transformers model whose layers the draft has."""
    vocab_size: int = Field(default=32000, ge=1)
    hidden_size: int = Field(default=4096, ge=1)
    intermediate_size: int = Field(default=11008, ge=1)
    num_hidden_layers: int = 1
    num_attention_heads: int = Field(default=32, ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """As many as ``num_attention_heads`` if not given."""
    head_dim: int | None = Field(default=None, ge=1)
    """``hidden_size / num_attention_heads`` if not given."""
    hidden_act: str = "silu"
    max_position_embeddings: int = Field(default=2048, ge=1)
    initializer_range: float = 0.02
    rms_norm_eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    rope_theta: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False),
        WrapValidator(_keep_whole),
        PlainSerializer(lambda base: base, return_type=Any),
    ] = 10000.0
    """Written as it was read: 1000000 stays that."""
    rope_scaling: dict[str, Any] | None = None
    """As in transformers before version 5; the draft's own, never the verifier's."""
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    @property
    def rope_type(self) -> str:
        """The type of RoPE scaling, ``default`` for none; older files call the key ``type``."""
        scaling = self.rope_scaling or {}
        found: str = scaling.get("rope_type") or scaling.get("type") or "default"
        return found

    def sizes(self) -> dict[str, int]:
        """The sizes that the shapes of a decoder layer's tensors consist of, by name."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        return {
            "vocabulary": self.vocab_size,
            "hidden": self.hidden_size,
            "intermediate": self.intermediate_size,
            "queries": self.num_attention_heads * head_dim,
            "keys": (self.num_key_value_heads or self.num_attention_heads) * head_dim,
        }


class SpeculatorConfig(Model):
    """The whole config.json: the keys that every family has."""

    architectures: list[str]
    """The class of the draft and, where the format has it, that of its decoder layer."""
    speculators_model_type: str
    """The name of the family; marks the file as being in this format."""
    speculators_version: str
    """The version that wrote it."""
    torch_dtype: str | None = None
    """The dtype of the tensors, by torch's name; missing in files of 0.1.0 to 0.3.0."""

    if TYPE_CHECKING:  # every family declares these itself, in the order of its keys
        transformer_layer_config: LayerConfig
        speculators_config: SpeculatorsConfig

    @property
    def features(self) -> frozenset[str]:
        """The features of the family's table that the config declares."""
        return frozenset()

    @property
    def companions(self) -> frozenset[str]:
        """The names of the files beside the weights that belong to the draft."""
        return frozenset()

    @property
    def parallel(self) -> bool:
        """Whether the draft drafts all tokens in one pass, and takes ``num_draft_tokens``."""
        return False

    @property
    def drafted_per_block(self) -> int | None:
        """The most tokens that one block drafts; ``None`` if the draft has no blocks."""
        return None

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        """The verifier's layers whose incoming states the draft reads.

        Empty if it reads the last hidden states.
        """
        return ()

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return self.transformer_layer_config.num_hidden_layers

    @property
    def counts(self) -> dict[str, int]:
        """How many numbered parts the draft has, by the words in ``TensorSpec.name``."""
        return {"layer": self.layers}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that tensor shapes consist of, by the names in ``TensorSpec.dimensions``."""
        return self.transformer_layer_config.sizes()

    @property
    def verifier_sizes(self) -> tuple[int, int]:
        """The vocabulary and the hidden size that a verifier must have."""
        return self.transformer_layer_config.vocab_size, self.transformer_layer_config.hidden_size


def rope_in_both_spellings(layer: Any) -> Any:
    """A layer's keys with RoPE as transformers 5 spells it and as it was spelled before.

    ``rope_parameters`` counts where both are given. Anything but a dictionary is returned as it is.
    """
    if not isinstance(layer, dict):
        return layer
    parameters = layer.get("rope_parameters")
    if isinstance(parameters, dict) and parameters:
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        scaled = scaling.get("rope_type", "default") != "default"
        said = {"rope_theta": parameters.get("rope_theta", layer.get("rope_theta"))}
        said["rope_scaling"] = scaling if scaled else None
        return layer | {key: value for key, value in said.items() if key != "rope_theta" or value}
    scaling = layer.get("rope_scaling") or {}
    theta = layer.get("rope_theta", 10000.0)
    return layer | {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta}}


def dtype_in_both_spellings(config: Any) -> Any:
    """A config's keys with ``torch_dtype``, and the same as ``dtype``, as transformers 5 spells it.

    Anything but a dictionary is returned as it is.
    """
    if not isinstance(config, dict):
        return config
    dtype = config.get("torch_dtype") or config.get("dtype")
    return config | {"torch_dtype": dtype, "dtype": dtype}
