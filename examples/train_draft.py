"""Train the drafts of the examples: for a chat model, from nothing but that model.

The verifier writes its own training data. Its chat template is begun with a few words that people
open a request with, the verifier samples the rest of the request (as in Magpie, arXiv:2406.08464),
and then answers it greedily. While it answers, its hidden states and its likeliest next tokens are
kept: they are what a draft learns from. One layer or two learn to draft from the verifier's states,
in the forms in which research code publishes such drafts:

- eagle1: EAGLE-1's training, one step (arXiv:2401.15077, section 4.2); no fc.bias, float16, .bin.
- hass: the draft learns on its own outputs too, three steps deep, with the attention that it will
  have when it drafts (HASS, arXiv:2408.15766, section 3.2); fc.bias, bfloat16, safetensors.
- layernorms: the same, with the three extra norms of the layernorm variant.
- eagle3: EAGLE-3's training-time test (arXiv:2503.01840, section 3.2), three steps deep: the draft
  reads three of the verifier's states, learns only which token comes next, and has a head over the
  tokens that answers are mostly made of; bfloat16, safetensors, in SafeAILab's layout.
- eagle31: the same with EAGLE-3.1's norms, in SpecForge's layout.
- dflash: seven tokens drafted in one pass, from several of the verifier's states (DFlash,
  arXiv:2602.06036); two layers, bfloat16, safetensors, in z-lab's layout.

A step of hass or layernorms costs three times as much, so these go on from the weights of eagle1
where it was trained in the same run; eagle31 goes on from eagle3's.

It imports nothing of speculators, so that a draft that drafts as well there as it did here shows
that the conversion and the model are right. It wants a GPU: minutes there, days without.
"""

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import dflash, eagle1, eagle3
from training.conversations import OPENERS, Conversations, converse
from training.dflash import DFlashDraft
from training.draft import Draft
from training.eagle1 import Eagle1Draft
from training.eagle3 import Eagle3Draft
from training.loop import train
from training.publishing import dflash_config, draft_config, publish
from training.recipes import RECIPES, Recipe
from training.writing import Keeper


def layers_read(family: str, verifier: Any, states: int) -> tuple[int, ...]:
    """Which of the verifier's states drafts of a family read; ``states`` is for DFlash."""
    if family == "eagle1":
        return eagle1.READS
    if family == "eagle3":
        return eagle3.layers_read(verifier)
    return dflash.layers_read(verifier, states)


def begun(
    verifier: Any,
    tokenizer: Any,
    recipe: Recipe,
    data: list[Conversations],
    options: argparse.Namespace,
    weights: dict[str, Tensor] | None,
) -> Draft:
    """A draft before its training; it goes on from ``weights``, if given."""
    reads = layers_read(recipe.family, verifier, options.states)
    config, sample = draft_config(verifier, recipe), data[len(data) // 2]
    torch.manual_seed(0)
    if recipe.family == "dflash":
        config = dflash_config(verifier, recipe, reads, dflash.mask_token(tokenizer, data))
        draft: Draft = DFlashDraft(config, reads)
    elif recipe.family == "eagle3":
        config |= {"intermediate_size": options.mlp, "draft_vocab_size": options.drafted}
        tokens = eagle3.most_frequent(data, options.drafted, config["vocab_size"])
        draft = Eagle3Draft(config, recipe, reads, tokens)
    else:
        draft = Eagle1Draft(config, recipe)
    draft.to(verifier.device)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    if isinstance(draft, DFlashDraft):
        draft.begin(verifier, sample)
    elif isinstance(draft, Eagle3Draft):
        draft.begin(weights, verifier, sample)
    elif isinstance(draft, Eagle1Draft) and weights:
        draft.start_from(weights, verifier, sample)
    return draft


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("verifier", help="a directory with a chat model")
    parser.add_argument("output", type=Path, help="where the drafts' directories are made")
    parser.add_argument("--gguf", help="the verifier's weights, if they are a GGUF file in there")
    parser.add_argument("--tokenizer", help="where it is, if not in the verifier's directory")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--start-from", type=Path, help="a published draft to go on from")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its peak")
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each draft")
    parser.add_argument(
        "--data-seconds",
        type=float,
        default=60,
        help="of writing conversations; one round at least",
    )
    parser.add_argument("--batch", type=int, default=4096, help="conversations written at a time")
    parser.add_argument("--question", type=int, default=80, help="tokens at most")
    parser.add_argument("--answer", type=int, default=256, help="tokens at most")
    parser.add_argument("--drafted", type=int, default=7168, help="tokens of an EAGLE-3 vocabulary")
    parser.add_argument("--mlp", type=int, default=768, help="width of an EAGLE-3 MLP")
    parser.add_argument(
        "--states", type=int, default=5, choices=(3, 5), help="that a DFlash draft reads"
    )
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main() -> None:
    """Train and publish the drafts."""
    options = parsed()
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)

    torch.manual_seed(0)
    random.seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would build a new plan for each length
    verifier = AutoModelForCausalLM.from_pretrained(
        options.verifier, gguf_file=options.gguf, dtype=torch.float32
    ).to(options.device)
    verifier.requires_grad_(requires_grad=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.verifier)
    say(f"{sum(p.numel() for p in verifier.parameters()) / 1e6:.0f} M parameters")
    writer = copy.deepcopy(verifier).to(torch.bfloat16)
    writer.set_attn_implementation("grouped")
    before = time.perf_counter()
    families = {RECIPES[name].family for name in options.recipes}
    read = {layer for family in families for layer in layers_read(family, verifier, options.states)}
    keep = Keeper(writer, tuple(sorted(read)))
    held_out, data = converse(writer, verifier, tokenizer, options, say, keep)
    del writer, keep
    report: dict[str, Any] = {
        "conversations": sum(map(len, data)),
        "answer_tokens": sum(int(part.size.sum()) for part in data),
        "held_out_conversations": sum(map(len, held_out)),
        "data_seconds": round(time.perf_counter() - before, 1),
        "openers": len(set(OPENERS)) - 1,
    }
    say(f"{report}")
    weights, begun_from = dict[str, dict[str, Tensor]](), dict[str, str]()  # by family
    if options.start_from:
        weights["eagle1"] = torch.load(options.start_from / "pytorch_model.bin")
        begun_from["eagle1"] = options.start_from.name
    for name in options.recipes:
        recipe = RECIPES[name]
        draft = begun(verifier, tokenizer, recipe, data, options, weights.get(recipe.family))

        def save(name: str = name, draft: Draft = draft, recipe: Recipe = recipe) -> None:
            publish(options.output / name, draft, recipe)

        trained = train(draft, verifier, data, held_out, options, say, save)
        report[name] = {"start_from": begun_from.get(recipe.family), **trained}
        save()
        (options.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        say(f"{name}: {report[name]}")
        if name in {"eagle1", "eagle3"}:
            weights[recipe.family] = copy.deepcopy(draft.state_dict())
            begun_from[recipe.family] = name


if __name__ == "__main__":
    main()
