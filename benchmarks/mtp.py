"""Measure `speculators mtp cut` and `graft` beside `cp`, and beside speculators 0.9.0.

    make .venv-upstream/.installed
    python benchmarks/mtp.py                    a verifier of 1.2 GB with 680 MB of MTP
    python benchmarks/mtp.py --experts 4 --repeats 1 --without-upstream

The verifier is of Qwen3-Next's kind: an embedding, a head and the MTP, in bfloat16 and two shards.
`cut` and `graft` run beside a `cp` of what they write, and on a tiny verifier (the start-up time);
beside.py tells how. Then `cut` and `convert --algorithm mtp` of the PyPI project speculators 0.9.0,
which take the MTP out of the same verifier, run one after the other. The seconds go into
benchmarks/results/mtp.json.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from beside import Compared, compare, measure, speculators, summarise, upstream

from convert import CACHE, ROOT, Case, conditions

RESULTS = ROOT / "benchmarks" / "results" / "mtp.json"

EXPERTS = 97
"""They make the MTP 680 MB large."""


def shapes(experts: int, hidden: int, vocabulary: int) -> tuple[dict[str, tuple[int, ...]], ...]:
    """The tensors of the two shards."""
    layer = "mtp.layers.0."
    mtp: dict[str, tuple[int, ...]] = {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.norm.weight": (hidden,),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        layer + "input_layernorm.weight": (hidden,),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "mlp.gate.weight": (experts, hidden),
        layer + "self_attn.q_proj.weight": (4 * hidden, hidden),
        layer + "self_attn.k_proj.weight": (hidden // 4, hidden),
        layer + "self_attn.v_proj.weight": (hidden // 4, hidden),
        layer + "self_attn.o_proj.weight": (hidden, 2 * hidden),
        layer + "self_attn.q_norm.weight": (hidden // 8,),
        layer + "self_attn.k_norm.weight": (hidden // 8,),
        layer + "mlp.shared_expert_gate.weight": (1, hidden),
        layer + "mlp.shared_expert.down_proj.weight": (hidden, hidden // 4),
        layer + "mlp.shared_expert.gate_proj.weight": (hidden // 4, hidden),
        layer + "mlp.shared_expert.up_proj.weight": (hidden // 4, hidden),
    }
    for expert in range(experts):
        for matrix in ("down", "gate", "up"):
            shape = (hidden, hidden // 4) if matrix == "down" else (hidden // 4, hidden)
            mtp[f"{layer}mlp.experts.{expert}.{matrix}_proj.weight"] = shape
    body = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
    }
    first = dict(sorted(mtp.items())[: len(mtp) // 10])
    return {**body, **first}, {name: mtp[name] for name in sorted(mtp) if name not in first}


def write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Write a file of random bfloat16 tensors, all of them finite."""
    header, position = {}, 0
    for name, shape in tensors.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    block = bytes(byte & 0x3F for byte in os.urandom(1 << 20))
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        while position > 0:
            file.write(block[: min(position, len(block))])
            position -= len(block)


def write_verifier(directory: Path, experts: int, hidden: int, vocabulary: int) -> Path:
    """Write a verifier in two shards."""
    directory.mkdir()
    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": hidden,
        "vocab_size": vocabulary,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": hidden // 8,
        "moe_intermediate_size": hidden // 4,
        "shared_expert_intermediate_size": hidden // 4,
        "num_experts": experts,
        "num_nextn_predict_layers": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shapes(experts, hidden, vocabulary), start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        write_shard(directory / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-upstream", action="store_true")
    parser.add_argument("--folder", type=Path, default=CACHE, help="where to write gigabytes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    arguments.folder.mkdir(exist_ok=True)
    CACHE.mkdir(exist_ok=True)
    about = conditions()
    cut, graft, compared = Case("mtp cut"), Case("mtp graft"), Compared()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as name:
        folder = Path(name)
        verifier = write_verifier(folder / "verifier", arguments.experts, 2048, 64000)
        tiny = write_verifier(folder / "tiny", 2, 64, 256)
        mtp, tiny_mtp, report = folder / "mtp", folder / "tiny-mtp", folder / "fsync"
        measure(
            cut,
            arguments.repeats,
            folder,
            lambda out: speculators(report, "mtp", "cut", verifier, out),
            lambda out: speculators(report, "mtp", "cut", tiny, out),
        )
        speculators(report, "mtp", "cut", verifier, mtp)
        speculators(report, "mtp", "cut", tiny, tiny_mtp)
        measure(
            graft,
            arguments.repeats,
            folder,
            lambda out: speculators(report, "mtp", "graft", verifier, mtp, out),
            lambda out: speculators(report, "mtp", "graft", tiny, tiny_mtp, out),
        )
        compare(
            compared,
            0 if arguments.without_upstream else min(arguments.repeats, 3),
            folder,
            lambda out: speculators(report, "mtp", "cut", verifier, out, watched=True),
            lambda out: upstream("mtp", verifier, out, verifier),
        )
    about["load_average_at_end"] = os.getloadavg()
    summary = {"cut": summarise(cut, compared), "graft": summarise(graft)}
    print(json.dumps(summary, indent=2))
    runs = {"cut": asdict(cut), "graft": asdict(graft), "compared": asdict(compared)}
    written = {"conditions": about, "summary": summary, "runs": runs}
    arguments.results.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
