"""Serve a draft with SGLang's engine on a CPU, and count passes of the verifier by prompt.

    python benchmarks/sglang_cpu.py VERIFIER OUT.json [--prompts 8] [--max-new-tokens 64] \
        [-- --speculative-algorithm EAGLE3 --speculative-draft-model-path ./for-sglang ...]

The scheduler, the workers, the caches, the models and the loaders are those of SGLang 0.5.17;
its kernels are plain PyTorch (``sglang_on_cpu``), since the package index has them for GPUs only.
Decoding is greedy, in float32, one prompt at a time, with the prompts of ``speculators evaluate``.
Without options for a draft, the verifier answers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).with_name("sglang_on_cpu")
COUNTS = {"spec_verify_ct": "passes", "spec_num_correct_drafts": "accepted"}
"""SGLang's name of a count by request → the name here."""


def main() -> None:
    """Serve, and write what was answered and counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verifier")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = sys.argv[1:]
    ours = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:ours])
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":  # for the processes that SGLang starts
        path = os.pathsep.join(filter(None, (str(KERNELS), os.environ.get("PYTHONPATH"))))
        os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": path}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    serve(given, arguments[ours + 1 :])


def serve(given: argparse.Namespace, options: list[str]) -> None:
    """Answer the prompts one by one; the options are SGLang's own."""
    from sglang import Engine
    from sglang.srt.server_args import prepare_server_args
    from transformers import AutoTokenizer

    from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts

    fixed = "--device cpu --dtype float32 --attention-backend intel_amx --grammar-backend none"
    sizes = "--context-length 2048 --max-total-tokens 8192 --max-running-requests 2"
    arguments = ["--model-path", given.verifier, *fixed.split(), *sizes.split(), *options]
    arguments += ["--disable-overlap-schedule", "--log-level", "warning"]
    tokenizer = AutoTokenizer.from_pretrained(given.verifier)
    engine = Engine(server_args=prepare_server_args(arguments))
    answers: list[dict[str, Any]] = []
    for prompt in read_prompts(OWN_PROMPTS)[: given.prompts]:
        messages = [message.model_dump() for message in prompt.messages]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        sampling = {"temperature": 0, "max_new_tokens": given.max_new_tokens}
        answer = engine.generate(input_ids=tokens, sampling_params=sampling)
        counted = {name: answer["meta_info"].get(theirs) for theirs, name in COUNTS.items()}
        answers.append({"prompt": prompt.id, **counted, "tokens": answer["output_ids"]})
        print(prompt.id, counted, len(answer["output_ids"]), flush=True)
    engine.shutdown()
    said = {"options": options, "max_new_tokens": given.max_new_tokens, "answers": answers}
    given.out.write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
