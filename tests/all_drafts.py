"""All golden and example drafts, and some that an engine cannot compute, converted."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dflash
import eagle3
from helpers import GOLDEN, GOLDEN_NAMES, config_of, save_quietly, write_checkpoint
from speculators.convert.conversion import convert

__all__ = ["NAMES", "Pair", "convert_all"]

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Pair:
    """A draft as it was published, and converted."""

    source: Path
    converted: Path
    verifier: Path


def verifier_like(source: Path, directory: Path, **keys: Any) -> Path:
    """What a conversion without validation needs of a verifier: a config."""
    config = config_of(source)
    sizes = {key: config[key] for key in ("hidden_size", "vocab_size")}
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], **sizes, **keys})
    )
    return directory


def made() -> dict[str, Any]:
    """DFlash drafts that some engine cannot compute, beside the golden ones."""
    return {
        "dflash, from the anchor": (dflash.native(sample_from_anchor=True), lambda tensors: None),
        "dflash, of rank 0": (
            dflash.deepspec(markov_rank=0, enable_confidence_head=False),
            lambda tensors: None,
        ),
        "dflash, sliding": (
            dflash.native(
                layer_types=dflash.sliding(True, False, True),
                sliding_window=16,
                use_sliding_window=True,
                is_causal=False,
            ),
            lambda tensors: None,
        ),
        "dflash, causal": (dflash.native(nested={"causal": True}), lambda tensors: None),
        "dflash, own matrices": (dflash.native(), dflash.with_own_matrices),
        "dflash, own vocabulary": (dflash.native(), dflash.with_vocabulary),
        "dflash, biased": (dflash.native(attention_bias=True), dflash.with_biases),
        "dspark, confident": (dflash.deepspec(), dflash.with_markov()),
    }


def convert_all(root: Path) -> dict[str, Pair]:
    """Convert all of them into a folder, without validation."""
    found: dict[str, tuple[Path, Path, dict[str, Any]]] = {}
    for source in [*(GOLDEN / name for name in GOLDEN_NAMES), *sorted(EXAMPLES.glob("smol*"))]:
        verifier = verifier_like(source, root / f"verifier of {source.name}", num_hidden_layers=30)
        found[source.name] = (source, verifier, {})
    narrow = save_quietly(eagle3.narrow_verifier(48), root / "narrow")
    for name in eagle3.NAMES:
        source = root / f"source of {name}"
        source.mkdir()
        for file in ("config.json", "model.safetensors"):
            (source / file).symlink_to(eagle3.GOLDEN3 / name / file)
        verifier = narrow if name == "target_hidden_48" else eagle3.TARGET
        found[name] = (source, verifier, eagle3.OPTIONS.get(name, {}))
    for path in sorted(dflash.GOLDEN_FAMILIES.glob("d*")):
        found[path.name] = (path, dflash.TARGET, {})
    for name, (config, edit) in made().items():
        source = dflash.write_draft(root / name, config, edit)
        found[name] = (source, dflash.TARGET, {})
    gelu = write_checkpoint(root / "gelu", config={"hidden_act": "gelu"})
    found["eagle, gelu"] = (gelu, verifier_like(gelu, root / "verifier of gelu"), {})
    return {
        name: Pair(
            source,
            convert(source, root / f"{name} out", verifier, options=options, validate=False),
            verifier,
        )
        for name, (source, verifier, options) in found.items()
    }


NAMES = [
    *GOLDEN_NAMES,
    *(path.name for path in sorted(EXAMPLES.glob("smol*"))),
    *eagle3.NAMES,
    *(path.name for path in sorted(dflash.GOLDEN_FAMILIES.glob("d*"))),
    *made(),
    "eagle, gelu",
]
