#!/usr/bin/env bash
# llm-compressor 0.14.0 keeps the MTP of a Qwen3.5 that it quantizes, and loses that of a Qwen3-Next without a word.
#
# transformers does not load MTPs, so llm-compressor copies their tensors from the source once the model is saved, and
# names them in the list of what is not quantized. It does so if transformers' config has a number of MTP layers, and
# for names that start with "mtp". The config of Qwen3-Next has no such number: nothing is copied, and nothing is
# said. GLM-4-MoE and DeepSeek-V3 have one, but call their MTP model.layers.N: one line among the log says that no
# weights with the prefix mtp were found, and the config.json that is written goes on to promise an MTP.
# Engines that draft by it find no weights.
#
# Here the models are small and random; GLM-4-MoE has its 46 layers, after which transformers ignores the 47th.
#
# Seen: llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.17.0, torch 2.13.0, Python 3.11;
# oneshot with FP8_DYNAMIC
#     qwen3_5_text: 12 of 12 tensors of the MTP are kept, no warning, config.json promises 1
#     qwen3_next: 0 of 26 tensors of the MTP are kept, no warning, config.json promises None
#     glm4_moe: 0 of 10 tensors of the MTP are kept, a warning, config.json promises 1
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 accelerate==1.15.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 \
    auto-round==0.15.1 certifi==2026.10.19.post1 charset-normalizer==3.5.3 click==8.5.1 \
    compressed-tensors==0.19.0 datasets==5.2.0 dill==0.4.1 filelock==4.3.1 fsspec==2026.9.0 h11==0.16.0 \
    hf-xet==1.8.0 httpcore==1.0.9 httpx==0.28.1 huggingface_hub==1.33.0 idna==3.20 Jinja2==3.1.6 \
    llmcompressor==0.14.0.1 loguru==0.7.3 markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 \
    mpmath==1.3.0 multiprocess==0.70.19 networkx==3.6.1 numpy==2.4.6 nvidia-ml-py==13.615.71 \
    packaging==26.4 pandas==3.1.1 pillow==13.0.0 psutil==7.2.2 py-cpuinfo==9.0.0 pyarrow==26.0.1 \
    pydantic==2.14.4 pydantic_core==2.50.5 Pygments==2.21.0 python-dateutil==4.0.0 PyYAML==6.0.4 \
    regex==2026.11.19 requests==2.34.2 rich==15.0.0 safetensors==0.8.0 shellingham==1.5.4 sympy==1.14.0 \
    tokenizers==0.23.3 tqdm==4.70.1 transformers==5.17.0 typer==0.29.2 typing-inspection==0.4.5 \
    typing_extensions==4.16.0 tzdata==2026.6 urllib3==2.8.0 xxhash==4.1.0
cat > "$folder/run.py" <<'PYTHON'
import json
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
QWEN = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
GLM = {
    "num_hidden_layers": 46,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 46,
}
MODELS = [
    # its type, its sizes, where its MTP is and what that has beside a layer, what promises it
    ("qwen3_5_text", QWEN, "mtp.layers.0.", "mtp.fc.weight", "mtp_num_hidden_layers"),
    ("qwen3_next", QWEN | EXPERTS, "mtp.layers.0.", "mtp.fc.weight", None),
    (
        "glm4_moe",
        GLM,
        "model.layers.46.",
        "model.layers.46.eh_proj.weight",
        "num_nextn_predict_layers",
    ),
]


def tensors_of(directory):
    return {
        name: it
        for file in Path(directory).glob("*.safetensors")
        for name, it in load_file(file).items()
    }


said = []
logger.add(said.append, level="WARNING")
for kind, sizes, layer, projection, promise in MODELS:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **sizes)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(kind)
    last = f"model.layers.{config.num_hidden_layers - 1}."
    tensors = tensors_of(kind)
    mtp = {
        name.replace(last, layer): it.clone()
        for name, it in tensors.items()
        if name.startswith(last)
    }
    mtp[projection] = torch.randn(64, 128).bfloat16()
    save_file(tensors | mtp, f"{kind}/model.safetensors", metadata={"format": "pt"})
    if promise is not None:
        file = Path(kind, "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {promise: 1}))
    said.clear()
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(kind),
        recipe=QuantizationModifier(
            targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*gate$"]
        ),
        output_dir=f"{kind}-quantized",
    )
    kept = len(mtp.keys() & tensors_of(f"{kind}-quantized").keys())
    written = json.loads(Path(f"{kind}-quantized", "config.json").read_text())
    warning = "a warning" if any("mtp" in line.lower() for line in said) else "no warning"
    promised = f"config.json promises {written.get(promise)}"
    line = f"{kind}: {kept} of {len(mtp)} tensors of the MTP are kept, {warning}, {promised}"
    print(line, file=open("seen", "a"))
PYTHON
(cd "$folder" && venv/bin/python run.py > log 2>&1 || { cat log; exit 1; })
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
qwen3_5_text: 12 of 12 tensors of the MTP are kept, no warning, config.json promises 1
qwen3_next: 0 of 26 tensors of the MTP are kept, no warning, config.json promises None
glm4_moe: 0 of 10 tensors of the MTP are kept, a warning, config.json promises 1
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
