#!/usr/bin/env bash
# mlx-lm 0.32.2 writes another greedy text with a draft model, under a penalty or with sliding windows.
#
# Drafting should not change greedy text, and for a model with full attention it does not. Two things break that, and
# nothing says so:
#
# - Repetition, presence and frequency penalties look at the last 20 tokens, which at first are the prompt's. With a
#   draft model they are never handed the prompt, but for its last token, and its words may come back at once.
# - Rejected drafts are to be taken out of the caches. A layer with a sliding window cannot give them back once it is
#   full, and then no layer is trimmed, not even those with full attention: the function returns 0, and nobody
#   looks. The model goes on after tokens that it has rejected. Whether caches can be trimmed is asked at the
#   start, when they are empty. (ml-explore/mlx-lm#1427 told of this one, and was closed without a review.)
#
# Here the models are small Llamas with random weights. The draft has full attention; the model's windows are 16
# tokens, if it has any, and the prompt has 15.
#
# Seen: mlx-lm 0.32.2, mlx 0.32.4 on the CPU, Python 3.11; 40 greedy tokens in float32, 3 drafted at a time
#     full attention: same text
#     full attention, repetition penalty: other text
#     full attention, presence penalty: other text
#     full attention, frequency penalty: other text
#     sliding windows: other text
#
# It takes Python 3.11 on Linux. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    annotated-doc==0.0.7 anyio==4.16.0 certifi==2026.10.19.post1 click==8.5.1 filelock==4.3.1 \
    fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 \
    idna==3.20 Jinja2==3.1.6 MarkupSafe==3.0.4 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2 numpy==2.4.6 \
    packaging==26.4 protobuf==7.36.2 PyYAML==6.0.4 regex==2026.11.19 safetensors==0.8.0 \
    sentencepiece==0.2.3 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.24.0 truststore==0.10.5 \
    typing_extensions==4.16.0
cat > "$folder/run.py" <<'PYTHON'
import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.sample_utils import make_logits_processors

mx.set_default_device(mx.cpu)


def llama(seed, **keys):
    mx.random.seed(seed)
    model = Model(
        ModelArgs(
            model_type="llama",
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            **keys,
        )
    )
    random = tree_map(
        lambda it: 0.3 * mx.random.normal(it.shape) if it.ndim > 1 else it, model.parameters()
    )
    model.update(random)
    return model


prompt = mx.array([0, 3, 12, 27, 48, 11, 44, 19, 0, 51, 44, 43, 48, 59, 12])
windows = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
full, sliding, draft = llama(0), llama(0, **windows), llama(1)
for name, model, penalty in [
    ("full attention", full, {}),
    ("full attention, repetition penalty", full, {"repetition_penalty": 2.0}),
    ("full attention, presence penalty", full, {"presence_penalty": 4.0}),
    ("full attention, frequency penalty", full, {"frequency_penalty": 4.0}),
    ("sliding windows", sliding, {}),
]:
    keys = {"max_tokens": 40, "logits_processors": make_logits_processors(**penalty)}
    plain = [token for token, _ in generate_step(prompt, model, **keys)]
    drafted = speculative_generate_step(prompt, model, draft, num_draft_tokens=3, **keys)
    same = [token for token, _, _ in drafted] == plain
    print(f"{name}: {'same' if same else 'other'} text")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
full attention: same text
full attention, repetition penalty: other text
full attention, presence penalty: other text
full attention, frequency penalty: other text
sliding windows: other text
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
