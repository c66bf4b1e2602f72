#!/usr/bin/env bash
# transformers 5.24.0 writes another greedy text under guidance_scale once something drafts.
#
# For classifier-free guidance, a logits processor runs the model on the negative prompt too. It keeps a cache of
# that, which grows by one token at every call. Plain decoding calls it once per token. Prompt lookup calls it to
# find out which drafts are forbidden, an assistant calls it while it drafts, and verification once per drafted
# token, rejected ones too; the cache is never cropped. From then on the unconditional branch has read a text that
# nobody wrote. Drafting should not change greedy text, and without guidance it does not. Nothing warns.
#
# Seen: transformers 5.24.0, torch 2.13.0, Python 3.11; 30 greedy tokens in float64; the assistant is the model
#     guidance_scale 1: prompt lookup same text, assistant same text
#     guidance_scale 1.5: prompt lookup other text, assistant other text
#     guidance_scale 3: prompt lookup other text, assistant other text
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
)
model = model.eval().double()
prompt, negative = torch.tensor([[5, 6, 7, 8] * 4]), torch.tensor([[9, 10, 11]])
drafting = {"prompt lookup": {"prompt_lookup_num_tokens": 4}, "assistant": {"assistant_model": model}}
for scale in (1, 1.5, 3):
    keys = {
        "do_sample": False,
        "max_new_tokens": 30,
        "guidance_scale": scale,
        "negative_prompt_ids": negative,
    }
    plain = model.generate(prompt, **keys)
    seen = [
        f"{name} {'same' if model.generate(prompt, **keys, **more).equal(plain) else 'other'} text"
        for name, more in drafting.items()
    ]
    print(f"guidance_scale {scale}:", ", ".join(seen))
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
guidance_scale 1: prompt lookup same text, assistant same text
guidance_scale 1.5: prompt lookup other text, assistant other text
guidance_scale 3: prompt lookup other text, assistant other text
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
