#!/usr/bin/env bash
# llama.cpp b11549 decides about all drafts after the first rejected one by the same random numbers.
#
# With --spec-draft-sampling probabilistic, llama-server accepts a drafted token with the probability
# min(1, p/q), else draws from what p has more than q, so that the text has the model's distribution. Of a model
# whose state cannot go back by some tokens, such as Qwen3-Next, a rejection restores a checkpoint, and the
# sampler with it, and evaluates the accepted tokens again. They are not decided about again
# (tools/server/server-context.cpp, server_accept_replay), so the random numbers that were used stay to be used
# for the next draft: the same number rejects it, and the same token replaces it, again and again. No error, no
# warning.
#
# Here the model and its MTP ignore the context, so that what is right is known: of 48 letters the model gives
# 12 twenty times the probability of the others, so the commonest has 7 % of the text. With sampled drafts it has
# 26 to 53 %. With the seed 1 half of the text is F, which has a probability of 0.4 %: "...FeFhFKFdFIFhFaFkFp".
# Qwen3.5 has the same layers, but llama.cpp keeps the states after its last tokens: there it is right. So are
# drafts that are not sampled, which is the default.
#
# Seen: xllamacpp 2026.10.11549 (llama.cpp b11549, its server), gguf 0.19.0, Python 3.11, on a CPU. b11434 does
# the same.
#     qwen3next, no drafts: share of the commonest letter right
#     qwen3next, greedy drafts: share of the commonest letter right
#     qwen3next, probabilistic drafts: share of the commonest letter at least 3 times too large
#     qwen35moe, no drafts: share of the commonest letter right
#     qwen35moe, greedy drafts: share of the commonest letter right
#     qwen35moe, probabilistic drafts: share of the commonest letter right
#
# It takes Python 3.11 on Linux and less than a minute of a core. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    certifi==2026.10.19.post1 charset-normalizer==3.5.3 gguf==0.19.0 idna==3.20 numpy==2.4.6 PyYAML==6.0.4 \
    requests==2.34.2 tqdm==4.70.1 urllib3==2.8.0 xllamacpp==2026.10.11549
cat > "$folder/run.py" <<'PYTHON'
import string
from collections import Counter

import numpy as np
import xllamacpp
from gguf import GGUFWriter, TokenType

LETTERS = string.ascii_letters[:48]
LIKELY, FAVOURED = LETTERS[:12], LETTERS[6:16]
TIMES, LENGTH, HIDDEN, HEADS, HEAD, EXPERTS, WIDTH = 20, 1500, 64, 4, 16, 2, 32
FEED_FORWARD = {
    "attn_norm.weight": (HIDDEN,),
    "post_attention_norm.weight": (HIDDEN,),
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_exps.weight": (EXPERTS, WIDTH, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, WIDTH, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, WIDTH),
    "ffn_gate_inp_shexp.weight": (1, HIDDEN),
    "ffn_gate_shexp.weight": (WIDTH, HIDDEN),
    "ffn_up_shexp.weight": (WIDTH, HIDDEN),
    "ffn_down_shexp.weight": (HIDDEN, WIDTH),
}
LINEAR_ATTENTION = {
    "attn_qkv.weight": (8 * HEAD, HIDDEN),
    "attn_gate.weight": (4 * HEAD, HIDDEN),
    "ssm_conv1d.weight": (8 * HEAD, 4),
    "ssm_dt.bias": (4,),
    "ssm_a": (4,),
    "ssm_norm.weight": (HEAD,),
    "ssm_out.weight": (HIDDEN, 4 * HEAD),
}
GATES = {
    "qwen3next": {"ssm_ba.weight": (8, HIDDEN)},
    "qwen35moe": {"ssm_alpha.weight": (4, HIDDEN), "ssm_beta.weight": (4, HIDDEN)},
}
ATTENTION = {
    "attn_q.weight": (2 * HEADS * HEAD, HIDDEN),
    "attn_k.weight": (HEADS * HEAD, HIDDEN),
    "attn_v.weight": (HEADS * HEAD, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * HEAD),
    "attn_q_norm.weight": (HEAD,),
    "attn_k_norm.weight": (HEAD,),
}


def logarithms(preferred):
    return np.log([TIMES if letter in preferred else 1.0 for letter in LETTERS] + [1e-9])


def write(architecture):
    """A model whose layers, of zeros, add nothing: it prefers LIKELY, and its MTP FAVOURED."""
    file = GGUFWriter(f"{architecture}.gguf", architecture)
    for key, value in {
        "block_count": 3,
        "nextn_predict_layers": 1,
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
        "expert_count": EXPERTS,
        "expert_used_count": EXPERTS,
        "expert_feed_forward_length": WIDTH,
        "expert_shared_feed_forward_length": WIDTH,
        "ssm.conv_kernel": 4,
        "ssm.state_size": HEAD,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 4 * HEAD,
    }.items():
        file.add_uint32(f"{architecture}.{key}", value)
    file.add_array(f"{architecture}.attention.recurrent_layers", [True, False, False])
    file.add_array(f"{architecture}.rope.dimension_sections", [HEAD // 2, 0, 0, 0])
    file.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2")
    file.add_token_list([*LETTERS, "<end>"])
    file.add_token_types([TokenType.NORMAL] * len(LETTERS) + [TokenType.CONTROL])
    file.add_token_merges(["a b"])
    file.add_eos_token_id(len(LETTERS))
    # Both states are the same everywhere: the model's in the first half, the MTP's in the second.
    first = np.repeat([1.0, 0.0], HIDDEN // 2)
    both = np.stack([first, 1 - first]) / (first.sum() * 2**0.5)
    into_second = np.outer(1 - first, np.concatenate([first, np.zeros(HIDDEN)]))
    tensors = {
        "token_embd.weight": np.tile(first, (len(LETTERS) + 1, 1)),
        "output_norm.weight": np.ones(HIDDEN),
        "output.weight": np.stack([logarithms(LIKELY), logarithms(FAVOURED)], 1) @ both,
        "blk.2.nextn.enorm.weight": np.ones(HIDDEN),
        "blk.2.nextn.hnorm.weight": np.ones(HIDDEN),
        "blk.2.nextn.eh_proj.weight": into_second,
        "blk.2.nextn.shared_head_norm.weight": np.ones(HIDDEN),
    }
    layers = (LINEAR_ATTENTION | GATES[architecture], ATTENTION, ATTENTION)
    for layer, shapes in enumerate(layers):
        for name, shape in (FEED_FORWARD | shapes).items():
            tensors[f"blk.{layer}.{name}"] = np.zeros(shape)
    for name, tensor in tensors.items():
        file.add_tensor(name, tensor.astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def text(architecture, drafting, seed):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = f"{architecture}.gguf"
    parameters.n_ctx = 4096
    parameters.n_parallel = 1
    parameters.fit_params = False
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = 1
    parameters.speculative.draft.cpuparams.n_threads = 1
    if drafting is not None:
        kind = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP
        parameters.speculative.types = [kind]
        parameters.speculative.draft.probabilistic = drafting == "probabilistic"
    request = {
        "prompt": [0] * 8,
        "max_tokens": LENGTH,
        "temperature": 1.0,
        "samplers": ["temperature"],
        "seed": seed,
    }
    answer = xllamacpp.Server(parameters).handle_completions(request)
    assert (drafting is None) == ("draft_n" not in answer["timings"])
    return answer["choices"][0]["text"]


RIGHT = TIMES / (len(LIKELY) * TIMES + len(LETTERS) - len(LIKELY))
for architecture in GATES:
    write(architecture)
    for drafting in (None, "greedy", "probabilistic"):
        shares = []
        for seed in (1, 2, 3):
            [(_, count)] = Counter(text(architecture, drafting, seed)).most_common(1)
            shares.append(count / LENGTH)
        if max(shares) < 1.5 * RIGHT:
            found = "right"
        else:
            found = "at least 3 times too large" if min(shares) > 3 * RIGHT else shares
        print(f"{architecture}, {drafting or 'no'} drafts: share of the commonest letter {found}")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
qwen3next, no drafts: share of the commonest letter right
qwen3next, greedy drafts: share of the commonest letter right
qwen3next, probabilistic drafts: share of the commonest letter at least 3 times too large
qwen35moe, no drafts: share of the commonest letter right
qwen35moe, greedy drafts: share of the commonest letter right
qwen35moe, probabilistic drafts: share of the commonest letter right
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
