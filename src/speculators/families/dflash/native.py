"""The keys of a draft's config.json, in whichever layout: z-lab's, DeepSpec's, upstream's, ...

Native layouts are flat, with some keys nested in ``dflash_config`` or ``dspark_config``; upstream's
format nests those of the layers in ``transformer_layer_config``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.errors import ConversionError, printable
from speculators.families.family import Source

__all__ = [
    "LAYER",
    "Kind",
    "Publisher",
    "Said",
    "architectures_of",
    "matrix",
    "publisher_of",
]

Kind = Literal["dflash", "dflash2", "dspark"]

LAYER = "transformer_layer_config"
NESTED = ("dspark_config", "dflash_config")

CHANGES: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "attention_sink_bias": ((False,), "attention sinks"),
    "add_swa_attention_sink_bias": ((False,), "attention sinks"),
    "attention_value_scale": ((1,), "scaled values"),
    "use_aux_hidden_state": ((True,), "no states of the verifier"),
    "use_gemma_norm": ((False,), "norms that multiply by 1 + weight"),
    "pure_draft_prefix_len": ((0,), "a prefix without correction (Domino)"),
    "logit_scale": ((1,), "scaled logits"),
    "per_position": ((False,), "a mask embedding for each position"),
    "projector_type": (("dflash", "dspark", "dflash2"), "another projector"),
}
"""Key that changes what a draft computes → the values with which it does not, and what it means."""

WITHOUT_EFFECT = {
    "attention_mode": "the sizes of the heads say it",
    "num_anchors": "it is about training",
    "confidence_head_alpha": "it is about training",
    "l1_loss_alpha": "it is about training",
    "ce_loss_alpha": "it is about training",
    "loss_decay_gamma": "it is about training",
    "enable_d2_feature": "it is about training",
    "d2_prefix_weight_base": "it is about training",
    "mask_token": "its id is written",
    "num_lookahead_tokens": "it is block_size",
    "dspark_draft_topk": "it is a setting of vLLM",
    "has_embed_tokens": "the tensors say it",
    "has_lm_head": "the tensors say it",
}
"""Key of a draft of this kind → why it has no effect."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """A training framework, by the layout of its checkpoints.

    Attributes:
        name: what it is called.
        wrote: whether a config is its own.
        from_anchor: whether its drafts sample from the anchor, if the config does not say so;
            ``None`` if those of DSpark do, and others do not.

    """

    name: str
    wrote: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
    from_anchor: bool | None = None


def architectures_of(config: Mapping[str, Any]) -> list[str]:
    """The architectures that a config names, whatever form it names them in."""
    named = config.get("architectures")
    return [str(it) for it in (named if isinstance(named, list) else [named]) if it is not None]


def _is_called(config: Mapping[str, Any], *architectures: str) -> bool:
    return not set(architectures).isdisjoint(architectures_of(config))


SPECULATORS = Publisher("speculators", lambda config, nested: "speculators_model_type" in config)  # noqa: ARG005
PUBLISHERS = (
    SPECULATORS,
    # Its trainer has no Markov head for rank 0, but samples from the anchor all the same.
    Publisher(
        "DeepSpec",
        lambda config, nested: _is_called(config, "Qwen3DSparkModel") and not nested,
        from_anchor=True,
    ),
    Publisher(
        "ModelOpt",
        lambda config, nested: "causal" in nested or "use_confidence_head" in nested,  # noqa: ARG005
    ),
    Publisher(
        "SpecForge",
        lambda config, nested: (
            _is_called(config, "DSparkDraftModel") or nested.get("projector_type") == "dspark"
        ),
        from_anchor=False,
    ),
    Publisher("DeepSpec", lambda config, nested: "markov_rank" in config, from_anchor=True),  # noqa: ARG005
    Publisher("z-lab, or in its layout", lambda config, nested: True),  # noqa: ARG005
)
"""A checkpoint is taken for that of the first one whose layout it has."""


def publisher_of(config: Mapping[str, Any]) -> Publisher:
    """The publisher of a checkpoint, by its config.json."""
    nested = {
        key: value
        for name in reversed(NESTED)
        if isinstance(config.get(name), dict)
        for key, value in config[name].items()
    }
    return next(publisher for publisher in PUBLISHERS if publisher.wrote(config, nested))


@dataclass(slots=True)
class Said:
    """What a checkpoint's config.json says, wherever it says it.

    Attributes:
        source: the checkpoint.
        flat: path of a key → its value.
        layer: the keys of the decoder layers that no one has asked for.
        upstream: whether it is in upstream's format.
        read: path of a key → what became of it.

    """

    source: Source
    flat: dict[str, Any] = field(init=False)
    layer: dict[str, Any] = field(init=False)
    upstream: bool = field(init=False)
    read: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.source.checkpoint.config
        nested = {
            f"{name}.{key}": value
            for name in NESTED
            if isinstance(config.get(name), dict)
            for key, value in config[name].items()
        }
        self.read = {
            name: "its keys are read one by one"
            for name in NESTED
            if isinstance(config.get(name), dict)
        }
        inner = config.get(LAYER)
        self.upstream = isinstance(inner, dict)
        if isinstance(inner, dict):
            self.layer = dict(inner)
            outer = {key: value for key, value in config.items() if key != LAYER}
            self.flat = nested | outer | {f"{LAYER}.{key}": it for key, it in inner.items()}
        else:
            self.layer = {key: it for key, it in config.items() if key not in self.read}
            self.flat = nested | {key: it for key, it in config.items() if key not in self.read}

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.source.checkpoint.config_file)

    def find(self, *names: str, becomes: str = "") -> Any:
        """The value of the first of these keys that is there, nested or not; ``None`` if none is.

        Args:
            *names: what layouts call it.
            becomes: what becomes of it, if it is not written under the first name.

        Raises:
            ConversionError: if two of them differ.

        """
        found = {
            path: value
            for name in names
            for prefix in ("", *(f"{it}." for it in NESTED), f"{LAYER}.")
            if (path := prefix + name) in self.flat
            for value in [self.flat[path]]
        }
        for path in found:
            self.layer.pop(path.rpartition(".")[2], None)
            if path != names[0] or becomes:
                self.read[path] = becomes or f"it is written as {names[0]}"
        given = {path: value for path, value in found.items() if value is not None}
        for path, value in given.items():
            first, other = next(iter(given.items()))
            if value != other:
                raise ConversionError(
                    f"{self.where} says {first} {_shown(other)} and {path} {_shown(value)}, which "
                    "mean the same; remove the one that the draft was not trained with."
                )
        return next(iter(given.values()), None)

    def whole_number(self, *names: str, at_least: int = 1, becomes: str = "") -> int | None:
        """As ``find``, for a number.

        Raises:
            ConversionError: if it is something else.

        """
        value = self.find(*names, becomes=becomes)
        if value is not None and (type(value) is not int or value < at_least):
            raise ConversionError(
                f"{self.where}, key {names[0]}: {_shown(value)} is not a whole number of at least "
                f"{at_least}; correct the config."
            )
        return value

    def flag(self, *names: str, becomes: str = "") -> bool | None:
        """As ``find``, for true or false.

        Raises:
            ConversionError: if it is something else.

        """
        value = self.find(*names, becomes=becomes)
        if value is not None and not isinstance(value, bool):
            raise ConversionError(
                f"{self.where}, key {names[0]}: {_shown(value)} is not true or false; correct the "
                "config."
            )
        return value

    def refuse_what_changes(self) -> None:
        """Refuse keys with which a draft computes what the format cannot say.

        Raises:
            ConversionError: naming the first such key.

        """
        for name, (neutral, what) in CHANGES.items():
            value = self.find(name, becomes="with this value it changes nothing")
            if value is not None and value not in neutral:
                raise ConversionError(
                    f"{self.where} says {name} {_shown(value)}: the draft has {what}, which the "
                    "speculators format cannot express; serve it as it was published."
                )
        for name, why in WITHOUT_EFFECT.items():
            self.find(name, becomes=why)

    def left(self) -> list[str]:
        """The nested keys that no one has asked for; they are left out."""
        paths = [
            path
            for path, value in self.flat.items()
            if path.startswith(tuple(f"{name}." for name in NESTED))
            and path not in self.read
            and value is not None
        ]
        self.read |= dict.fromkeys(paths, "its meaning is not known")
        return paths


def matrix(said: Said, name: str, rank: int = 2) -> TensorInfo:
    """A tensor of so many dimensions, none of them 0.

    Raises:
        ConversionError: if it has another form.

    """
    info = said.source.tensors[name]
    if len(info.shape) != rank or 0 in info.shape:
        raise ConversionError(
            f"{info.file}: {info.name} has the shape {describe_shape(info.shape)}, but should have "
            f"{rank} dimensions; give the checkpoint as it was published."
        )
    return info


def _shown(value: Any) -> str:
    return printable(repr(value))
