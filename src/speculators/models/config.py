"""The transformers config of a draft, around the family's config.json."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from speculators import __version__
from speculators.families.family import Family
from speculators.format.config import LayerConfig, SpeculatorConfig, SpeculatorsConfig

__all__ = ["SpeculatorPretrainedConfig"]

NOT_WRITTEN = {"transformers_version", "dtype", "torch_dtype", "architectures", "layer_types"}
"""Keys that transformers adds to the layer's config: the draft's, or derived from others."""

COMMON_KEYS = SpeculatorConfig.model_fields.keys() | {
    "transformer_layer_config",
    "speculators_config",
}
"""The keys of config.json that every family has."""

HEADS = ("num_attention_heads", "num_key_value_heads")


class SpeculatorPretrainedConfig(PreTrainedConfig):
    """The config of a draft; its JSON is the config of its family.

    A family's class adds the family's own keys as attributes.

    Attributes:
        family: the family.
        transformer_layer_config: a transformers config for the draft's decoder layers; a dictionary
            with ``model_type`` is turned into one.
        speculators_model_type: the family's name, or another one of its ``model_types``.
        speculators_config: proposal methods and the verifier, as a dictionary.
        layer_switches: keys of the layer's config that are written besides those of
            ``LayerConfig``, even with their defaults.

    """

    family: ClassVar[Family]
    layer_switches: ClassVar[frozenset[str]] = frozenset({"attention_bias", "mlp_bias"})

    sub_configs = {"transformer_layer_config": AutoConfig}  # type: ignore[dict-item]  # noqa: RUF012

    transformer_layer_config: PreTrainedConfig | dict[str, Any] | None = None
    speculators_model_type: str = ""
    speculators_version: str = __version__
    speculators_config: dict[str, Any] | SpeculatorsConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.speculators_model_type = self.speculators_model_type or self.family.name
        layer = self.transformer_layer_config
        if not isinstance(layer, PreTrainedConfig):
            self.transformer_layer_config = _layer_config(
                **{"num_hidden_layers": 1, **(layer or {})}
            )
        if isinstance(self.speculators_config, SpeculatorsConfig):
            self.speculators_config = self.speculators_config.model_dump()
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.architectures = self.draft_architectures

    @property
    def layer(self) -> Any:
        """``transformer_layer_config``, which is never a dictionary after initialisation."""
        return self.transformer_layer_config

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """The layer's config, from which transformers takes sizes and sets up caches."""
        return self.transformer_layer_config

    @property
    def speculators(self) -> SpeculatorsConfig:
        """``speculators_config``, with its defaults filled in."""
        return SpeculatorsConfig.model_validate(
            self.speculators_config
            or {
                "algorithm": self.speculators_model_type,
                "verifier": {"name_or_path": None, "architectures": []},
            }
        )

    @property
    def draft_architectures(self) -> list[str]:
        """The value of ``architectures``, which transformers sets to its own when it saves."""
        return [self.family.model.rpartition(":")[2]]

    def checked(self) -> SpeculatorConfig:
        """The config.json of the family, without keys that only transformers uses."""
        own = self.family.config.model_fields.keys() - COMMON_KEYS
        return self.family.config.model_validate(
            {
                "architectures": self.draft_architectures,
                "speculators_model_type": self.speculators_model_type,
                "speculators_version": self.speculators_version,
                "torch_dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
                "transformer_layer_config": self._layer_keys(),
                **{key: getattr(self, key) for key in own},
                "speculators_config": self.speculators.model_dump(),
            }
        )

    def _layer_keys(self) -> dict[str, Any]:
        defaults = type(self.layer)().to_dict()
        always = LayerConfig.model_fields.keys() | self.layer_switches
        keys = {
            key: value
            for key, value in self.layer.to_dict().items()
            if (key in always or value != defaults.get(key)) and key not in NOT_WRITTEN
        }
        rope = dict(self.layer.rope_parameters)
        keys.pop("rope_parameters", None)
        keys["rope_theta"] = rope.pop("rope_theta")
        keys["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        return keys

    def to_dict(self) -> dict[str, Any]:
        """The config.json of the format."""
        return self.checked().model_dump(exclude_none=True)

    def to_diff_dict(self) -> dict[str, Any]:
        """Same as ``to_dict``: the file is complete, so that it does not rely on defaults."""
        return self.to_dict()


def _layer_config(model_type: str = "llama", **keys: Any) -> PreTrainedConfig:
    """The transformers config of decoder layers.

    Llama's refuses a number of heads that does not divide the hidden size, as GLM-4.5 has, though
    its layers take the size of a head from ``head_dim`` (transformers 5.13 to 5.24). So such
    numbers are set after that check.
    """
    hidden, heads = keys.get("hidden_size"), keys.get("num_attention_heads")
    late: dict[str, Any] = {}
    if hidden and heads and hidden % heads and keys.get("head_dim"):
        late = {name: keys[name] for name in HEADS if keys.get(name)}
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **(keys | dict.fromkeys(late, 1)))
    for name, value in late.items():
        setattr(config, name, value)
    return config
