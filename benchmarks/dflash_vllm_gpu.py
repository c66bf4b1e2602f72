"""Serve a DFlash draft with vLLM on a GPU, and compare what is accepted with what is here.

    python benchmarks/dflash_vllm_gpu.py VERIFIER

VERIFIER is SmolLM2-135M-Instruct as made by `examples/make_verifier.py`. vLLM answers eight prompts
greedily, in bfloat16 and eagerly, one at a time, without a draft and with the DFlash draft in
examples, as published and converted; each engine has a process of its own. Then the draft is run by
this package, in float32, along vLLM's answers: what it proposes wherever vLLM asked for a proposal.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from on_gpu.correctness import bfloat16_spacing
from on_gpu.engine import answered, counters

ROOT = Path(__file__).resolve().parent.parent
DRAFT = ROOT / "examples" / "smollm2-135m-dflash"
RESULTS = ROOT / "benchmarks" / "results" / "dflash-vllm-gpu.json"
DRAFTED, PROMPTS, NEW_TOKENS = 7, 8, 64
RESULT = "RESULT "


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("verifier", type=Path)
    parser.add_argument("--engine", help="answer with vLLM and this draft, or none")
    options = parser.parse_args()
    if options.engine:
        print(RESULT + json.dumps(served(str(options.verifier), options.engine)))
        return

    import torch

    from speculators.convert.conversion import convert

    with tempfile.TemporaryDirectory() as work:
        converted = convert(DRAFT, Path(work) / "draft", options.verifier, validate=False)
        drafts = {"none": "none", "as published": str(DRAFT), "converted": str(converted)}
        engines = {name: start(options.verifier, draft, work) for name, draft in drafts.items()}
        results: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "vllm": {name: result_of(engine) for name, engine in engines.items()},
        }
        answers = results["vllm"]["converted"]["answers"]
        results["here"] = followed(options.verifier, converted, answers)
    for name, said in results["vllm"].items():
        same = said["answers"] == results["vllm"]["none"]["answers"]
        print(f"{name}: {said['steps']} steps, accepted {said['accepted']}, same answers {same}")
    print(f"here: {results['here']}")
    RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")


def start(verifier: Path, draft: str, work: str) -> "subprocess.Popen[str]":
    """Start an engine, with a cache of its own."""
    cache = tempfile.mkdtemp(dir=work)
    return subprocess.Popen(
        [sys.executable, __file__, str(verifier), "--engine", draft],
        env=os.environ | {"VLLM_CACHE_ROOT": cache, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )


def result_of(engine: "subprocess.Popen[str]") -> dict[str, Any]:
    """What an engine printed at its end."""
    output, _ = engine.communicate()
    lines = [line for line in output.splitlines() if line.startswith(RESULT)]
    if not lines:
        sys.exit("An engine failed; its messages are above.")
    result: dict[str, Any] = json.loads(lines[0].removeprefix(RESULT))
    return result


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """The tokens of the prompts."""
    from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts

    chats = [
        [one.model_dump() for one in it.messages] for it in read_prompts(OWN_PROMPTS)[:PROMPTS]
    ]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]


def served(verifier: str, draft: str) -> dict[str, Any]:
    """Answer with vLLM, and read its counters."""
    import vllm

    settings: dict[str, Any] = {}
    if draft != "none":
        settings["speculative_config"] = {
            "method": "dflash",
            "model": draft,
            "num_speculative_tokens": DRAFTED,
        }
    engine = vllm.LLM(
        model=verifier,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=3 << 30,
        gpu_memory_utilization=0.02,
        enable_prefix_caching=False,
        disable_log_stats=False,
        enforce_eager=True,
        **settings,
    )
    groups = [[{"prompt_token_ids": ids}] for ids in prompts_of(engine.get_tokenizer())]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    answers = [list(map(int, tokens)) for tokens in answered(engine, groups, sampling)]
    steps, *accepted = counters(engine)
    return {"version": vllm.__version__, "steps": steps, "accepted": accepted, "answers": answers}


def followed(verifier: Path, draft: Path, answers: list[list[int]]) -> dict[str, Any]:
    """Draft along answers in float32, and count as vLLM does.

    Returns:
        steps; by position, the accepted tokens; and the largest gap, in spacings of bfloat16,
        between the verifier's best logit and that of a token of the answers.

    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

    from speculators.decode.cache import BlockCache
    from speculators.decode.capture import StateCapture
    from speculators.decode.proposals import drafter_of
    from speculators.decode.sampling import warp_of
    from speculators.format.config import ProposalMethod
    from speculators.models import load_draft

    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    model: Any = AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    loaded: Any = load_draft(draft, verifier=model, dtype=torch.float32)
    for one in (model, loaded):
        one.to("cuda").eval()
    method, warp = ProposalMethod(speculative_tokens=DRAFTED), warp_of(LogitsProcessorList())
    steps, accepted, widest = 0, [0] * DRAFTED, 0.0
    prompts = prompts_of(AutoTokenizer.from_pretrained(verifier))
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, known = [*prompt, *answer], len(prompt)
        ids = torch.tensor([tokens], device="cuda")
        with StateCapture(model, loaded.verifier_layers) as capture:
            logits = model(ids[:, :-1], use_cache=False).logits[0, known - 1 :]
            states = capture.take()
        best = logits.amax(1)
        gaps = best - logits.gather(1, ids[0, known:, None])[:, 0]
        spacings = [
            gap / bfloat16_spacing(top)
            for gap, top in zip(gaps.tolist(), best.tolist(), strict=True)
        ]
        widest = max(widest, *spacings)
        drafter = drafter_of(loaded, BlockCache([0]), method, warp)
        drafter.prefill(ids[:, 1:known], states[:, : known - 1])
        last, new = known, 1
        while last < len(tokens) - 1:
            seen = ids[:, last + 1 - new : last + 1], states[:, last - new : last]
            drafted = drafter.propose(*seen, [new]).tokens[0, 1:].tolist()
            right = 0
            for one, other in zip(drafted, tokens[last + 1 :], strict=False):
                if one != other:
                    break
                accepted[right] += 1
                right += 1
            steps += 1
            last, new = last + right + 1, right + 1
    return {"steps": steps, "accepted": accepted, "largest_gap_in_spacings": widest}


if __name__ == "__main__":
    main()
