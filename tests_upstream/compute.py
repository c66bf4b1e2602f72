"""Load drafts with the PyPI project speculators, and let it compute: a process in its environment.

    python compute.py RESULT

A job arrives as JSON on standard input: name → a directory and the file of its golden vectors. The
result is a file of safetensors with the logits by that name; its metadata say why a draft could not
be loaded.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators.losses import resolve_loss_config
from speculators.models.peagle import core as peagle
from torch import Tensor

from speculators import SpeculatorModel

STEPS = 4
LATER = STEPS - 1

# An embedding that a draft lacks is taken from the verifier if what happens to lie in memory has a
# NaN, and otherwise stays that (0.9.0). Now new memory is filled with NaN.
torch.use_deterministic_algorithms(True)


def load(directory: str) -> Any:
    config = SpeculatorModel.config_class.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"  # the default one needs a GPU
    model = SpeculatorModel.from_pretrained(directory, config=config, dtype=torch.float32)
    return model.eval()


def logits_of(model: Any, golden: dict[str, Tensor]) -> Tensor:
    """The logits of the tokens that are drafted, (steps, draft vocabulary), by its training.

    A chain is its training-time test with the golden tokens. P-EAGLE trains on slots that it draws;
    here they are those of one pass after the whole prompt.
    """
    found: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _, __, output: found.append(output[0]))
    parallel = "parallel_logits" in golden
    tokens, states = golden["input_ids"][:, 1:], golden["aux_hidden"]
    length = tokens.shape[1]
    later = tokens.new_zeros(LATER) if parallel else golden["chain_target_ids"][:LATER]
    tokens = torch.cat((tokens, later[None]), 1)
    states = torch.cat((states, states.new_zeros(1, LATER, states.shape[2])), 1)
    document = torch.zeros_like(tokens)
    if not parallel:
        model(states, tokens, document, ttt_steps=STEPS)
        return torch.stack([step[length - 1] for step in found])
    last, slots = length - 1, torch.arange(1, STEPS)
    anchors = torch.cat((torch.arange(length), torch.full_like(slots, last)))
    depths = torch.cat((torch.zeros(length, dtype=torch.int64), slots))
    peagle.generate_cod_sample_indices = lambda **_: (anchors, depths)
    model(
        states,
        tokens,
        document,
        verifier_last_hidden_states=states.new_zeros(1, length + LATER, model.hidden_size),
        loss_config=resolve_loss_config("kl_div", "eager"),
        num_depths=STEPS,
    )
    return found[0][last:]


@torch.no_grad()
def main(result: Path) -> None:
    found: dict[str, Tensor] = {}
    errors: dict[str, str] = {}
    for name, (directory, golden) in json.load(sys.stdin).items():
        try:
            model = load(directory)
        except Exception as error:  # whatever it is, it is the result
            errors[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = logits_of(model, load_file(golden)).contiguous()
    save_file(found, result, metadata=errors)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
