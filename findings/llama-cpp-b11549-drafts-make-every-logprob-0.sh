#!/usr/bin/env bash
# llama.cpp b11549 gives every token after a draft the log-probability 0, accepted or not.
#
# With "logprobs", llama-server's answer has the log-probability of every token, and the likeliest ones beside
# it. Of tokens that come out of a step with a draft, it has neither: it reports 0, that is certainty, and an
# empty top_logprobs (tools/server/server-context.cpp: "TODO: set result.probs"), even where the draft was
# rejected and the model drew the token. The text is right. No error, no warning; whoever sums log-probabilities
# gets a perplexity of almost 1. (Reported as ggml-org/llama.cpp issue 27972.)
#
# Here a random Llama of one layer answers greedily, with itself and with another as its draft.
#
# Seen: xllamacpp 2026.10.11549 (llama.cpp b11549, its server), gguf 0.19.0, Python 3.11, on a CPU
#     no draft: 0 accepted; of 40 tokens 40 below 0, 40 with top_logprobs
#     the model as its draft: 28 accepted; of 40 tokens 1 below 0, 1 with top_logprobs
#     another: 0 accepted; of 40 tokens 2 below 0, 2 with top_logprobs
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
HIDDEN, HEADS, HEAD, WIDTH, LENGTH = 64, 2, 32, 96, 40
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


def write(name, seed):
    """A random Llama of one layer."""
    file = GGUFWriter(name, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "rope.dimension_count": HEAD,
    }.items():
        file.add_uint32(f"llama.{key}", value)
    file.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2")
    file.add_token_list([*WORDS, "<end>"])
    file.add_token_types([TokenType.NORMAL] * len(WORDS) + [TokenType.CONTROL])
    file.add_token_merges(["a b"])
    file.add_eos_token_id(len(WORDS))
    random = np.random.default_rng(seed)
    for tensor, shape in SHAPES.items():
        file.add_tensor(tensor, (random.standard_normal(shape) * 0.15).astype(np.float32))
    for tensor in NORMS:
        file.add_tensor(tensor, np.ones(HIDDEN, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def answer(draft):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = "model.gguf"
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.fit_params = False
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = 1
    if draft is not None:
        kind = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE
        parameters.speculative.types = [kind]
        parameters.speculative.draft.mparams.path = draft
        parameters.speculative.draft.cpuparams.n_threads = 1
    request = {
        "prompt": [0, 1, 2],
        "max_tokens": LENGTH,
        "temperature": 0.0,
        "logprobs": 1,
        "logit_bias": [[len(WORDS), False]],
    }
    found = xllamacpp.Server(parameters).handle_completions(request)
    choice = found["choices"][0]
    return choice["text"], choice["logprobs"]["content"], found["timings"].get("draft_n_accepted", 0)


write("model.gguf", 0)
write("other.gguf", 1)
plain, *_ = answer(None)
for name, draft in {"no draft": None, "the model as its draft": "model.gguf", "another": "other.gguf"}.items():
    text, tokens, accepted = answer(draft)
    assert text == plain
    below = sum(token["logprob"] < 0 for token in tokens)
    alternatives = sum(len(token["top_logprobs"]) for token in tokens)
    print(f"{name}: {accepted} accepted; of {len(tokens)} tokens {below} below 0, {alternatives} with top_logprobs")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
no draft: 0 accepted; of 40 tokens 40 below 0, 40 with top_logprobs
the model as its draft: 28 accepted; of 40 tokens 1 below 0, 1 with top_logprobs
another: 0 accepted; of 40 tokens 2 below 0, 2 with top_logprobs
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
