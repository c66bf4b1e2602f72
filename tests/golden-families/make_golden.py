"""Makes the golden vectors of dflash_window, dspark, dspark_gated and dspark_rnn.

They are random tiny float32 drafts, with what public code computes for them on a CPU: PyPI's dflash
0.1.0 for layers of several types, and PyPI's speculators 0.9.0 for DSpark. Run it in an environment
of its own, with torch 2.13.0 (CPU), transformers 5.19.0, and these two (``pip install --no-deps``,
and what importing them asks for; without torchvision, which a CPU build of torch does not go with):

    python make_golden.py FOLDER
"""

# mypy: ignore-errors
# What it imports is not in the environment of the tests.

import json
import sys
from pathlib import Path
from typing import Any

import torch
from dflash.model import DFlashDraftModel
from safetensors.torch import save_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from torch import Tensor
from transformers import Qwen3Config

HIDDEN, VOCABULARY, MASK, CONTEXT = 64, 320, 319, 12
TARGET_LAYERS = [1, 3, 5]
LAYER: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": VOCABULARY,
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw weights that give values of order 1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif "embed_tokens" in name or "markov_w1" in name or name.endswith(".bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            else:
                scale = 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def window(folder: Path) -> None:
    """Layers that slide and layers that do not: causal by type, all of them, and none."""
    generator = torch.Generator().manual_seed(11)
    config: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "torch_dtype": "float32",
        **LAYER,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 5,
        "use_sliding_window": True,
        "is_causal": False,
        "block_size": 8,
        "num_target_layers": 8,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": TARGET_LAYERS},
    }
    states = torch.randn(1, CONTEXT, len(TARGET_LAYERS) * HIDDEN, generator=generator)
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    block = torch.tensor([[17, *[MASK] * 7]])
    positions = torch.arange(CONTEXT + block.shape[1])[None]
    golden = {"target_hidden": states, "block_ids": block, "embed_tokens.weight": embedding}
    tensors: dict[str, Tensor] = {}
    for name, is_causal in (("", False), ("causal_", True), ("mixed_", None)):
        keys = {key: value for key, value in config.items() if key != "is_causal"}
        if is_causal is not None:
            keys["is_causal"] = is_causal
        model = DFlashDraftModel(Qwen3Config(**keys)).eval()
        randomise(model, seed=12)
        golden[f"{name}output_hidden"] = model(
            position_ids=positions, noise_embedding=embedding[block], target_hidden=states
        )
        tensors = dict(model.state_dict())
    write(folder, config, tensors)
    save_file(golden, folder / "golden.safetensors")


@torch.inference_mode()
def dspark(folder: Path, kind: str, *, layers: int, from_anchor: bool, drafted: int) -> None:
    """A DSpark draft with a Markov head of a kind.

    Args:
        folder: to write to.
        kind: of the Markov head.
        layers: how many it has.
        from_anchor: whether the anchor's position drafts a token.
        drafted: how many tokens it can draft.

    """
    generator = torch.Generator().manual_seed(21)
    block_size, rank = 7, 8
    layer = Qwen3Config(**LAYER, num_hidden_layers=layers)
    layer._attn_implementation = "eager"
    config = DSparkSpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=drafted,
        block_size=block_size,
        aux_hidden_state_layer_ids=[layer_id + 1 for layer_id in TARGET_LAYERS],
        mask_token_id=MASK,
        sliding_window_non_causal=False,
        sample_from_anchor=from_anchor,
        markov_rank=rank,
        markov_head_type=kind,
        enable_confidence_head=True,
        confidence_head_with_markov=kind != "rnn",
        speculators_config=SpeculatorsConfig(
            algorithm="dspark",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=block_size)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
        ),
    )
    model = DSparkDraftModel(config).eval()
    randomise(model, seed=22)
    if model.use_draft_vocab:
        tokens = torch.randperm(VOCABULARY, generator=generator)[:drafted].sort().values
        t2d = torch.zeros(VOCABULARY, dtype=torch.bool)
        t2d[tokens] = True
        model.load_vocab_mappings(t2d, tokens - torch.arange(drafted))
    # One anchor at the position CONTEXT of a longer sequence; what follows is not seen.
    length = CONTEXT + 2 * block_size
    states = torch.randn(1, length, len(TARGET_LAYERS) * HIDDEN, generator=generator)
    ids = torch.randint(MASK, (1, length), generator=generator)
    loss_mask = torch.zeros(1, length)
    loss_mask[0, CONTEXT] = 1
    hidden, logits, *_ = model._backbone_forward(
        states,
        ids,
        loss_mask,
        torch.randn(1, length, HIDDEN, generator=generator),
        torch.zeros(1, length, dtype=torch.long),
        max_anchors=1,
    )
    first = 0 if from_anchor else 1
    anchor = ids[:, CONTEXT : CONTEXT + 1]
    states_of, own = hidden[:, first:block_size], logits[:, first:block_size]
    before, conditioned = anchor, own
    for place in range(own.shape[1]):
        so_far = {"prev_token_ids": before, "hidden_states": states_of[:, : place + 1]}
        conditioned = own[:, : place + 1] + model.markov_head.block_bias(**so_far)
        best = conditioned[:, -1:].argmax(-1)
        before = torch.cat((before, best if model.d2t is None else best + model.d2t[best]), 1)
    features = [states_of]
    if config.confidence_head_with_markov:
        features.append(model.markov_head.prev_embeddings(before[:, :-1]))
    golden = {
        "target_hidden": states[:, :CONTEXT],
        "block_ids": torch.cat((anchor, torch.full((1, block_size - 1), MASK)), 1),
        "embed_tokens.weight": model.embed_tokens.weight,
        "lm_head.weight": model.lm_head.weight,
        "output_hidden": hidden,
        "logits": own,
        "conditioned_logits": conditioned,
        "proposed_tokens": before[:, 1:],
        "confidence": model.confidence_head(torch.cat(features, -1)).sigmoid(),
    }
    borrowed = ("embed_tokens.", "verifier_") + (() if model.use_draft_vocab else ("lm_head.",))
    kept = {name: it for name, it in model.state_dict().items() if not name.startswith(borrowed)}
    write(folder, native(config, layers), kept)
    save_file(
        {name: it.contiguous().clone() for name, it in golden.items()},
        folder / "golden.safetensors",
    )


def native(config: DSparkSpeculatorConfig, layers: int) -> dict[str, Any]:
    """The config.json in the flat layout in which DeepSpec publishes such drafts."""
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "torch_dtype": "float32",
        **LAYER,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "num_target_layers": 8,
        "target_layer_ids": TARGET_LAYERS,
        "mask_token_id": MASK,
        "sample_from_anchor": config.sample_from_anchor,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
    }


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    window(root / "dflash_window")
    dspark(root / "dspark", "vanilla", layers=2, from_anchor=True, drafted=200)
    dspark(root / "dspark_gated", "gated", layers=1, from_anchor=False, drafted=VOCABULARY)
    dspark(root / "dspark_rnn", "rnn", layers=1, from_anchor=True, drafted=VOCABULARY)
