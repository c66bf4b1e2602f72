#!/usr/bin/env bash
# llama.cpp b11549 takes the mean off what the MTP of Nemotron-H puts out.
#
# The MTP's last norm, mtp.layers.1.final_layernorm, is an RMSNorm, as all of the model's: so it is in vLLM 0.32.0
# and SGLang 0.5.17 (nemotron_h_mtp.py). llama.cpp computes it as a LayerNorm, which subtracts the mean first
# (src/models/nemotron-h-moe.cpp: LLM_NORM). It drafts other tokens, the more the further the mean is from 0; the
# answers stay the model's. No error, no warning.
#
# Here the model says nothing but "b", and so does its MTP, of whose last layer the numbers are 1 and -1, or all
# 1: RMSNorm leaves them as they are, but LayerNorm makes zeros of the second. (Of a small random model with an MTP,
# 89 of 111 drafted tokens were those of RMSNorm in b11434, and 132 of 132 those of LayerNorm.)
#
# Seen: xllamacpp 2026.10.11549 (llama.cpp b11549, its server), gguf 0.19.0, Python 3.11, on a CPU
#     an MTP whose last layer gives both signs: all of its drafts accepted
#     an MTP whose last layer gives equal numbers: none of its drafts accepted
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
import numpy as np
import xllamacpp
from gguf import GGUFWriter, TokenType

LETTERS = "abcdefghijklmnop"
HIDDEN, HEADS, HEAD, EXPERTS, WIDTH = 64, 4, 16, 2, 32
HALF = np.repeat([1.0, 0.0], HIDDEN // 2)
ATTENTION = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HEADS * HEAD, HIDDEN),
    "attn_k.weight": (HEADS * HEAD, HIDDEN),
    "attn_v.weight": (HEADS * HEAD, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * HEAD),
}
EXPERT_LAYER = {
    "post_attention_norm.weight": (HIDDEN,),
    "exp_probs_b.bias": (EXPERTS,),
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, WIDTH, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, WIDTH),
    "ffn_up_shexp.weight": (WIDTH, HIDDEN),
    "ffn_down_shexp.weight": (HIDDEN, WIDTH),
}
MAMBA = {
    "attn_norm.weight": (HIDDEN,),
    "ssm_a": (8, 1),
    "ssm_d": (8, 1),
    "ssm_conv1d.weight": (192, 4),
    "ssm_conv1d.bias": (192,),
    "ssm_dt.bias": (8,),
    "ssm_in.weight": (328, HIDDEN),
    "ssm_norm.weight": (2, 64),
    "ssm_out.weight": (HIDDEN, 128),
}


def write(name, state):
    """A model whose layers, of zeros, add nothing: it always says "b". Its MTP has the state given."""
    file = GGUFWriter(name, "nemotron_h_moe")
    for key, value in {
        "block_count": 3,
        "nextn_predict_layers": 1,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
        "vocab_size": len(LETTERS) + 1,
        "expert_count": EXPERTS,
        "expert_used_count": EXPERTS,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_feed_forward_length": WIDTH,
        "expert_shared_feed_forward_length": WIDTH,
        "expert_shared_count": 1,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.inner_size": 128,
        "ssm.time_step_rank": 8,
    }.items():
        file.add_uint32(f"nemotron_h_moe.{key}", value)
    file.add_array("nemotron_h_moe.attention.head_count_kv", [0, HEADS, HEADS])
    file.add_array("nemotron_h_moe.feed_forward_length", [0, 0, WIDTH])
    file.add_float32("nemotron_h_moe.attention.layer_norm_rms_epsilon", 1e-6)
    file.add_float32("nemotron_h_moe.attention.layer_norm_epsilon", 1e-6)
    file.add_bool("nemotron_h_moe.expert_weights_norm", True)
    file.add_float32("nemotron_h_moe.expert_weights_scale", 1.0)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2")
    file.add_token_list([*LETTERS, "<end>"])
    file.add_token_types([TokenType.NORMAL] * len(LETTERS) + [TokenType.CONTROL])
    file.add_token_merges(["a b"])
    file.add_eos_token_id(len(LETTERS))
    head = np.zeros((len(LETTERS) + 1, HIDDEN))
    head[LETTERS.index("b")] = HALF
    tensors = {
        "token_embd.weight": np.tile(HALF, (len(LETTERS) + 1, 1)),
        "output_norm.weight": np.ones(HIDDEN),
        "output.weight": head,
        "blk.2.nextn.enorm.weight": np.ones(HIDDEN),
        "blk.2.nextn.hnorm.weight": np.ones(HIDDEN),
        "blk.2.nextn.eh_proj.weight": np.outer(state, np.concatenate([HALF, np.zeros(HIDDEN)])),
        "blk.2.nextn.shared_head_norm.weight": np.ones(HIDDEN),
    }
    for layer, shapes in enumerate([MAMBA, ATTENTION, ATTENTION | EXPERT_LAYER]):
        tensors |= {f"blk.{layer}.{tensor}": np.zeros(shape) for tensor, shape in shapes.items()}
    for tensor, values in tensors.items():
        file.add_tensor(tensor, values.astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def accepted(name):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = name
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.fit_params = False
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = 1
    kind = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP
    parameters.speculative.types = [kind]
    parameters.speculative.draft.cpuparams.n_threads = 1
    request = {"prompt": [0, 1, 2], "max_tokens": 40, "temperature": 0.0}
    answer = xllamacpp.Server(parameters).handle_completions(request)
    assert answer["choices"][0]["text"] == "b" * 40
    return answer["timings"]["draft_n_accepted"], answer["timings"]["draft_n"]


# RMSNorm makes ones of equal numbers, and leaves ones of both signs: with either, "b" is the likeliest.
for name, state in {"both signs": 2 * HALF - 1, "equal numbers": np.ones(HIDDEN)}.items():
    write(f"{name}.gguf", state)
    good, drafted = accepted(f"{name}.gguf")
    share = "all" if good == drafted else "none" if good == 0 else f"{good} of {drafted}"
    print(f"an MTP whose last layer gives {name}: {share} of its drafts accepted")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
an MTP whose last layer gives both signs: all of its drafts accepted
an MTP whose last layer gives equal numbers: none of its drafts accepted
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
