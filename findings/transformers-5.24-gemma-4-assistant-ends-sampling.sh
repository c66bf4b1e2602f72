#!/usr/bin/env bash
# transformers 5.24.0 does not sample where Gemma 4's assistant drafts: it takes the likeliest token.
#
# The assistant always drafts its likeliest token. With do_sample the verification takes it for a draw from the
# assistant's distribution, and accepts it with probability p/q. That is one if assistant and target agree: the
# better the assistant knows the target, the less is left of the sampling. (transformers#47932 names it beside
# two other generators; 5.24 has those two right.)
#
# Both models here give four tokens 40, 30, 20 and 10 %, whatever the context: a perfect assistant. It drafts
# the second new token.
#
# Seen: transformers 5.24.0, torch 2.13.0, Python 3.11; the second token of 1000 answers
#     no assistant: 40 %, 30 %, 20 %, 10 %
#     assistant: 100 %, 0 %, 0 %, 0 %
# (rounded to tens)
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
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

SHARES, DRAWS = torch.tensor([0.4, 0.3, 0.2, 0.1]), 1000


def config(shared):
    return Gemma4TextConfig(
        vocab_size=len(SHARES),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=shared,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def give(head, state):
    """Let the output matrix turn the one hidden state there is into SHARES."""
    head.weight.copy_(SHARES.log()[:, None] * state / state.square().sum())


torch.manual_seed(0)
target = Gemma4ForCausalLM(config(0)).eval()
assistant = Gemma4AssistantForCausalLM(
    Gemma4AssistantConfig(text_config=config(2), backbone_hidden_size=32, tie_word_embeddings=False)
).eval()
assistant.generation_config.num_assistant_tokens = 1
prompt = torch.tensor([[0, 1, 2, 3]])
with torch.no_grad():
    target.model.embed_tokens.weight[:] = torch.randn(32)  # one for all, so that no context counts
    give(target.lm_head, target.model(prompt).last_hidden_state[0, 0])
    seen = []
    hook = assistant.model.register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state[0, 0])
    )
    target.generate(prompt, assistant_model=assistant, do_sample=False, max_new_tokens=3)
    hook.remove()
    give(assistant.lm_head, seen[0])
for name, assistance in {"no assistant": {}, "assistant": {"assistant_model": assistant}}.items():
    keys = {"do_sample": True, "top_k": 0, "max_new_tokens": 3} | assistance
    second = torch.stack([target.generate(prompt, **keys)[0, 5] for _ in range(DRAWS)])
    shares = second.bincount(minlength=len(SHARES)) / DRAWS
    print(f"{name}:", ", ".join(f"{10 * round(10 * share)} %" for share in shares.tolist()))
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
no assistant: 40 %, 30 %, 20 %, 10 %
assistant: 100 %, 0 %, 0 %, 0 %
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
