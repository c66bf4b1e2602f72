"""Measure how well published drafts draft, before anything has converted them.

    measure_drafts.py VERIFIER PROMPTS.jsonl DRAFT... [--output acceptance.json]

The published tensors are loaded into the network that they were trained in (training/), and a
chain is drafted and verified greedily in the plainest way: everything is computed afresh in each
step, in float32, without a cache. It imports nothing of speculators, so that a converted draft that
is accepted as often by `speculators evaluate` shows that nothing was lost on the way.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.dflash import DFlashDraft
from training.draft import Draft
from training.eagle1 import Eagle1Draft
from training.eagle3 import Eagle3Draft, layers_read
from training.recipes import Recipe


def load(directory: Path, verifier: Any) -> Draft:
    """Load the published tensors, in float32, into the draft's training code."""
    weights = directory / "pytorch_model.bin"
    tensors = (
        torch.load(weights, weights_only=True)
        if weights.exists()
        else load_file(directory / "model.safetensors")
    )
    config = json.loads((directory / "config.json").read_text())
    family = "dflash" if "dflash_config" in config else "eagle3" if "d2t" in tensors else "eagle1"
    recipe = Recipe(
        family,
        torch.float32,
        bias="fc.bias" in tensors,
        layernorms="embed_layernorm.weight" in tensors,
        eagle31="fc_norm.0.weight" in tensors,
    )
    if family == "dflash":
        left = config["dflash_config"]["target_layer_ids"]
        draft: Draft = DFlashDraft(config, tuple(layer + 1 for layer in left))
    elif family == "eagle3":
        reads, known = layers_read(verifier), tensors["t2d"].nonzero()[:, 0]
        draft = Eagle3Draft(config, recipe, reads, known)
    else:
        draft = Eagle1Draft(config, recipe)
    draft.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    )
    return draft.eval()


def drafted_chain(
    draft: Draft, verifier: Any, tokens: list[int], states: Tensor, chain: int
) -> list[int]:
    """The tokens that a draft drafts after ``tokens``, from the verifier's states before the last.

    All is computed afresh for each of them; DFlash drafts them at once.
    """
    embed, drafted = verifier.get_input_embeddings(), list[int]()
    if isinstance(draft, DFlashDraft):
        anchor, place = torch.tensor([[tokens[-1]]]), torch.tensor([[len(tokens) - 1]])
        block = draft(embed, states, anchor, place, chain + 1)[0, 0, 1:]
        return [int(token) for token in verifier.lm_head(block).argmax(-1)]
    fed = draft.read(states) if isinstance(draft, Eagle3Draft) else states
    for _ in range(chain):
        embeddings = embed(torch.tensor([[*tokens[1:], *drafted]]))
        if isinstance(draft, Eagle3Draft):
            x = draft.midlayer.fused(embeddings, fed, [])[:, -1:]
            best = int(draft.lm_head(draft.norm(x[0, -1])).argmax())
            drafted.append(best + int(draft.d2t[best]))
            own = draft.fed_back(x)
        else:
            assert isinstance(draft, Eagle1Draft)
            own = draft(embeddings, fed, [])[:, -1:]
            drafted.append(int(verifier.lm_head(draft.lm_head_layernorm(own[0, -1])).argmax()))
        fed = torch.cat((fed, own), 1)
    return drafted


@torch.inference_mode()
def accepted_by_step(
    draft: Draft, verifier: Any, prompt: list[int], new: int, chain: int, end: int
) -> list[int]:
    """By step, how many of ``chain`` drafted tokens the verifier accepted.

    Stops once there are ``new`` new tokens, or ``end`` is among them.
    """

    def run(tokens: list[int]) -> tuple[Tensor, list[int]]:
        """The states that the draft reads, and the verifier's next token after each token."""
        output = verifier.model(torch.tensor([tokens]), output_hidden_states=True)
        states = torch.cat([output.hidden_states[layer] for layer in draft.reads], -1)
        return states, verifier.lm_head(output.last_hidden_state[0]).argmax(-1).tolist()

    states, chosen = run(prompt)
    tokens, accepted = [*prompt, chosen[-1]], list[int]()
    while len(tokens) < len(prompt) + new and end not in tokens[len(prompt) :]:
        drafted = drafted_chain(draft, verifier, tokens, states, chain)
        seen, best = run([*tokens, *drafted])
        chosen = best[len(tokens) - 1 :]
        right = next((i for i, token in enumerate(drafted) if token != chosen[i]), chain)
        accepted.append(right)
        tokens += chosen[: right + 1]
        states = seen[:, : len(tokens) - 1]
    return accepted


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("verifier", type=Path)
    parser.add_argument("prompts", type=Path, help="as MT-bench has them; the first turns are put")
    parser.add_argument("drafts", type=Path, nargs="+")
    parser.add_argument("--every", type=int, default=10, help="take one prompt of so many")
    parser.add_argument("--new-tokens", type=int, default=64, help="for each prompt")
    parser.add_argument("--chain", type=int, default=3, help="drafted tokens in a step")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    verifier: Any = AutoModelForCausalLM.from_pretrained(options.verifier, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.verifier)
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines[:: options.every]]
    end = tokenizer.eos_token_id
    figures: dict[str, Any] = {
        "new_tokens": options.new_tokens,
        "chain": options.chain,
        "prompts": [question["question_id"] for question in questions],
        "drafts": {},
    }
    for directory in options.drafts:
        draft, steps = load(directory, verifier), list[list[int]]()
        for question in questions:
            prompt: Any = tokenizer.apply_chat_template(
                [{"role": "user", "content": question["turns"][0]}],
                add_generation_prompt=True,
                return_dict=True,
            )
            accepted = accepted_by_step(
                draft, verifier, prompt["input_ids"], options.new_tokens, options.chain, end
            )
            steps.append(accepted)
        count, total = sum(map(len, steps)), sum(map(sum, steps))
        figures["drafts"][directory.name] = {
            "steps": count,
            "accepted": total,
            "acceptance_length": round(1 + total / count, 4),
        }
        print(directory.name, figures["drafts"][directory.name], flush=True)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
