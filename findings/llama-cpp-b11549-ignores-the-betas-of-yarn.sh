#!/usr/bin/env bash
# llama.cpp b11549 computes YaRN with its own betas and attention factor, whatever a GGUF says.
#
# convert_hf_to_gguf.py writes rope.scaling.yarn_beta_fast, yarn_beta_slow and yarn_attn_factor
# (conversion/base.py, from beta_fast, beta_slow and attention_factor of config.json). Only the loaders of Grok
# and Mistral 3 read them (src/models/*.cpp of b11434): for all other models, EAGLE-3 and DFlash drafts
# among them, the betas are 32 and 1, and the attention factor is that of the scaling factor. --yarn-beta-fast
# and --yarn-beta-slow work; --yarn-attn-factor is overwritten (src/llama-context.cpp). No error, no warning.
#
# Here a random Llama of one layer continues 200 tokens greedily.
#
# Seen: xllamacpp 2026.10.11549 (llama.cpp b11549, its server), gguf 0.19.0, Python 3.11, on a CPU
#     betas in the file: the answer is as without
#     betas as options: the answer is another
#     attention factor in the file: the answer is as without
#     attention factor as an option: the answer is as without
#
# It takes Python 3.11 on Linux. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    certifi==2026.10.19.post1 charset-normalizer==3.5.3 gguf==0.19.0 idna==3.20 numpy==2.4.6 PyYAML==6.0.4 \
    requests==2.34.2 tqdm==4.70.1 urllib3==2.8.0 xllamacpp==2026.10.11549
cat > "$folder/run.py" <<'PYTHON'
import string

import numpy as np
import xllamacpp
from gguf import GGUFWriter, TokenType

WORDS = string.ascii_letters
HIDDEN, HEADS, HEAD, WIDTH, TRAINED, FACTOR = 64, 2, 32, 96, 64, 4.0
SHAPES = {
    "token_embd.weight": (len(WORDS) + 1, HIDDEN),
    "output.weight": (len(WORDS) + 1, HIDDEN),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate.weight": (WIDTH, HIDDEN),
    "blk.0.ffn_up.weight": (WIDTH, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, WIDTH),
}
NORMS = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")


def write(name, **yarn):
    """A random model with YaRN, under the keys that convert_hf_to_gguf.py writes."""
    file = GGUFWriter(name, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": int(TRAINED * FACTOR),
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "rope.dimension_count": HEAD,
        "rope.scaling.original_context_length": TRAINED,
    }.items():
        file.add_uint32(f"llama.{key}", value)
    file.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    file.add_float32("llama.rope.freq_base", 10000.0)
    file.add_string("llama.rope.scaling.type", "yarn")
    file.add_float32("llama.rope.scaling.factor", FACTOR)
    for key, value in yarn.items():
        file.add_float32(f"llama.rope.scaling.yarn_{key}", value)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2")
    file.add_token_list([*WORDS, "<end>"])
    file.add_token_types([TokenType.NORMAL] * len(WORDS) + [TokenType.CONTROL])
    file.add_token_merges(["a b"])
    file.add_eos_token_id(len(WORDS))
    random = np.random.default_rng(0)
    for tensor, shape in SHAPES.items():
        file.add_tensor(tensor, (random.standard_normal(shape) * 0.3).astype(np.float32))
    for tensor in NORMS:
        file.add_tensor(tensor, np.ones(HIDDEN, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def answer(name, **options):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = name
    parameters.n_ctx = int(TRAINED * FACTOR)
    parameters.n_parallel = 1
    parameters.fit_params = False
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = 1
    for key, value in options.items():
        setattr(parameters, f"yarn_{key}", value)
    prompt = np.random.default_rng(1).integers(0, len(WORDS), 200).tolist()
    request = {"prompt": prompt, "max_tokens": 40, "temperature": 0.0}
    return xllamacpp.Server(parameters).handle_completions(request)["choices"][0]["text"]


BETAS, FACTORS = {"beta_fast": 4.0, "beta_slow": 2.0}, {"attn_factor": 2.0}
write("plain.gguf")
write("betas.gguf", **BETAS)
write("factor.gguf", **FACTORS)
plain = answer("plain.gguf")
for what, found in {
    "betas in the file": answer("betas.gguf"),
    "betas as options": answer("plain.gguf", **BETAS),
    "attention factor in the file": answer("factor.gguf"),
    "attention factor as an option": answer("plain.gguf", **FACTORS),
}.items():
    print(f"{what}: the answer is {'as without' if found == plain else 'another'}")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
betas in the file: the answer is as without
betas as options: the answer is another
attention factor in the file: the answer is as without
attention factor as an option: the answer is as without
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
