"""A family that exists only in the tests: what a new family has to bring, at its smallest.

A toy draft reads two states of its verifier, has a vocabulary of its own, and keeps no cache:

    h = projection(states);  x = tanh(fc([embedding; h])) * gain of each layer
    logits = lm_head(x)
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from speculators.families.family import Card, Derived, Family, Flag, Names, Source
from speculators.families.signature import Signature
from speculators.families.target import Target
from speculators.format.config import LayerConfig, SpeculatorConfig, SpeculatorsConfig
from speculators.format.tensors import TensorSpec
from speculators.models.config import SpeculatorPretrainedConfig
from speculators.models.output import DraftOutput
from speculators.models.speculator import Speculator

VERIFIER_LAYERS = (1, 2)


class ToyConfig(SpeculatorConfig):
    """The config.json of a toy draft."""

    speculators_model_type: Literal["toy"] = "toy"
    transformer_layer_config: LayerConfig
    draft_vocab_size: int
    bias: bool
    speculators_config: SpeculatorsConfig

    @property
    def features(self) -> frozenset[str]:
        return frozenset({"bias"} if self.bias else ())

    @property
    def sizes(self) -> dict[str, int]:
        sizes = self.transformer_layer_config.sizes()
        return sizes | {"twice": 2 * sizes["hidden"], "drafted": self.draft_vocab_size}


def derive(source: Source) -> Derived:
    given = source.checkpoint.config
    layer = LayerConfig.model_validate(
        {
            "vocab_size": given["vocab_size"],
            "hidden_size": given["hidden_size"],
            "num_hidden_layers": given["depth"],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": given["hidden_size"] // 4,
            "attention_bias": False,
            "mlp_bias": False,
        }
    )
    return Derived(
        layer,
        {
            "draft_vocab_size": source.tensors["offsets"].shape[0],
            "bias": "bias" in source.features,
        },
        ["ToySpeculator"],
        left_out={"depth": "it is written as num_hidden_layers"},
    )


TOY = Family(
    name="toy",
    noun="a toy draft",
    signature=Signature(
        kind="toy", title="a toy draft", marks=r"offsets", parts=("offsets", "in.weight")
    ),
    config=ToyConfig,
    tensors=(
        TensorSpec("projection.weight", ("hidden", "twice")),
        TensorSpec("fc.weight", ("hidden", "twice")),
        TensorSpec("fc.bias", ("hidden",), "bias"),
        TensorSpec("layers.{layer}.gain", ("hidden",)),
        TensorSpec("lm_head.weight", ("drafted", "hidden")),
        TensorSpec("offsets", ("drafted",), dtypes=("I64",)),
    ),
    features={"bias": "a bias on fc"},
    names=Names({"in.weight": "fc.weight", "in.bias": "fc.bias"}, {"old_fc.": "fc."}),
    omissions={r"step": "it counts training steps"},
    derive=derive,
    borrows=("embedding",),
    model="toy_family:ToySpeculator",
    reference="toy_family:ToyReference",
    card=Card(draft="A toy draft", tags=("toy",)),
    export_config=lambda config, target: {"made_for": target.reader},
    targets={"vllm": Target(reader="vLLM", layers={}, zeros=frozenset({"bias"}))},
    flags=(Flag("bias", "Fail unless the draft has a bias on fc."),),
    unusual=("bias",),
)


class ToyPretrainedConfig(SpeculatorPretrainedConfig):
    """The transformers config of a toy draft."""

    family = TOY

    draft_vocab_size: int = 8
    bias: bool = False


class GainLayer(nn.Module):
    """One numbered layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(hidden))


class ToySpeculator(Speculator):
    """The toy draft as a model."""

    config_class = ToyPretrainedConfig  # type: ignore[misc]
    config: ToyPretrainedConfig
    offsets: Tensor

    def __init__(self, config: ToyPretrainedConfig, own_embedding: bool = False) -> None:
        super().__init__(config, own_embedding)
        hidden = config.layer.hidden_size
        self.projection = nn.Linear(2 * hidden, hidden, bias=False)
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.bias)
        self.layers = nn.ModuleList(
            GainLayer(hidden) for _ in range(config.layer.num_hidden_layers)
        )
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.register_buffer("offsets", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        return VERIFIER_LAYERS

    def project(self, hidden_states: Tensor) -> Tensor:
        projected: Tensor = self.projection(hidden_states.to(self.fc.weight.dtype))
        return projected

    def to_verifier(self, tokens: Tensor) -> Tensor:
        return tokens + self.offsets[tokens]

    def draft(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        *_: Any,
        past_key_values: Any = None,
        **__: Any,
    ) -> DraftOutput:
        x = torch.tanh(self.fc(torch.cat((self._embed(input_ids), hidden_states), -1)))
        for layer in self.layers:
            assert isinstance(layer, GainLayer)
            x = x * layer.gain
        return DraftOutput(last_hidden_state=x, past_key_values=past_key_values)

    def logits(self, hidden_states: Tensor) -> Tensor:
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(hidden_states)
        return logits


class ToyReference:
    """The same, from the tensors of a research checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor], config: ToyConfig) -> None:
        self.tensors, self.config = tensors, config

    def cannot_evaluate(self) -> str | None:
        return None

    def __call__(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        tensors = self.tensors
        states = hidden_states @ tensors["projection.weight"].T
        x = torch.cat((embeddings, states), -1) @ tensors["in.weight"].T
        x = (x + tensors.get("in.bias", 0)).tanh()
        for number in range(self.config.layers):
            x = x * tensors[f"layers.{number}.gain"]
        return x

    def logits(self, x: Tensor, head: Tensor | None) -> Tensor:
        assert head is None
        return x @ self.tensors["lm_head.weight"].T
