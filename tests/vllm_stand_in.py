"""A package ``vllm`` of stubs: what the plugin uses, with the signatures of vLLM 0.26 to 0.33."""

from pathlib import Path

__all__ = ["ALGORITHMS", "LAYERS", "REGISTRY", "write_stand_in"]

ALGORITHMS = "transformers_utils/configs/speculators/algos.py"
LAYERS = "model_executor/models/llama_eagle.py"
REGISTRY = "model_executor/models/registry.py"

SOURCES = {
    "__init__.py": "__version__ = {version!r}\n",
    "compilation/decorators.py": """
from typing import overload
@overload
def support_torch_compile(*, enable_if=None): ...
@overload
def support_torch_compile(cls): ...
def support_torch_compile(cls=None, *, dynamic_arg_dims=None, enable_if=None): ...
""",
    "config/__init__.py": """
from vllm.config.model import ModelConfig
from vllm.config.speculative import SpeculativeConfig
class VllmConfig: ...
""",
    "config/model.py": """
class ModelConfig:
    architecture, values = "", {}
    @property
    def architectures(self) -> list[str]:
        return [self.architecture]
    def compute_hash(self) -> str:
        return str(self.values)
    def get_hidden_size(self) -> int: ...
    def get_num_layers(self, parallel_config) -> int: ...
    def get_vocab_size(self) -> int: ...
""",
    "config/speculative.py": """
class SpeculativeConfig:
    draft_model_config: "ModelConfig | None" = None
    def compute_hash(self) -> str:
        return "eagle"
""",
    "model_executor/layers/layernorm.py": """
class RMSNorm:
    def __init__(self, hidden_size: int, eps: float = 1e-6, var_hidden_size=None): ...
""",
    "model_executor/layers/linear.py": """
class ReplicatedLinear:
    def __init__(self, input_size, output_size, bias=True, skip_bias_add=False, params_dtype=None,
                 quant_config=None, prefix="", *, return_bias=True, disable_tp=False): ...
""",
    "model_executor/layers/logits_processor.py": """
class LogitsProcessor:
    def __init__(self, vocab_size, org_vocab_size=None, scale=1.0): ...
""",
    "model_executor/layers/vocab_parallel_embedding.py": """
class VocabParallelEmbedding:
    def __init__(self, num_embeddings, embedding_dim, params_dtype=None, prefix=""): ...
""",
    "model_executor/models/interfaces.py": """
class SupportsEagleBase:
    has_own_embed_tokens: bool = False
""",
    "model_executor/models/llama.py": """
class LlamaForCausalLM:
    def compute_logits(self, hidden_states): ...
""",
    LAYERS: """
class LlamaDecoderLayer:
    def __init__(self, vllm_config, disable_input_layernorm, prefix="", config=None): ...
class LlamaModel:
    hf_to_vllm_mapper = None
class EagleLlamaForCausalLM:
    def forward(self, input_ids, positions, hidden_states, inputs_embeds=None): ...
    def load_weights(self, weights): ...
""",
    REGISTRY: """
class _ModelRegistry:
    def __init__(self):
        self.models = {}
    def register_model(self, model_arch, model_cls):
        self.models[model_arch] = model_cls
ModelRegistry = _ModelRegistry()
""",
    "model_executor/models/utils.py": """
class AutoWeightsLoader:
    def __init__(self, module, *, skip_prefixes=None): ...
    def load_weights(self, weights, *, mapper=None): ...
def get_draft_quant_config(vllm_config): ...
def maybe_prefix(prefix, name): ...
""",
    ALGORITHMS: 'SUPPORTED_SPECULATORS_TYPES = {"eagle3": "their own"}\n',
}


def write_stand_in(directory: Path, version: str) -> Path:
    """Write the package into a directory of packages; returns the package's own."""
    package = directory / "vllm"
    for name, source in SOURCES.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source.replace("{version!r}", repr(version)))
    return package
