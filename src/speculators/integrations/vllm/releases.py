"""Which releases of vLLM the plugin works in, found without importing vLLM.

The plugin builds on parts of vLLM that are not a public interface. They are listed here, and looked
for in vLLM's source files, so that a release that changed one of them is recognised before
anything is imported: an exception in a plugin, or in a model that it registered, stops vLLM.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["INSTALL", "PARTS", "TESTED_RELEASES", "is_tested", "missing_parts"]

TESTED_RELEASES = ("0.26.0", "0.29.0", "0.31.0", "0.32.0")
"""The releases whose engine has served converted drafts: 0.26.0 on a GPU, the others on a CPU."""

INSTALL = (
    f"vLLM {', '.join(TESTED_RELEASES[:-1])} and {TESTED_RELEASES[-1]} are known to work "
    f"(pip install vllm=={TESTED_RELEASES[-1]})"
)
"""Which releases to install in place of one that does not work."""

PARTS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "compilation/decorators.py": {"support_torch_compile": ("cls",)},
    "config/__init__.py": {"ModelConfig": None, "SpeculativeConfig": None, "VllmConfig": None},
    "config/model.py": {
        "ModelConfig.architectures": None,
        "ModelConfig.compute_hash": (),
        "ModelConfig.get_hidden_size": (),
        "ModelConfig.get_num_layers": ("parallel_config",),
        "ModelConfig.get_vocab_size": (),
    },
    "config/speculative.py": {
        "SpeculativeConfig.compute_hash": (),
        "SpeculativeConfig.draft_model_config": None,
    },
    "model_executor/layers/layernorm.py": {"RMSNorm.__init__": ("hidden_size", "eps")},
    "model_executor/layers/linear.py": {
        "ReplicatedLinear.__init__": (
            *("input_size", "output_size", "bias", "params_dtype"),
            *("quant_config", "prefix", "return_bias"),
        )
    },
    "model_executor/layers/logits_processor.py": {"LogitsProcessor.__init__": ("vocab_size",)},
    "model_executor/layers/vocab_parallel_embedding.py": {
        "VocabParallelEmbedding.__init__": ("num_embeddings", "embedding_dim", "prefix")
    },
    "model_executor/models/interfaces.py": {"SupportsEagleBase.has_own_embed_tokens": None},
    "model_executor/models/llama.py": {"LlamaForCausalLM.compute_logits": ("hidden_states",)},
    "model_executor/models/llama_eagle.py": {
        "EagleLlamaForCausalLM.forward": ("input_ids", "positions", "hidden_states"),
        "EagleLlamaForCausalLM.load_weights": ("weights",),
        "LlamaDecoderLayer.__init__": (
            "vllm_config",
            "disable_input_layernorm",
            "prefix",
            "config",
        ),
        "LlamaModel.hf_to_vllm_mapper": None,
    },
    "model_executor/models/registry.py": {
        "ModelRegistry": None,
        "_ModelRegistry.register_model": ("model_arch", "model_cls"),
    },
    "model_executor/models/utils.py": {
        "AutoWeightsLoader.__init__": ("module",),
        "AutoWeightsLoader.load_weights": ("weights", "mapper"),
        "get_draft_quant_config": ("vllm_config",),
        "maybe_prefix": ("prefix", "name"),
    },
    "transformers_utils/configs/speculators/algos.py": {"SUPPORTED_SPECULATORS_TYPES": None},
}
"""vLLM's file → the names that are used of it → the parameters that they are called with.

Without parameters where only the name matters, as for attributes.
"""


def is_tested(version: str) -> bool:
    """Whether the engine of this release (such as 0.32.0 or 0.32.0+cpu) was tested."""
    return version.partition("+")[0] in TESTED_RELEASES


def missing_parts(directory: Path) -> list[str]:
    """What the plugin needs of vLLM and the release lacks, such as ``llama.py: no Layer.forward``.

    Args:
        directory: the package ``vllm``.

    """
    return [
        f"{file}: {problem}"
        for file, parts in PARTS.items()
        for problem in _problems(directory / file, parts)
    ]


def _problems(file: Path, parts: dict[str, tuple[str, ...] | None]) -> Iterator[str]:
    try:
        found = dict(_definitions(ast.parse(file.read_bytes())))
    except (OSError, SyntaxError, ValueError):
        yield "no such module"
        return
    for name, used in parts.items():
        if name not in found:
            yield f"no {name}"
        elif used is not None and not _can_be_called(found[name], used):
            yield f"{name} has other parameters than {', '.join(used) or 'none'}"


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a module binds, those in classes as Class.name, and what binds them.

    Of several bindings of a name (overloads), the last one counts, as in Python.
    """
    for statement in tree.body:
        for name in _names_bound_by(statement):
            yield name, statement
        if isinstance(statement, ast.ClassDef):
            for member in statement.body:
                for name in _names_bound_by(member):
                    yield f"{statement.name}.{name}", member


def _names_bound_by(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return [name]
        case ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _can_be_called(definition: ast.stmt, used: tuple[str, ...]) -> bool:
    """Whether a function takes these parameters, and needs no others."""
    if not isinstance(definition, ast.FunctionDef):
        return False
    parameters = definition.args
    positional = [*parameters.posonlyargs, *parameters.args]
    taken = {it.arg for it in (*positional, *parameters.kwonlyargs)}
    needed = {it.arg for it in positional[: len(positional) - len(parameters.defaults)]}
    needed |= {
        it.arg
        for it, default in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
        if default is None
    }
    return set(used) <= taken and needed - {"self"} <= set(used)
