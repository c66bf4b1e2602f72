"""Who published an EAGLE-3 checkpoint, as far as its layout shows, and what its keys then mean."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from speculators.families.family import Source

__all__ = [
    "EXPORTED",
    "MODELOPT",
    "NEMO",
    "PUBLISHERS",
    "SPECULATORS",
    "Publisher",
    "eagle_config",
    "publisher_of",
]

Numbering = Literal["input", "output"]

MODELOPTS_OWN = {
    "next_layer_regular",
    "parallel_draft_heads_num_layers",
    "parallel_draft_step",
    "use_input_layernorm_in_first_layer",
    "use_last_layernorm",
    "use_mtp_layernorm",
}
"""Keys of ``eagle_config`` that only ModelOpt writes."""


EXPORTED = {"exported_by": "speculators"}
"""What an export says of itself, so that what its keys mean is certain when it is read back."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides who published a checkpoint.

    Attributes:
        config: its config.json.
        names: the names of its tensors, without what training code put before them.
        nested: whether ``fc`` and the layers are in a ``model``.

    """

    config: Mapping[str, Any]
    names: frozenset[str]
    nested: bool

    def has(self, pattern: str) -> bool:
        """Whether the name of a tensor matches."""
        return any(re.fullmatch(pattern, name) for name in self.names)

    def is_called(self, architecture: str) -> bool:
        """Whether the config names this architecture."""
        return architecture in (self.config.get("architectures") or ())


@dataclass(frozen=True, slots=True)
class Publisher:
    """A training framework, and how it writes what others write differently.

    Attributes:
        name: what it is called.
        wrote: whether a layout is its own.
        numbering: how it numbers the verifier's layers; ``None`` if that is not certain.
        feeds_back: whether its ``norm_output`` certainly means that the norm's output is fed back.
        usual_layers: whether its drafts of three states read the usual ones if no layers are given.

    """

    name: str
    wrote: Callable[[Layout], bool]
    numbering: Numbering | None = None
    feeds_back: bool = False
    usual_layers: bool = False


def eagle_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that ModelOpt, SpecForge and NVIDIA nest; empty if there is none."""
    nested = config.get("eagle_config")
    return nested if isinstance(nested, dict) else {}


def _is_like_specforge(layout: Layout) -> bool:
    return layout.is_called("LlamaForCausalLMEagle3") and layout.has(r"midlayer\..*")


def _is_exported(layout: Layout) -> bool:
    return EXPORTED.items() <= layout.config.items()


SPECULATORS = Publisher(
    "speculators",
    lambda it: "speculators_model_type" in it.config,
    numbering="input",
    feeds_back=True,
)
MODELOPT = Publisher(
    "ModelOpt",
    lambda it: bool(MODELOPTS_OWN & eagle_config(it.config).keys()),
    numbering="output",
)
NEMO = Publisher(
    "NeMo Automodel",
    lambda it: (
        (
            it.nested
            and bool(
                {"num_aux_hidden_states", "num_depths", "parallel_drafting"} & it.config.keys()
            )
        )
        or it.is_called("LlamaEagle3DraftModel")
    ),
    feeds_back=True,
)

PUBLISHERS = (
    SPECULATORS,
    Publisher(
        "speculators, exported for vLLM",
        lambda it: _is_exported(it) and "eagle_aux_hidden_state_layer_ids" in it.config,
        numbering="input",
        feeds_back=True,
    ),
    Publisher(
        "speculators, exported for others",
        _is_exported,
        numbering="output",
        feeds_back=True,
        usual_layers=True,
    ),
    Publisher(
        "AngelSlim", lambda it: "aux_hidden_states_layer_ids" in it.config, numbering="output"
    ),
    MODELOPT,
    NEMO,
    Publisher(
        "NVIDIA",
        lambda it: "d2t" in it.names and "t2d" not in it.names,
    ),
    Publisher(
        "SpecForge",
        lambda it: (
            it.is_called("PEagleDraftModel")
            # Its exports repeat RoPE's base in the older spelling.
            or (_is_like_specforge(it) and {"rope_parameters", "rope_theta"} <= it.config.keys())
        ),
        numbering="output",
        usual_layers=True,
    ),
    Publisher("SpecForge, or in its layout", _is_like_specforge, usual_layers=True),
    Publisher(
        "SafeAILab",
        lambda it: (
            it.has(r"midlayer\..*")
            and "eagle_config" not in it.config
            and not re.search("Eagle3", str(it.config.get("architectures")))
        ),
        usual_layers=True,
    ),
    Publisher("an unknown publisher", lambda it: True),  # noqa: ARG005
)
"""A checkpoint is taken for that of the first one whose layout it has."""


def publisher_of(source: Source) -> Publisher:
    """The publisher of a checkpoint, by its layout."""
    nested = any(f".{name}".endswith(".model.fc.weight") for name in source.names)
    layout = Layout(source.checkpoint.config, frozenset(source.names.values()), nested)
    return next(publisher for publisher in PUBLISHERS if publisher.wrote(layout))
