#!/usr/bin/env bash
# transformers 5.24.0 returns hidden states of the prompt as those of generated tokens.
#
# generate() can return the hidden states of every token (output_hidden_states). With an assistant or prompt
# lookup, the first forward pass covers the prompt and the drafted tokens. The states of the drafted tokens that
# were accepted in it are then read from the start of that pass: they are those of the first tokens of the
# prompt. Shapes and count are right, and so are the tokens, logits and all later passes. Whoever collects
# states that way, to train a draft or a probe, gets wrong pairs, the more the better the assistant is.
#
# Seen: transformers 5.24.0, torch 2.13.0, Python 3.11; a prompt of 8 tokens (positions 0 to 7), 6 new ones
#     no assistant: states of positions 8 9 10 11 12
#     assistant: states of positions 0 1 2 3 4
#     prompt lookup: states of positions 0 1 2 3 4
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 anyio==4.16.0 filelock==4.3.1 fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 \
    httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 MarkupSafe==3.0.4 \
    mpmath==1.3.0 networkx==3.6.1 numpy==2.4.6 packaging==26.4 PyYAML==6.0.4 regex==2026.11.19 \
    safetensors==0.8.0 sympy==1.14.0 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.24.0 \
    truststore==0.10.5 typing_extensions==4.16.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NEW = 6

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
).eval()
model.generation_config.num_assistant_tokens = NEW
model.generation_config.assistant_confidence_threshold = 0
with torch.no_grad():  # let it count, so that prompt lookup has something to find
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.1)
        layer.mlp.down_proj.weight.mul_(0.1)
    model.lm_head.weight[:] = model.model.embed_tokens.weight[torch.arange(64) - 1]
prompt = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 4]])
for name, assistance in {
    "no assistant": {},
    "assistant": {"assistant_model": model},
    "prompt lookup": {"prompt_lookup_num_tokens": NEW, "max_matching_ngram_size": 1},
}.items():
    made = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_hidden_states=True,
        **assistance,
    )
    right = model(made.sequences, output_hidden_states=True).hidden_states[-1][0]
    gaps = [(right - step[-1][0, 0]).abs().amax(-1) for step in made.hidden_states[1:]]
    assert all(gap.min() < 1e-4 for gap in gaps)
    print(f"{name}: states of positions", *(int(gap.argmin()) for gap in gaps))
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
no assistant: states of positions 8 9 10 11 12
assistant: states of positions 0 1 2 3 4
prompt lookup: states of positions 0 1 2 3 4
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
