"""Golden DFlash, DFlash 2 and DSpark drafts, and small ones that often predict a tiny verifier."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import Tensors
from speculators.convert.conversion import convert
from speculators.convert.references.dflash import (
    DFlash2Reference,
    DFlashReference,
    DSparkReference,
)
from speculators.models import load_draft
from speculators.models.dflash import (
    DFlash2Speculator,
    DFlash2SpeculatorConfig,
    DFlashSpeculator,
    DFlashSpeculatorConfig,
    DSparkSpeculator,
    DSparkSpeculatorConfig,
)

GOLDEN_FAMILIES = Path(__file__).parent / "golden-families"
NAMES = ("dflash2", "dflash_full", "dflash_window", "dspark", "dspark_gated", "dspark_rnn")
SEQUENTIAL = tuple(name for name in NAMES if name not in {"dflash_full", "dflash_window"})
E2E = "dflash_e2e"
VERIFIER = GOLDEN_FAMILIES / E2E / "verifier"
"""The verifier of ``E2E``. The others fit it; their vectors have other embeddings and heads."""

OF_LAYERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "attention_bias",
    "layer_types",
    "sliding_window",
    "is_causal",
)
"""The keys of a native config that are about the layers."""


def golden(name: str) -> Tensors:
    """The golden vectors of a draft."""
    return load_file(GOLDEN_FAMILIES / name / "golden.safetensors")


def in_format(name: str, directory: Path, layer: Any = None, **keys: Any) -> Path:
    """A golden draft as a directory in the format, written here from what its config says.

    Args:
        name: of the golden draft.
        directory: to create.
        layer: keys of ``transformer_layer_config`` to set.
        **keys: keys of config.json to set.

    """
    directory.mkdir(parents=True)
    native = json.loads((GOLDEN_FAMILIES / name / "config.json").read_text())
    nested = native.get("dflash_config", native)
    kind = name.split("_", maxsplit=1)[0]
    config = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "torch_dtype": "float32",
        "transformer_layer_config": {
            "model_type": "qwen3",
            **{key: native[key] for key in OF_LAYERS if key in native},
            **(layer or {}),
        },
        "draft_vocab_size": native.get("draft_vocab_size", native["vocab_size"]),
        "block_size": native["block_size"],
        "aux_hidden_state_layer_ids": [number + 1 for number in nested["target_layer_ids"]],
        "mask_token_id": nested["mask_token_id"],
        "sliding_window_non_causal": True,
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": native["block_size"] - 1}
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None, "architectures": []},
        },
    }
    more = {
        "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
        "dspark": (
            "sample_from_anchor",
            "markov_rank",
            "markov_head_type",
            "enable_confidence_head",
            "confidence_head_with_markov",
        ),
    }
    config |= {key: nested[key] for key in more.get(kind, ())} | keys
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN_FAMILIES / name / "model.safetensors", directory / "model.safetensors")
    return directory


def lend(draft: Any, g: Tensors) -> Any:
    """Give a draft the embedding and the head that golden vectors were made with."""
    draft.borrowed_embedding = nn.Embedding.from_pretrained(g["embed_tokens.weight"])
    if draft.lm_head is None and "lm_head.weight" in g:
        rows, columns = g["lm_head.weight"].shape
        draft.borrowed_head = nn.Linear(columns, rows, bias=False)
        draft.borrowed_head.weight = nn.Parameter(g["lm_head.weight"])
    return draft.eval()


def convert_golden(name: str, root: Path, **options: Any) -> Path:
    """A golden draft, converted with validation into a folder of ``root``."""
    return convert(GOLDEN_FAMILIES / name, root / name, VERIFIER, options=options)


def golden_draft(name: str, directory: Path, **keys: Any) -> Any:
    """A golden draft in float32, with what it borrows."""
    loaded = load_draft(in_format(name, directory, **keys), dtype="float32")
    return lend(loaded, golden(name))


REFERENCES = {
    DFlashSpeculator: DFlashReference,
    DFlash2Speculator: DFlash2Reference,
    DSparkSpeculator: DSparkReference,
}


def reference_of(draft: DFlashSpeculator) -> Any:
    """The independent computation, with a draft's own tensors."""
    tensors = {name: tensor.detach() for name, tensor in draft.state_dict().items()}
    config: Any = draft.config.checked()
    return REFERENCES[type(draft)](tensors, config)


KINDS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "windows": {
        "layer": {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 5,
            "use_sliding_window": True,
            "is_causal": True,
        },
        "sliding_window_non_causal": False,
    },
    "interleaved": {"layer": {"is_neox_style": False}, "sample_from_anchor": True},
    "dflash2": {"conv_kernel_size": 2, "conv_group_size": 8},
    "vanilla": {"markov_head_type": "vanilla"},
    "gated": {"markov_head_type": "gated", "sample_from_anchor": False},
    "rnn": {"markov_head_type": "rnn"},
}
"""Kinds of drafts, by what their configs say."""


def knowing_dflash(
    verifier: PreTrainedModel,
    kind: str = "dflash",
    *,
    layers: tuple[int, ...] = (1, 2),
    doubt: float = 0.05,
    tokens: list[int] | None = None,
    block_size: int = 5,
) -> Any:
    """A draft that often predicts a tiny verifier whose layers add little to the last embedding.

    Its first layer attends sharply to the position before, and copies what is there: so the
    position after the anchor knows the next token. Those after it know nothing but what the Markov
    head or the selector add: what follows the token before.

    Args:
        verifier: see ``tiny_models.tiny_verifier``.
        kind: a key of ``KINDS``.
        layers: which of its states the draft reads.
        doubt: the scale of all else that it computes.
        tokens: the verifier's tokens that it can predict, ascending; all if not given.
        block_size: the size of a block.

    """
    theirs: Any = verifier.config
    vocabulary, hidden = theirs.vocab_size, theirs.hidden_size
    more = dict(KINDS[kind])
    heads, head_dim = 4, hidden // 4
    layer = {
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "attention_bias": True,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
        **more.pop("layer", {}),
    }
    config_class: type[DFlashSpeculatorConfig] = DFlashSpeculatorConfig
    draft_class: type[DFlashSpeculator] = DFlashSpeculator
    if kind == "dflash2":
        config_class, draft_class = DFlash2SpeculatorConfig, DFlash2Speculator
        more |= {"selector_rank": hidden, "selector_top_k": vocabulary - 3}
    if "markov_head_type" in more:
        config_class, draft_class = DSparkSpeculatorConfig, DSparkSpeculator
        more |= {"markov_rank": hidden}
    torch.manual_seed(7)
    config = config_class(
        transformer_layer_config=layer,
        draft_vocab_size=len(tokens) if tokens else vocabulary,
        block_size=block_size,
        aux_hidden_state_layer_ids=sorted(layers),
        mask_token_id=vocabulary - 1,
        **more,
    )
    draft: Any = draft_class(config)
    embedding: Any = verifier.get_input_embeddings().weight
    head: Any = verifier.get_output_embeddings().weight
    known = tokens or list(range(vocabulary))
    after = nn.functional.rms_norm(embedding, (hidden,))  # what the verifier's head sees of them
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if any(part in name for part in ("o_proj.weight", "down_proj", "kernel_projection")):
                parameter.mul_(doubt)
        attention = draft.layers[0].self_attn
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.fill_(3.0)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(doubt)
            projection.bias.fill_(1.0)
        if not config.sample_from_anchor:
            # Queries are as if turned back by one position.
            cos, sin = draft.rotary_emb(embedding, torch.tensor([[1]]))
            half = head_dim // 2
            turned = torch.cat(((cos + sin)[0, 0, :half], (cos - sin)[0, 0, :half]))
            attention.q_proj.bias.copy_(turned.repeat(heads))
        attention.v_proj.weight.copy_(torch.eye(hidden))
        attention.o_proj.weight.copy_(4 * torch.eye(hidden))
        if draft.lm_head is not None:
            draft.lm_head.weight.copy_(head[known])
            draft.d2t.copy_(torch.tensor(known) - torch.arange(len(known)))
            draft.t2d.zero_()
            draft.t2d[known] = True
    draft.attach_verifier(verifier)
    draft.train(False)
    with torch.no_grad():
        if isinstance(draft, DSparkSpeculator):
            markov, scale = draft.markov_head, 0.05 if kind == "rnn" else 1.0
            markov.markov_w1.weight.copy_(scale * after)
            markov.markov_w2.weight.copy_(10 / scale * head[known])
            if kind == "gated":
                markov.gate_proj.bias.fill_(6.0)
            if kind == "rnn":
                markov.joint_proj.weight.mul_(0.002)
                markov.joint_proj.bias.zero_()
                output = markov.joint_proj.weight[2 * hidden :, hidden : 2 * hidden]
                output.add_(torch.eye(hidden))
        if isinstance(draft, DFlash2Speculator):
            selector = draft.candidate_selector
            selector.predecessor_codebook.copy_(10 * after)
            selector.successor_codebook.copy_(head)
            # What masks after masks give, which is about the same everywhere, gives one.
            states = torch.randn(8, 6, len(layers) * hidden)
            block = torch.full((8, block_size), vocabulary - 1)
            outputs = draft.draft(block, states).last_hidden_state
            assert outputs is not None
            usual = outputs[:, 2:].mean((0, 1))
            selector.hidden_projection.weight.copy_(
                (usual / usual.square().sum()).expand(hidden, -1)
            )
    return draft


def plain_drafting(
    draft: Any, verifier: PreTrainedModel, tokens: list[int], length: int
) -> Callable[[tuple[int, ...]], Tensor]:
    """Log-probabilities of the verifier's tokens after a path, by the reference; no cache."""
    reference = reference_of(draft)
    hidden: Any = verifier(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer] for layer in draft.verifier_layers], -1)[0]
    masks = length + draft.block_size - draft.drafted_per_block - 1
    embedded = draft.get_input_embeddings()(
        torch.tensor([tokens[-1], *[draft.mask_token_id] * masks])
    )
    outputs = reference(embedded, states)[-length:]
    head = None if draft.lm_head is not None else draft.get_output_embeddings().weight
    own = reference.logits(outputs, head)

    def log_probabilities(path: tuple[int, ...]) -> Tensor:
        before = torch.tensor([tokens[-1], *path])
        logits = reference.conditioned(own[: len(before)], outputs[: len(before)], before)[-1]
        scores = torch.full((draft.verifier_vocab_size,), -torch.inf)
        scores[draft.to_verifier(torch.arange(len(logits)))] = logits.log_softmax(-1)
        return scores

    return log_probabilities
