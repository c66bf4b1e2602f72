"""Count on how many prompts speculative decoding gives what the verifier's own generate does.

    python benchmarks/losslessness.py DRAFT VERIFIER

Both decode all 80 prompts that come with `speculators evaluate` greedily, in float32, in the same
batches of prompts of different lengths, padded at the left. The counts, and the position of each
first difference with the gap between the two best tokens there, go into
benchmarks/results/losslessness.json.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.models.eagle import EagleSpeculator

RESULTS = Path(__file__).parent / "results" / "losslessness.json"


def first_difference(verifier: Any, plain: Tensor, ours: Tensor) -> dict[str, float] | None:
    """Where two outputs first differ, and the verifier's gap between its best two tokens there."""
    length = min(len(plain), len(ours))
    differ = (plain[:length] != ours[:length]).nonzero()
    if not len(differ):
        return None
    at = int(differ[0])
    best = verifier(plain[None, :at]).logits[0, -1].topk(2).values
    return {"position": at, "lead": float(best[0] - best[1])}


@torch.inference_mode()
def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("draft", type=Path, help="a converted draft")
    parser.add_argument("verifier", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--num-draft-tokens", type=int, default=3)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.verifier, padding_side="left")
    verifier: Any = AutoModelForCausalLM.from_pretrained(options.verifier, dtype=torch.float32)
    model = EagleSpeculator.from_pretrained(options.draft, verifier=verifier, dtype=torch.float32)
    prompts = read_prompts(OWN_PROMPTS)
    differences: list[dict[str, float]] = []
    tokens = 0
    for start in range(0, len(prompts), options.batch):
        batch: Any = tokenizer.apply_chat_template(
            [
                [message.model_dump() for message in prompt.messages]
                for prompt in prompts[start : start + options.batch]
            ],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
        plain = verifier.generate(**batch, **settings)
        ours = model.generate(**batch, **settings, num_draft_tokens=options.num_draft_tokens)
        assert isinstance(ours, Tensor)
        tokens += int((plain[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())
        for row in range(len(plain)):
            kept = int(batch["attention_mask"][row].argmax())
            difference = first_difference(verifier, plain[row, kept:], ours[row, kept:])
            if difference or plain.shape != ours.shape:
                differences.append({"prompt": start + row, **(difference or {})})
        print(f"{start + len(plain)} prompts, {len(differences)} differ", flush=True)
    result = {
        "prompts": len(prompts),
        "identical": len(prompts) - len(differences),
        "differences": differences,
        "new_tokens": tokens,
        "settings": {key: str(value) for key, value in vars(options).items()},
        "versions": {name: version(name) for name in ("speculators", "torch", "transformers")},
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
