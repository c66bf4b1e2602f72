"""Measure converting a DFlash draft beside `cp`, and beside speculators 0.9.0.

    make .venv-upstream/.installed
    python benchmarks/convert_dflash.py              five layers of width 2048: 545 MB
    python benchmarks/convert_dflash.py --layers 1 --repeats 1 --without-upstream

The draft has random weights in z-lab's layout. `convert dflash --no-validate` runs beside a `cp` of
what it writes, and on a tiny draft (the start-up time); beside.py tells how. Then it and the
converter of the PyPI project speculators 0.9.0, without its validation, run one after the other.
That one reads the verifier's embedding, head and norm, so the verifier has weights here: 524 MB.
The seconds go into benchmarks/results/convert-dflash.json.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from beside import Compared, compare, measure, speculators, summarise, upstream

from convert import CACHE, ROOT, Case, Run, conditions, run

RESULTS = ROOT / "benchmarks" / "results" / "convert-dflash.json"

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


def verifier_of(draft: Path) -> Path:
    """Where the verifier of a draft is."""
    return draft.with_name(f"{draft.name}-verifier")


def write_draft(directory: Path, layers: int, shrink: int = 1) -> None:
    """Write a draft with random weights, and beside it its verifier's embedding, head and norm."""
    ids = [1, 9, 17, 25, 33]
    own = {
        "architectures": ["DFlashDraftModel"],
        "block_size": 16,
        "num_target_layers": 36,
        "dflash_config": {"mask_token_id": VOCABULARY - 1, "target_layer_ids": ids},
    }
    write_model(directory, config(layers, shrink) | own, shapes(layers, shrink))
    hidden = HIDDEN // shrink
    borrowed = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    keys = config(36, shrink) | {"architectures": ["Qwen3ForCausalLM"]}
    write_model(verifier_of(directory), keys, borrowed)


def write_model(directory: Path, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a config.json and random weights in bfloat16."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(keys))
    random = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(generator=random)
        for name, shape in tensors.items()
    }
    save_file(weights, directory / "model.safetensors")


def convert(source: Path, target: Path, *, watched: bool = False) -> Run:
    """Run `speculators convert dflash --no-validate`."""
    report, verifier = target.with_name("fsync"), verifier_of(source)
    arguments = ("convert", "dflash", source, target, verifier, "--no-validate")
    return speculators(report, *arguments, watched=watched)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-upstream", action="store_true")
    parser.add_argument("--folder", type=Path, default=CACHE, help="where to write gigabytes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_draft(arguments.write / "draft", arguments.layers)
        write_draft(arguments.write / "tiny", 1, shrink=32)
        return

    arguments.folder.mkdir(exist_ok=True)
    CACHE.mkdir(exist_ok=True)
    about = conditions()
    case, compared = Case("convert dflash"), Compared()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as name:
        folder = Path(name)
        # In a process of its own: what is measured would begin with this one's memory.
        run(sys.executable, __file__, "--layers", str(arguments.layers), "--write", folder)
        draft, tiny = folder / "draft", folder / "tiny"
        measure(
            case,
            arguments.repeats,
            folder,
            lambda out: convert(draft, out),
            lambda out: convert(tiny, out),
        )
        compare(
            compared,
            0 if arguments.without_upstream else min(arguments.repeats, 3),
            folder,
            lambda out: convert(draft, out, watched=True),
            lambda out: upstream("dflash", draft, out, verifier_of(draft)),
        )
    about["load_average_at_end"] = os.getloadavg()
    summary = summarise(case, compared)
    print(json.dumps(summary, indent=2))
    runs = {"ours": asdict(case), "compared": asdict(compared)}
    written = {"conditions": about, "summary": summary, "runs": runs}
    arguments.results.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
