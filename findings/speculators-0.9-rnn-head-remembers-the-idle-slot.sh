#!/usr/bin/env bash
# speculators 0.9.0 starts the memory of DSpark's rnn head one slot earlier than SGLang 0.5.23 does.
#
# DSpark adds to the logits of each slot of a block a bias that depends on the token before; with
# markov_head_type "rnn" also on a state that runs through the block. With sample_from_anchor false, slot 0
# (the anchor) predicts nothing. SGLang drops it and begins with a state of zeros at slot 1. The trainer runs
# its state through slot 0 as well, so that slot 1 was trained with a state that SGLang never gives it. Same
# weights, same hidden states, same tokens: every bias differs. With sample_from_anchor true they are equal,
# and so are the biases of a head without a state.
#
# Seen: speculators 0.9.0, sglang 0.5.23 (its heads and its drafting loop, cut out of its files, which import
# GPU kernels), torch 2.13.0, transformers 5.19.0, Python 3.11; blocks of 4
#     gated, sample_from_anchor False | bias differs in slots: none
#     rnn, sample_from_anchor True | bias differs in slots: none
#     rnn, sample_from_anchor False | bias differs in slots: 1 2 3
# (by 0.29, 0.15 and 0.11 there; elsewhere by less than 1e-7)
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 certifi==2026.10.19.post1 \
    charset-normalizer==3.5.2 click==8.5.1 datasets==5.0.1 dill==0.4.1 filelock==4.3.1 \
    fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 hs-connectors==0.9.0 httpcore2==2.16.2 \
    httpcore==1.0.9 httpx2==2.16.2 httpx==0.28.1 huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 \
    loguru==0.7.3 markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0 \
    multiprocess==0.70.19 networkx==3.6.1 numpy==2.4.6 openai==3.57.0 packaging==26.4 pandas==3.1.1 \
    pyarrow==26.0.1 pydantic==2.14.4 pydantic_core==2.50.5 Pygments==2.21.0 python-dateutil==4.0.0 \
    PyYAML==6.0.4 regex==2026.11.19 requests==2.34.2 rich==15.0.0 safetensors==0.8.0 sglang==0.5.23 \
    shellingham==1.5.4 sniffio==1.3.1 speculators==0.9.0 sympy==1.14.0 tokenizers==0.23.3 \
    tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 \
    typing_extensions==4.16.0 urllib3==2.8.0 xxhash==4.1.0
cat > "$folder/run.py" <<'PYTHON'
import ast
import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Optional, Tuple

import torch
from speculators.losses import resolve_loss_config
from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config

LENGTH, ANCHOR, BLOCK, MASK, WIDTH, RANK = 16, 8, 4, 31, 32, 8


class PickLargest:
    """In place of SGLang's GPU kernel for the last step: at temperature 0 it takes the largest logit."""

    @staticmethod
    def execute(*, base_logits, bias, **_):
        return (base_logits + bias).argmax(-1)


sglang = dict(
    ABC=ABC,
    abstractmethod=abstractmethod,
    Optional=Optional,
    Tuple=Tuple,
    torch=torch,
    nn=nn,
    F=functional,
    MarkovSampleStep=PickLargest,
    SpecTpSyncSite=SimpleNamespace(DSPARK_DRAFT=None),
)
folder = Path(importlib.util.find_spec("sglang").submodule_search_locations[0], "srt")
for file, names in {
    "models/dspark.py": "BaseDSparkMarkovHead VanillaMarkov GatedMarkovHead RNNHead build_markov_head",
    "speculative/dspark_components/dspark_draft.py": "select_draft_hidden_without_anchor"
    " _draft_step draft_markov_block",
}.items():
    tree = ast.parse((folder / file).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names.split()]
    exec(compile("from __future__ import annotations\n" + ast.unparse(tree), file, "exec"), sglang)


def train(head_type, from_anchor):
    """Run the trainer's forward pass on one block: its Markov head, hidden states, tokens and bias."""
    draft = DSparkDraftModel(
        DSparkSpeculatorConfig(
            transformer_layer_config=Qwen3Config(
                vocab_size=32,
                hidden_size=WIDTH,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                attn_implementation="eager",
            ),
            draft_vocab_size=32,
            block_size=BLOCK,
            aux_hidden_state_layer_ids=[1],
            mask_token_id=MASK,
            markov_rank=RANK,
            markov_head_type=head_type,
            sample_from_anchor=from_anchor,
            enable_confidence_head=False,
            confidence_head_with_markov=False,
        )
    )
    for weight in draft.parameters():
        nn.init.normal_(weight, std=0.3)
    head, seen = draft.markov_head, {}
    block_bias = head.block_bias

    def watched(**inputs):
        seen.update(inputs, bias=block_bias(**inputs))
        return seen["bias"]

    head.block_bias = watched
    anchor = torch.zeros(1, LENGTH)
    anchor[0, ANCHOR] = 1
    tokens = torch.randint(MASK, (1, LENGTH))
    draft(
        hidden_states=torch.randn(1, LENGTH, WIDTH),
        input_ids=tokens,
        loss_mask=anchor,
        verifier_last_hidden_states=torch.zeros(1, LENGTH, WIDTH),
        document_ids=torch.zeros(1, LENGTH, dtype=torch.long),
        loss_config=resolve_loss_config("kl_div", "eager"),
        tv_loss_fn=resolve_loss_config("tv", "eager")["tv"][0],
        max_anchors=1,
    )
    return head, seen["hidden_states"], tokens[:, ANCHOR:], seen["bias"]


def serve(head, head_type, from_anchor, hidden, tokens):
    """The bias that SGLang adds in each step when it drafts the same tokens from the same block."""
    served = sglang["build_markov_head"](
        SimpleNamespace(
            markov_rank=RANK, markov_head_type=head_type, vocab_size=32, hidden_size=WIDTH
        )
    )
    served.load_state_dict(head.state_dict())
    biases, step_bias = [], served.step_bias

    def watched(*arguments, **inputs):
        bias, state = step_bias(*arguments, **inputs)
        biases.append(bias)
        return bias, state

    served.step_bias = watched
    if not from_anchor:
        _, hidden = sglang["select_draft_hidden_without_anchor"](
            hidden.flatten(0, 1), bs=1, gamma=BLOCK - 1
        )
    steps = hidden.shape[1]
    drafted, _ = sglang["draft_markov_block"](
        markov_head=served,
        base_logits=1e4 * functional.one_hot(tokens[:, 1 : steps + 1], 32).float(),
        anchor_tokens=tokens[:, 0],
        draft_hidden=hidden,
        step_temperatures=torch.zeros(1),
        noise=SimpleNamespace(key=None, offset=torch.zeros(1)),
        tp_sync=SimpleNamespace(sync=lambda site, chosen: chosen),
        logits_out=torch.empty(1, steps, 32),
    )
    assert torch.equal(drafted, tokens[:, 1 : steps + 1])
    return torch.stack(biases, 1)


for head_type, from_anchor in (("gated", False), ("rnn", True), ("rnn", False)):
    torch.manual_seed(0)
    with torch.no_grad():
        head, hidden, tokens, trained = train(head_type, from_anchor)
        served = serve(head, head_type, from_anchor, hidden, tokens)
    first = BLOCK - served.shape[1]
    gaps = (trained[0, first:] - served[0]).abs().amax(-1).tolist()
    assert all(gap < 1e-5 or gap > 0.01 for gap in gaps), gaps
    slots = [str(slot) for slot, gap in enumerate(gaps, start=first) if gap > 0.01]
    print(
        f"{head_type}, sample_from_anchor {from_anchor} | bias differs in slots: "
        f"{' '.join(slots) or 'none'}"
    )
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
gated, sample_from_anchor False | bias differs in slots: none
rnn, sample_from_anchor True | bias differs in slots: none
rnn, sample_from_anchor False | bias differs in slots: 1 2 3
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
