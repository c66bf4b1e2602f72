"""Measure `speculators mtp cut` and `graft` against `cp` of the bytes that they write.

    python benchmarks/mtp.py                    a verifier of 1.2 GB with 680 MB of MTP
    python benchmarks/mtp.py --experts 4 --repeats 1

The verifier is of Qwen3-Next's kind: an embedding, a head and the MTP, in bfloat16 and two shards.
A run, a run on a tiny verifier (the start-up time) and a `cp` of what was written follow one
another, as in convert.py, which tells how. The seconds go into benchmarks/results/mtp.json.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from convert import CACHE, ROOT, TIMED_COMMAND, Run, conditions, copy, run

RESULTS = ROOT / "benchmarks" / "results" / "mtp.json"

EXPERTS = 98
"""They make the MTP 680 MB large."""


@dataclass
class Case:
    """All runs of one command; runs at the same index of the lists belong to one round."""

    megabytes: float = 0.0
    cp: list[Run] = field(default_factory=list)
    ours: list[Run] = field(default_factory=list)
    startup: list[Run] = field(default_factory=list)


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


def timed(report: Path, *arguments: str | Path) -> Run:
    """Run `speculators mtp` with its fsync calls timed."""
    done = run(*TIMED_COMMAND, report, "mtp", *arguments)
    done.fsync_s, done.fsync_cpu_s = map(float, report.read_text().split())
    return done


def measure(
    case: Case, repeats: int, folder: Path, ours: Callable[[Path], Run], tiny: Callable[[Path], Run]
) -> None:
    """Run a command, the same command on a tiny verifier, and `cp` of what it wrote, in turns."""
    target, written, copied = folder / "out", folder / "written", folder / "copied"
    ours(written)
    case.megabytes = sum(it.stat().st_size for it in written.iterdir()) / 1e6

    def once(what: Callable[[], Run]) -> Run:
        os.sync()
        try:
            return what()
        finally:
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(copied, ignore_errors=True)

    for _ in range(repeats):
        case.ours.append(once(lambda: ours(target)))
        case.startup.append(once(lambda: tiny(target)))
        case.cp.append(once(lambda: copy(written, copied)))
        print(f"cp {case.cp[-1]}, ours {case.ours[-1]}", flush=True)
    shutil.rmtree(written)


def summarise(case: Case) -> dict[str, float]:
    """Reduce the runs to the numbers that have targets."""
    rounds = list(zip(case.ours, case.startup, case.cp, strict=True))
    return {
        "MB written": case.megabytes,
        "over cp": median(
            (ours.wall_s - ours.fsync_s - tiny.wall_s + tiny.fsync_s) / cp.wall_s
            for ours, tiny, cp in rounds
        ),
        "of CPU": median(
            (ours.cpu_s - ours.fsync_cpu_s - tiny.cpu_s + tiny.fsync_cpu_s) / cp.cpu_s
            for ours, tiny, cp in rounds
        ),
        "CPU seconds": median(ours.cpu_s for ours, _, _ in rounds),
        "start-up, wall seconds": median(tiny.wall_s for _, tiny, _ in rounds),
        "peak MB": max(ours.peak_mb for ours, _, _ in rounds),
    }


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    CACHE.mkdir(exist_ok=True)
    about = conditions()
    cases = {"cut": Case(), "graft": Case()}
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="bench-") as name:
        folder = Path(name)
        verifier = write_verifier(folder / "verifier", arguments.experts, 2048, 64000)
        tiny = write_verifier(folder / "tiny", 2, 64, 256)
        report = folder / "fsync"
        measure(
            cases["cut"],
            arguments.repeats,
            folder,
            lambda out: timed(report, "cut", verifier, out),
            lambda out: timed(report, "cut", tiny, out),
        )
        timed(report, "cut", verifier, folder / "mtp")
        timed(report, "cut", tiny, folder / "tiny-mtp")
        measure(
            cases["graft"],
            arguments.repeats,
            folder,
            lambda out: timed(report, "graft", verifier, folder / "mtp", out),
            lambda out: timed(report, "graft", tiny, folder / "tiny-mtp", out),
        )
    about["load_average_at_end"] = os.getloadavg()
    summary = {name: summarise(case) for name, case in cases.items()}
    print(json.dumps(summary, indent=2))
    runs = {name: asdict(case) for name, case in cases.items()}
    written = {"conditions": about, "summary": summary, "runs": runs}
    arguments.results.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
