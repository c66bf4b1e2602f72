"""Measure converting a DFlash draft against `cp` of the same bytes.

    python benchmarks/convert_dflash.py              five layers of width 2048: 545 MB
    python benchmarks/convert_dflash.py --layers 1 --repeats 1

A copy, a conversion without validation and a conversion of a tiny draft (the start-up time) run one
after the other, with the source in the page cache. Ratios are taken within each such round, and
their median is reported. The raw seconds go into benchmarks/results/convert-dflash.json.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from machine import cpu_name

from convert import RESULTS, TIMED_COMMAND, Run, copy, run

HIDDEN, INTERMEDIATE, HEADS, KEYS, HEAD, VOCABULARY, STATES = 2048, 6144, 16, 8, 128, 64000, 5


def shapes(layers: int, shrink: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a DFlash draft, by name."""
    hidden, intermediate, head = HIDDEN // shrink, INTERMEDIATE // shrink, HEAD // shrink
    found: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, STATES * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for layer in range(layers):
        of_layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (HEADS * head, hidden),
            "self_attn.k_proj": (KEYS * head, hidden),
            "self_attn.v_proj": (KEYS * head, hidden),
            "self_attn.o_proj": (hidden, HEADS * head),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        found |= {f"layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return found


def config(layers: int, shrink: int) -> dict[str, Any]:
    """What the config.json of a draft and of a verifier have in common."""
    return {
        "model_type": "qwen3",
        "hidden_size": HIDDEN // shrink,
        "intermediate_size": INTERMEDIATE // shrink,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "head_dim": HEAD // shrink,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
    }


def write_draft(directory: Path, layers: int, shrink: int = 1) -> None:
    """Write a draft with random weights, and beside it a verifier's config.json."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    ids = [1, 9, 17, 25, 33]
    own = {
        "architectures": ["DFlashDraftModel"],
        "block_size": 16,
        "num_target_layers": 36,
        "dflash_config": {"mask_token_id": VOCABULARY - 1, "target_layer_ids": ids},
    }
    (directory / "config.json").write_text(json.dumps(config(layers, shrink) | own))
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=random).to(torch.bfloat16)
        for name, shape in shapes(layers, shrink).items()
    }
    save_file(tensors, directory / "model.safetensors")
    verifier = directory.with_name(f"{directory.name}-verifier")
    verifier.mkdir()
    keys = config(36, shrink) | {"architectures": ["Qwen3ForCausalLM"]}
    (verifier / "config.json").write_text(json.dumps(keys))


def convert(source: Path, target: Path) -> Run:
    """Run `speculators convert dflash --no-validate`, with its fsync calls timed."""
    report, verifier = target.with_name("fsync"), source.with_name(f"{source.name}-verifier")
    arguments = ("convert", "dflash", source, target, verifier, "--no-validate")
    done = run(*TIMED_COMMAND, report, *arguments)
    done.fsync_s, done.fsync_cpu_s = map(float, report.read_text().split())
    return done


def ratios(rounds: list[dict[str, Run]], kind: str) -> list[float]:
    """Wall or CPU time of converting without start-up and fsync, over that of copying."""

    def seconds(it: Run) -> float:
        return it.wall_s - it.fsync_s if kind == "wall" else it.cpu_s - it.fsync_cpu_s

    def of_copy(it: Run) -> float:
        return it.wall_s if kind == "wall" else it.cpu_s

    return [(seconds(it["convert"]) - seconds(it["tiny"])) / of_copy(it["cp"]) for it in rounds]


def main() -> None:
    """Measure, print a summary, and write the raw seconds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_draft(arguments.write / "draft", arguments.layers)
        write_draft(arguments.write / "tiny", 1, shrink=32)
        return
    rounds: list[dict[str, Run]] = []
    with tempfile.TemporaryDirectory(dir=RESULTS.parents[1]) as temporary:
        folder = Path(temporary)
        # In a process of its own: what is measured would begin with this one's memory.
        run(sys.executable, __file__, "--layers", str(arguments.layers), "--write", folder)
        megabytes = (folder / "draft" / "model.safetensors").stat().st_size / 1e6
        for number in range(arguments.repeats + 1):
            measured = {
                "cp": copy(folder / "draft", folder / "copy"),
                "convert": convert(folder / "draft", folder / "out"),
                "tiny": convert(folder / "tiny", folder / "tiny-out"),
            }
            for name in ("copy", "out", "tiny-out"):
                shutil.rmtree(folder / name)
            if number:  # the first round warms the page cache up
                rounds.append(measured)
    for name in ("cp", "convert", "tiny"):
        runs = [it[name] for it in rounds]
        print(
            f"{name:8} {median(it.wall_s for it in runs):6.2f} s wall, "
            f"{median(it.cpu_s for it in runs):5.2f} s CPU, "
            f"{max(it.peak_mb for it in runs):5.0f} MB"
        )
    summary = {kind: median(ratios(rounds, kind)) for kind in ("wall", "CPU")}
    print(
        f"converting {megabytes:.0f} MB, without start-up and fsync: "
        f"{summary['wall']:.2f} x cp by wall time, {summary['CPU']:.2f} x by CPU time"
    )
    result = {
        "machine": {"cpu": cpu_name(), "load": os.getloadavg()[0]},
        "megabytes": megabytes,
        "ratios": summary,
        "rounds": [{name: asdict(it) for name, it in one.items()} for one in rounds],
    }
    file = RESULTS.with_name("convert-dflash.json")
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
