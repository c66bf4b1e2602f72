"""Golden EAGLE-3 drafts, and small ones that often predict a tiny verifier correctly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from helpers import Tensors, save_quietly
from speculators.convert.conversion import convert
from speculators.convert.references.eagle3 import Eagle3Reference
from speculators.models.eagle3 import Eagle3Speculator, Eagle3SpeculatorConfig, PEagleSpeculator

GOLDEN3 = Path(__file__).parent / "golden-eagle3"
TARGET = GOLDEN3 / "_target"
"""The verifier of all golden drafts but ``target_hidden_48``."""

NAMES = sorted(path.parent.name for path in GOLDEN3.glob("*/golden.safetensors"))
PARALLEL = "peagle_speculators"
CHAINS = [name for name in NAMES if name != PARALLEL]
TREES = [name for name in CHAINS if name != "speculators_qwen3_2layer"]

OPTIONS: dict[str, dict[str, Any]] = {
    "eagle31_specforge": {"norm_output": "feedback"},
    "modelopt_4aux": {"aux_numbering": "output"},
}
"""What a user has to say about a golden draft to convert it."""


def golden3(name: str) -> Tensors:
    """The golden vectors of a draft."""
    return load_file(GOLDEN3 / name / "golden.safetensors")


def convert_golden3(name: str, root: Path, *, validate: bool = True, **options: Any) -> Path:
    """A golden draft, converted into a folder of ``root``."""
    source, output, verifier = root / "source", root / "out", TARGET
    source.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN3 / name / file, source / file)
    width = json.loads((source / "config.json").read_text()).get("target_hidden_size")
    if width is not None:
        verifier = save_quietly(narrow_verifier(width), root / "verifier")
    options = OPTIONS.get(name, {}) | options
    return convert(source, output, verifier, options=options, validate=validate)


def narrow_verifier(width: int) -> PreTrainedModel:
    """A verifier like ``TARGET``, of another width."""
    torch.manual_seed(4)
    sizes = json.loads((TARGET / "config.json").read_text())
    config = LlamaConfig(**(sizes | {"hidden_size": width, "head_dim": 12}))
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def knowing_eagle3(
    verifier: PreTrainedModel,
    *,
    layers: tuple[int, ...] = (1, 2, 0),
    doubt: float = 0.05,
    parallel: bool = False,
    tokens: list[int] | None = None,
    **config: Any,
) -> Eagle3Speculator:
    """A draft that passes on the embedding, like a tiny verifier whose layers add little.

    Its first layer attends sharply to its own position, by biases on queries and keys, since RoPE
    turns those of other positions away.

    Args:
        verifier: see ``tiny_models.tiny_verifier``.
        layers: which of its states the draft reads.
        doubt: the scale of all else that it computes.
        parallel: whether it is a P-EAGLE draft.
        tokens: the verifier's tokens that it can predict, ascending; six of seven if not given.
        **config: further keys of its config.

    """
    theirs: Any = verifier.config
    vocabulary, hidden = theirs.vocab_size, theirs.hidden_size
    tokens = tokens or [t for t in range(vocabulary) if t % 7]
    kind: dict[str, Any] = {"speculators_model_type": "eagle3"}
    if parallel:
        kind = {"speculators_model_type": "peagle", "mask_token_id": vocabulary - 1}
    torch.manual_seed(6)
    settings = Eagle3SpeculatorConfig(
        transformer_layer_config={
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "initializer_range": 0.3,
        },
        draft_vocab_size=len(tokens),
        eagle_aux_hidden_state_layer_ids=sorted(layers),
        **kind,
        **config,
    )
    draft = (PEagleSpeculator if parallel else Eagle3Speculator)(settings)
    embedding: Any = verifier.get_input_embeddings().weight
    head: Any = verifier.get_output_embeddings().weight
    first: Any = draft.layers[0]
    attention = first.self_attn
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "o_proj" in name or "down_proj" in name or name == "fc.weight":
                parameter.mul_(doubt)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight *= doubt
            projection.bias.fill_(6.0)
        attention.v_proj.weight.zero_()
        attention.v_proj.weight[:, :hidden] = torch.eye(hidden)
        attention.o_proj.weight.copy_(torch.eye(hidden))
        assert draft.embed_tokens is not None
        assert draft.lm_head is not None
        draft.embed_tokens.weight.copy_(embedding)
        draft.lm_head.weight.copy_(head[tokens])
        if draft.mask_hidden is not None:
            draft.mask_hidden.normal_()
        if draft.d2t is not None and draft.t2d is not None:
            draft.d2t.copy_(torch.tensor(tokens) - torch.arange(len(tokens)))
            draft.t2d.zero_()
            draft.t2d[tokens] = True
    draft.attach_verifier(verifier)
    draft.train(False)
    return draft


def reference_of(draft: Eagle3Speculator) -> Eagle3Reference:
    """The independent computation, with a draft's own tensors."""
    tensors = {name: tensor.detach() for name, tensor in draft.state_dict().items()}
    config: Any = draft.config.checked()
    return Eagle3Reference(tensors, config)


def plain_drafting(
    draft: Eagle3Speculator, verifier: PreTrainedModel, tokens: list[int]
) -> Callable[[tuple[int, ...]], Tensor]:
    """Log-probabilities of the verifier's tokens after a path, by the reference; no cache."""
    reference = reference_of(draft)
    hidden = verifier(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer] for layer in draft.verifier_layers], -1)[0]
    embedding: Any = draft.get_input_embeddings()
    fed_back: dict[tuple[int, ...], Tensor] = {}

    def log_probabilities(path: tuple[int, ...]) -> Tensor:
        embedded = embedding(torch.tensor([*tokens[1:], *path]))
        if draft.config.parallel:
            mask = embedding(torch.tensor(draft.config.mask_token_id))
            embedded = embedded[: len(states)]
            logits = reference.slots(embedded, states, mask, len(path) + 1)[-1]
        else:
            before = [fed_back[path[:n]] for n in range(len(path))]
            x = torch.stack([*reference.project(states), *before])
            fed_back[path] = reference.recur(embedded, x)[-1]
            logits = reference.logits(fed_back[path])
        scores = torch.full((draft.verifier_vocab_size,), -torch.inf)
        scores[draft.to_verifier(torch.arange(len(logits)))] = logits.log_softmax(-1)
        return scores

    return log_probabilities
