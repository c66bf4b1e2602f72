#!/usr/bin/env bash
# speculators 0.9.0 trains DFlash's sliding windows with another mask than dflash 0.1.0 drafts with.
#
# A DFlash draft predicts a block of tokens after an anchor. In the reference implementation (dflash, by
# the method's authors) a window of 5 is what it is in any sliding-window attention: a slot sees itself and
# the 4 positions before it, so that later slots see less of the context. The trainer counts from the anchor
# instead: every slot sees the 5 context positions before the anchor and the block up to itself, 6 to 9
# positions in a block of 4. A draft that was trained there loses context that it learned to use, from the
# first slot on; the config is the same and nothing says so. With full attention the two agree.
#
# Seen: speculators 0.9.0, dflash 0.1.0, torch 2.13.0, transformers 5.15.0, Python 3.11; one layer, the same
# weights on both sides, block at positions 10 to 13; the last column is the largest difference of outputs
#     full_attention
#       slot 0: trained with context 0-9, drafts with 0-9 | output differs: no
#       slot 1: trained with context 0-9, drafts with 0-9 | output differs: no
#       slot 2: trained with context 0-9, drafts with 0-9 | output differs: no
#       slot 3: trained with context 0-9, drafts with 0-9 | output differs: no
#     sliding_attention
#       slot 0: trained with context 5-9, drafts with 6-9 | output differs: yes
#       slot 1: trained with context 5-9, drafts with 7-9 | output differs: yes
#       slot 2: trained with context 5-9, drafts with 8-9 | output differs: yes
#       slot 3: trained with context 5-9, drafts with 9-9 | output differs: yes
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps torch==2.13.0 \
    Jinja2==3.1.6 MarkupSafe==3.0.4 PyYAML==6.0.4 Pygments==2.21.0 annotated-doc==0.0.7 \
    annotated-types==0.8.0 anyio==4.16.0 certifi==2026.10.19.post1 charset-normalizer==3.5.2 \
    click==8.5.1 datasets==5.0.1 dflash==0.1.0 dill==0.4.1 filelock==4.3.1 fsspec==2026.9.0 \
    h11==0.16.0 hf-xet==1.8.0 hs-connectors==0.9.0 httpcore==1.0.9 httpcore2==2.16.2 \
    httpx==0.28.1 httpx2==2.16.2 huggingface_hub==1.33.0 idna==3.20 loguru==0.7.3 \
    markdown-it-py==4.3.0 mdurl==0.1.2 mpmath==1.3.0 multiprocess==0.70.19 networkx==3.6.1 \
    numpy==2.4.6 openai==3.57.0 packaging==26.4 pandas==3.1.1 pyarrow==26.0.1 pydantic==2.14.4 \
    pydantic_core==2.50.5 python-dateutil==4.0.0 regex==2026.11.19 requests==2.34.2 rich==15.0.0 \
    safetensors==0.8.0 shellingham==1.5.4 sniffio==1.3.1 speculators==0.9.0 sympy==1.14.0 \
    tokenizers==0.22.2 tqdm==4.70.1 transformers==5.15.0 truststore==0.10.5 typer==0.29.2 \
    typing-inspection==0.4.5 typing_extensions==4.16.0 urllib3==2.8.0 xxhash==4.1.0
cat > "$folder/windows.py" <<'PYTHON'
import torch
from dflash import DFlashDraftModel as Reference
from speculators.losses import resolve_loss_config
from speculators.models.dflash import DFlashDraftModel as Trainee
from speculators.models.dflash import DFlashSpeculatorConfig
from transformers import Qwen3Config

LENGTH, ANCHOR, BLOCK, WINDOW, MASK, WIDTH = 16, 10, 4, 5, 31, 32


def layer(kind, **more):
    return Qwen3Config(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=[kind],
        use_sliding_window=True,
        sliding_window=WINDOW,
        **more,
    )


def train(draft, states, tokens):
    """Output of the block in the trainer's forward pass when only one position may become its anchor."""
    outputs = []
    draft.norm.register_forward_hook(lambda module, arguments, output: outputs.append(output[0]))
    anchor = torch.zeros(1, LENGTH)
    anchor[0, ANCHOR] = 1
    draft(
        hidden_states=states,
        input_ids=tokens,
        loss_mask=anchor,
        verifier_last_hidden_states=torch.zeros(1, LENGTH, WIDTH),
        document_ids=torch.zeros(1, LENGTH, dtype=torch.long),
        loss_config=resolve_loss_config("kl_div", "eager"),
        max_anchors=1,
    )
    return outputs[0]


def serve(draft, embed, states, tokens):
    """Output of the same block in the reference implementation."""
    block = torch.full((1, BLOCK), MASK)
    block[0, 0] = tokens[0, ANCHOR]
    return draft(
        target_hidden=states[:, :ANCHOR],
        noise_embedding=embed(block),
        position_ids=torch.arange(ANCHOR + BLOCK)[None],
    )[0]


def context(output, states):
    """First and last position of the context that an output depends on."""
    (slope,) = torch.autograd.grad(output.sum(), states, retain_graph=True)
    positions = slope[0].abs().sum(-1).nonzero().flatten().tolist()
    assert positions == list(range(positions[0], positions[-1] + 1))
    return f"{positions[0]}-{positions[-1]}"


for kind in ("full_attention", "sliding_attention"):
    torch.manual_seed(0)
    trainee = Trainee(
        DFlashSpeculatorConfig(
            transformer_layer_config=layer(kind, attn_implementation="eager"),
            draft_vocab_size=32,
            block_size=BLOCK,
            aux_hidden_state_layer_ids=[1],
            mask_token_id=MASK,
        )
    ).eval()
    for weight in trainee.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    draft_keys = {"target_layer_ids": [0], "mask_token_id": MASK, "block_size": BLOCK}
    reference = Reference(layer(kind, num_target_layers=4, dflash_config=draft_keys)).eval()
    assert not reference.load_state_dict(trainee.state_dict(), strict=False).missing_keys
    states = torch.randn(1, LENGTH, WIDTH, requires_grad=True)
    tokens = torch.randint(MASK, (1, LENGTH))
    trained = train(trainee, states, tokens)
    served = serve(reference, trainee.embed_tokens, states, tokens)
    print(kind)
    for slot in range(BLOCK):
        gap = (trained[slot] - served[slot]).abs().max().item()
        differs = "no" if gap < 1e-5 else "yes" if gap > 0.1 else f"{gap}"
        print(
            f"  slot {slot}: trained with context {context(trained[slot], states)}, "
            f"drafts with {context(served[slot], states)} | output differs: {differs}"
        )
PYTHON
(cd "$folder" && venv/bin/python windows.py 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
full_attention
  slot 0: trained with context 0-9, drafts with 0-9 | output differs: no
  slot 1: trained with context 0-9, drafts with 0-9 | output differs: no
  slot 2: trained with context 0-9, drafts with 0-9 | output differs: no
  slot 3: trained with context 0-9, drafts with 0-9 | output differs: no
sliding_attention
  slot 0: trained with context 5-9, drafts with 6-9 | output differs: yes
  slot 1: trained with context 5-9, drafts with 7-9 | output differs: yes
  slot 2: trained with context 5-9, drafts with 8-9 | output differs: yes
  slot 3: trained with context 5-9, drafts with 9-9 | output differs: yes
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
