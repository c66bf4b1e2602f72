"""Quantization around an MTP: which of its matrices are quantized, and what config.json must say.

A config lists the modules that are left as they are. An engine gives every other module quantized
parameters, whatever the checkpoint holds, so an MTP that is not quantized has to be in that list.
The matching is that of vLLM 0.33.0 (``quantization/utils/quant_utils.py``, ``is_layer_skipped``;
``compressed_tensors/utils.py``; ``modelopt.py``; ``gptq_utils.py``).
"""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from speculators.checkpoint.tensor import PlannedTensor, TensorInfo
from speculators.errors import ConversionError
from speculators.mtp.experts import expert_of
from speculators.mtp.parameters import companion_of, module_of
from speculators.mtp.types import language_config

__all__ = [
    "MODELOPT_FILE",
    "SHAPED",
    "WHOLE",
    "Modules",
    "check_same_method",
    "lacking_scales",
    "modules_of",
    "not_excluded",
    "quantization_of",
    "storage_of",
    "with_exclusions",
]

MODELOPT_FILE = "hf_quant_config.json"
"""Where ModelOpt says a second time how a checkpoint is quantized."""

WHOLE = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes of matrices that are not quantized."""

FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

SHAPED = WHOLE | FP8
"""The dtypes of matrices that are stored in their own shape, without numbers packed together."""

LISTS = {
    "compressed-tensors": "ignore",
    "fp8": "modules_to_not_convert",
    "fbgemm_fp8": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "torchao": "modules_to_not_convert",
    "modelopt": "ignore",
    "modelopt_fp4": "ignore",
    "quark": "exclude",
    "bitsandbytes": "llm_int8_skip_modules",
}
"""``quant_method`` → the key of the list of modules that are left as they are."""

OTHER_LISTS = ("ignored_layers", "exclude_modules", *dict.fromkeys(LISTS.values()))
"""The keys of such a list; one that is there already is the one that is extended."""

PATTERNS = {"compressed-tensors": r"re:^{}\..*", "quark": r"re:^{}\..*"}
"""``quant_method`` → how its list names everything within a module."""

OF_NO_ACCOUNT = frozenset(
    {*OTHER_LISTS, "dynamic", "version", "producer", "quantization_status", "kv_cache_scheme"}
)
"""What two checkpoints that are quantized alike may say differently."""


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of an MTP that have a matrix, by their names.

    Attributes:
        whole: those that are not quantized; experts by the module that holds all of them.
        quantized: those that are.

    """

    whole: tuple[str, ...]
    quantized: tuple[str, ...]


def modules_of(tensors: Mapping[str, TensorInfo | PlannedTensor]) -> Modules:
    """Tell the modules that are quantized from those that are not, norms and embeddings left out.

    Args:
        tensors: the tensors of an MTP, by the names that they have in the checkpoint.

    """
    whole: dict[str, None] = {}
    quantized = dict.fromkeys(filter(None, map(_module_with_companion, tensors)))
    for name, info in tensors.items():
        expert = expert_of(name)
        module = expert.place if expert else module_of(name)
        if module is None or module in quantized or (len(info.shape) < 2 and info.dtype in WHOLE):
            continue
        if module.endswith("embed_tokens"):
            continue
        (whole if info.dtype in WHOLE else quantized)[module] = None
    return Modules(tuple(whole), tuple(quantized))


def _module_with_companion(name: str) -> str | None:
    expert = expert_of(name)
    if expert:
        return None if expert.plain else expert.place
    return companion_of(name)


def lacking_scales(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The scales that FP8 matrices need, and that are not there, by the names they would have."""
    scaled = {it for it in map(companion_of, tensors) if it}
    return [
        f"{module}.weight_scale_inv"
        for name, info in tensors.items()
        if info.dtype in FP8 and (module := module_of(name)) and module not in scaled
    ]


def storage_of(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """How the matrices of an MTP are stored → how many are so."""
    companions: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        if module := companion_of(name):
            companions[module].add(name.removeprefix(f"{module}."))
    found: Counter[str] = Counter()
    for name, info in tensors.items():
        module, expert = module_of(name), expert_of(name)
        if (module or (expert and expert.plain)) and len(info.shape) > 1:
            beside = sorted(companions.get(module or name, ()))
            found[info.dtype + (f" with {', '.join(beside)}" if beside else "")] += 1
    return dict(found)


def not_excluded(config: Mapping[str, Any], modules: Modules) -> list[str]:
    """The modules that are not quantized, and that the config does not say so of."""
    settings = quantization_of(config)
    if settings is None:
        return []
    method = str(settings.get("quant_method", ""))
    _, entries = _list_in(settings, method)
    return [it for it in modules.whole if not _is_covered(it, entries, method)]


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json; ``None`` if it has none."""
    for part in (config, language_config(config)):
        found = part.get("quantization_config")
        if isinstance(found, dict) and found:
            return found
    return None


def check_same_method(
    source: Mapping[str, Any], target: Mapping[str, Any], names: tuple[str, str], modules: Modules
) -> None:
    """Check that a quantized MTP will be read as it was written.

    Args:
        source: the config.json that the MTP comes with.
        target: that of the verifier that gets it.
        names: what the user called the two.
        modules: those of the MTP.

    Raises:
        ConversionError: if the verifier is not quantized, or in another way.

    """
    if not modules.quantized:
        return
    theirs, ours = quantization_of(source), quantization_of(target)
    example = modules.quantized[0]
    if ours is None:
        raise ConversionError(
            f"{names[0]} has a quantized MTP ({example}), and config.json of {names[1]} has no "
            "quantization_config, so engines would take its numbers as they are; give an MTP that "
            "is not quantized."
        )
    differing = [
        key
        for key in dict.fromkeys([*ours, *(theirs or {})])
        if key not in OF_NO_ACCOUNT and ours.get(key) != (theirs or {}).get(key)
    ]
    if differing:
        raise ConversionError(
            f"{names[0]} has a quantized MTP ({example}), and {names[1]} is quantized in another "
            f"way: {differing[0]} of its quantization_config is {ours.get(differing[0])!r}, that "
            f"of the MTP is {(theirs or {}).get(differing[0])!r}; give an MTP that is not "
            "quantized, or quantized as the verifier."
        )


def with_exclusions(
    config: dict[str, Any], modules: Modules, others: Collection[str] = ()
) -> dict[str, Any]:
    """A config.json or hf_quant_config.json whose quantization fits an MTP.

    The modules that are not quantized are added to the list of those that are left as they are;
    those that are quantized are taken off it.

    Args:
        config: the file's content; it is not changed.
        modules: those of the MTP.
        others: the verifier's other modules, which have to stay as they are.

    Raises:
        ConversionError: if it is not known how the config lists modules, or an entry that also
            speaks of other modules leaves a quantized one as it is.

    """
    changed = copy.deepcopy(config)
    settings = quantization_of(changed) or _modelopt_settings(changed)
    if settings is None:
        return changed
    method = str(settings.get("quant_method", "modelopt" if "quant_algo" in settings else ""))
    key, entries = _list_in(settings, method)
    if key is None and modules.whole:
        raise ConversionError(
            f"config.json says quant_method {method or '(nothing)'}, and it is not known how that "
            f"lists modules that are not quantized, such as {modules.whole[0]} of the MTP; list "
            f"them yourself in config.json, under one of {', '.join(OTHER_LISTS[:3])}."
        )
    for module in modules.quantized:
        probe = _probe(module, method)
        for entry in [it for it in entries if _covers(it, probe, method)]:
            if other := next((it for it in others if _covers(entry, it, method)), None):
                raise ConversionError(
                    f"The entry {entry!r} of {key} in config.json says that {module} is not "
                    f"quantized, and in the MTP it is; the entry speaks of {other}, too, so it is "
                    "not taken off the list; give an MTP that is not quantized."
                )
            entries.remove(entry)
    for module in modules.whole:
        if _is_covered(module, entries, method):
            continue
        if method == "gptq":  # the first pattern that matches counts
            entries.insert(0, _gptq_pattern(module, modules.quantized))
        else:
            entries.append(_entry_for(module, method))
    if key is not None and (entries or key in settings):
        said = _patterns(settings)
        settings[key] = {it: said.get(it, {}) for it in entries} if method == "gptq" else entries
    return changed


def _list_in(settings: Mapping[str, Any], method: str) -> tuple[str | None, list[str]]:
    """The key of the list of modules that are left as they are, and its entries."""
    if method == "gptq":  # what begins with "-:" is not quantized
        return "dynamic", list(_patterns(settings))
    key = next((it for it in OTHER_LISTS if isinstance(settings.get(it), list)), LISTS.get(method))
    said = settings.get(key or "")
    entries = said if isinstance(said, list) else [said]
    return key, [it for it in entries if isinstance(it, str)]


def _patterns(settings: Mapping[str, Any]) -> dict[str, Any]:
    """GPTQ's patterns of modules, and what each says of those that it matches."""
    found = settings.get("dynamic")
    return found if isinstance(found, dict) else {}


def _modelopt_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    found = config.get("quantization")
    return found if isinstance(found, dict) and "quant_algo" in found else None


def _is_experts(module: str) -> bool:
    return module.endswith("experts")


def _is_covered(module: str, entries: Collection[str], method: str) -> bool:
    probe = _probe(module, method)
    return any(_covers(entry, probe, method) for entry in entries)


def _probe(module: str, method: str) -> str:
    """The name that tells whether a module is listed: of experts, one where patterns name each."""
    return f"{module}.0.gate_proj" if _is_experts(module) and method in PATTERNS else module


def _entry_for(module: str, method: str) -> str:
    if _is_experts(module) and method in PATTERNS:
        return PATTERNS[method].format(re.escape(module))
    return module


def _gptq_pattern(module: str, quantized: Collection[str]) -> str:
    """A pattern of all that is beside a module, or of the module alone if not all of that is whole.

    Engines ask for the names of fused modules, such as qkv_proj, which no checkpoint has.
    """
    parent = module.rpartition(".")[0]
    if any(it.startswith(f"{parent}.") for it in quantized):
        return rf"-:^{re.escape(module)}$"
    return rf"-:^{re.escape(parent)}\..*"


def _covers(entry: str, module: str, method: str) -> bool:
    """Whether an entry of the list speaks of a module."""
    if entry.startswith(("re:", "-:")):
        try:
            return re.match(entry.partition(":")[2], module) is not None
        except re.error:
            return False
    if method.startswith("modelopt"):
        return fnmatch(module, entry) or entry in module
    return entry == module or (method in {"awq", "bitsandbytes"} and entry in module)
