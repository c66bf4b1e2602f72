"""EAGLE-1, EAGLE-2 and HASS drafts as a vLLM model, built from vLLM's own layers.

vLLM's own EAGLE model is the plain one: ``fc`` has no bias, and there are no extra norms. This one
is built from the same parts, so that what vLLM does with them (tensor parallelism, compilation and
CUDA graphs, chunked prefill, sharing the verifier's embedding and head) works for it too.
"""

from collections.abc import Iterable, Iterator

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM, LlamaDecoderLayer
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    get_draft_quant_config,
    maybe_prefix,
)

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import CheckpointError, FormatError, VerifierError
from speculators.families.eagle import EAGLE
from speculators.integrations.vllm.config import cover_positions

__all__ = ["EagleDraft"]

EMBEDDING = "embed_tokens.weight"
"""The only tensor that a draft may lack."""


@support_torch_compile
class EagleDecoder(nn.Module):
    """The part of the draft before the head: embedding, fusion, and one decoder layer.

    Args:
        vllm_config: the engine's; its speculative config contains the draft's.
        prefix: of parameter names.
        layer_index: the index of the draft's layer among all attention layers of the engine, by
            which vLLM tells their caches apart.

    """

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, layer_index: int) -> None:
        super().__init__()
        self.config = config = vllm_config.speculative_config.draft_model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            num_embeddings=config.vocab_size,
            embedding_dim=config.hidden_size,
            prefix=maybe_prefix(prefix, "embed_tokens"),
        )
        self.fc = ReplicatedLinear(
            input_size=2 * config.hidden_size,
            output_size=config.hidden_size,
            bias=config.fusion_bias,
            params_dtype=vllm_config.model_config.dtype,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "fc"),
            return_bias=False,
        )
        self.layers = nn.ModuleList(
            [
                LlamaDecoderLayer(
                    vllm_config=vllm_config,
                    disable_input_layernorm=True,
                    prefix=maybe_prefix(prefix, f"layers.{layer_index}"),
                    config=config,
                )
            ]
        )
        if config.layernorms:
            size = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps}
            self.post_embedding_layernorm = RMSNorm(**size)
            self.hidden_layernorm = RMSNorm(**size)
            self.pre_lm_head_layernorm = RMSNorm(**size)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft one step for each token of a batch, whose sequences are concatenated.

        Args:
            input_ids: (tokens), int32.
            positions: (tokens), int64, within their sequences.
            hidden_states: (tokens, hidden), the verifier's at the token before each, or the draft's
                own that is fed back.

        Returns:
            The head's input, and the hidden states to feed back, both (tokens, hidden).

        """
        embedded = self.embed_tokens(input_ids)
        if self.config.layernorms:
            embedded = self.post_embedding_layernorm(embedded)
            hidden_states = self.hidden_layernorm(hidden_states)
        fused = self.fc(torch.cat((embedded, hidden_states), dim=-1))
        x, residual = self.layers[0](positions, fused, None)
        if self.config.layernorms:
            return self.pre_lm_head_layernorm(x, residual)
        x = x + residual
        return x, x

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors named as in the format; returns the names of the loaded parameters."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class EagleDraft(EagleLlamaForCausalLM):
    """The draft; vLLM gives it the verifier's head, and the verifier's embedding if it has none.

    Raises:
        VerifierError: if the verifier's hidden size or vocabulary is not the draft's.

    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        speculative_config = vllm_config.speculative_config
        self.directory = speculative_config.draft_model_config.model
        self.config = speculative_config.draft_model_config.hf_config
        self._check_fits(speculative_config.target_model_config)
        cover_positions(self.config, vllm_config.model_config.max_model_len)
        self.model = EagleDecoder(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            layer_index=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        )
        self.logits_processor = LogitsProcessor(vocab_size=self.config.vocab_size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the draft's tensors, named as in the format or in an older layout.

        Raises:
            CheckpointError: if the file is damaged.
            FormatError: if a tensor is missing, unknown or of another shape, so that no parameter
                stays uninitialised and no tensor is dropped.

        """
        found: set[str] = set()
        try:
            AutoWeightsLoader(self).load_weights(self._checked(weights, found))
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.directory} has a damaged model.safetensors ({error}); "
                "convert or fetch it again."
            ) from error
        self.has_own_embed_tokens = EMBEDDING in found  # vLLM gives it the verifier's otherwise
        missing = sorted(self.config.tensor_shapes.keys() - found - {EMBEDDING})
        if missing:
            raise FormatError(
                f"{self.directory} lacks {', '.join(missing)}, by its config.json; "
                "convert it again."
            )

    def _checked(
        self, weights: Iterable[tuple[str, Tensor]], found: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors under this model's names; adds their names in the format to ``found``."""
        for stored_name, tensor in weights:
            name, shape = EAGLE.names.current(stored_name), tuple(tensor.shape)
            if name not in self.config.tensor_shapes:
                raise FormatError(
                    f"{self.directory} has unknown {stored_name}, by its config.json; "
                    "convert it again."
                )
            if shape != self.config.tensor_shapes[name]:
                raise FormatError(
                    f"{self.directory}: {stored_name} has the shape {describe_shape(shape)}, but "
                    "by config.json it should have "
                    f"{describe_shape(self.config.tensor_shapes[name])}; convert it again."
                )
            found.add(name)
            yield f"model.{name}", tensor

    def _check_fits(self, target: ModelConfig) -> None:
        for what, draft, verifier in (
            ("hidden size", self.config.hidden_size, target.get_hidden_size()),
            ("vocabulary", self.config.vocab_size, target.get_vocab_size()),
        ):
            if draft != verifier:
                raise VerifierError(
                    f"The draft {self.directory} does not fit the verifier {target.model}: its "
                    f"{what} is {draft}, but the verifier's is {verifier}; serve it with the model "
                    "that it was trained for."
                )
