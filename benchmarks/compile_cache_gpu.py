"""Show on a GPU that vLLM with the plugin keeps the compiled graphs of different drafts apart.

    python benchmarks/compile_cache_gpu.py VERIFIER

VERIFIER is SmolLM2-135M-Instruct as made by `examples/make_verifier.py`. The HASS draft of the
examples is served first; then drafts that differ from it in one thing, each with the cache
directory that HASS filled and with one of its own. What a draft drafts, and how much of it is
accepted, must not depend on the cache. A copy whose config knows 64 positions must draft as HASS
does, although sequences are longer. The EAGLE-3 draft is served as converted, by vLLM's own
model. Written to benchmarks/results/compile-cache-gpu.json.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from on_gpu.engine import Engine

from speculators.convert.conversion import convert
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compile-cache-gpu.json"
WORK = ROOT / ".cache" / "compile-cache-gpu"
PROMPTS, MAX_TOKENS, DRAFT_TOKENS = 16, 128, 3

CHANGED = {
    "hass-eps": ("rms_norm_eps", 0.5),
    "hass-rope": ("rope_theta", 500.0),
    "hass-short": ("max_position_embeddings", 64),
}
"""Copies of the converted HASS draft → the key of the layer's config that is another there."""

FIRST = {
    "no draft": (None, "none"),
    "hass": ("hass", "shared"),
    "eagle3": ("eagle3", "eagle3"),
    "hass-eps, its own cache": ("hass-eps", "eps"),
    "hass-rope, its own cache": ("hass-rope", "rope"),
    "layernorms, its own cache": ("layernorms", "layernorms"),
    "hass-short, its own cache": ("hass-short", "short"),
}
SECOND = {
    "hass-eps, the cache of hass": ("hass-eps", "shared"),
    "hass-rope, the cache of hass": ("hass-rope", "shared"),
    "layernorms, the cache of hass": ("layernorms", "shared"),
}
"""What is served → its draft, and the name of its cache directory."""


def make_drafts(verifier: Path) -> None:
    """Convert the examples, and copy HASS with one key changed."""
    for name in ("hass", "layernorms", "eagle3"):
        source = ROOT / "examples" / f"smollm2-135m-{name}"
        convert(source, WORK / name, verifier, validate=False)
    for name, (key, value) in CHANGED.items():
        shutil.copytree(WORK / "hass", WORK / name)
        file = WORK / name / "config.json"
        config = json.loads(file.read_text())
        config["transformer_layer_config"][key] = value
        file.write_text(json.dumps(config))


def served(
    which: Mapping[str, tuple[str | None, str]], verifier: Path, chats: list[Any]
) -> dict[str, Any]:
    """Start engines together, let each answer, and stop them; returns what each measured."""
    engines = {}
    for label, (draft, cache) in which.items():
        arguments: dict[str, Any] = {
            "model": str(verifier),
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "max_num_seqs": PROMPTS,
            "kv_cache_memory_bytes": 3 << 30,
            "gpu_memory_utilization": 0.02,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        if draft is not None:
            arguments["speculative_config"] = {
                "method": "eagle3" if draft == "eagle3" else "eagle",
                "model": str(WORK / draft),
                "num_speculative_tokens": DRAFT_TOKENS,
            }
        environment = os.environ | {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(WORK / "caches" / cache),
        }
        log = WORK / f"{label.replace(' ', '-')}.log"
        engines[label] = Engine(arguments, chats, MAX_TOKENS, environment, log)
    measured = {}
    for label, engine in engines.items():
        engine.wait()
        answered = engine.answer([[number] for number in range(PROMPTS)])
        measured[label] = {
            key: answered[key] for key in ("tokens", "drafts", "accepted", "answers")
        }
        print(label, measured[label]["drafts"], measured[label]["accepted"], flush=True)
    for engine in engines.values():
        engine.stop()
    return measured


def main() -> None:
    """Serve, and write what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("verifier", type=Path)
    verifier = parser.parse_args().verifier.resolve()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    make_drafts(verifier)
    chats = [
        [message.model_dump() for message in prompt.messages]
        for prompt in read_prompts(OWN_PROMPTS)[:PROMPTS]
    ]
    measured = served(FIRST, verifier, chats) | served(SECOND, verifier, chats)
    found = {"vllm": version("vllm"), "torch": version("torch"), "served": measured}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
