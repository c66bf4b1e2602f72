#!/usr/bin/env bash
# speculators 0.9.0 converts an EAGLE-3 draft with another RoPE and dtype if transformers 5 wrote its config.
#
# transformers 5 writes rope_parameters and dtype where 4 wrote rope_theta, rope_scaling and torch_dtype. The
# converter, which itself needs transformers 5, reads the old names only. From the new ones it makes a draft
# that turns its queries and keys by base 10000 without scaling, whatever it was trained with, and float32
# tensors of twice the size. It logs success and no warning. The two inputs here differ in those names and in
# nothing else.
#
# Seen: speculators 0.9.0, transformers 5.19.0, torch 2.13.0, Python 3.11
#     old names: llama3, theta 500000.0, factor 8.0, bfloat16
#     new names: default, theta 10000.0, factor None, float32
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 certifi==2026.10.19.post1 \
    charset-normalizer==3.5.2 click==8.5.1 datasets==5.0.1 dill==0.4.1 filelock==4.3.1 \
    fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 hs-connectors==0.9.0 httpcore2==2.16.2 \
    httpcore==1.0.9 httpx2==2.16.2 httpx==0.28.1 huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 \
    loguru==0.7.3 markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0 \
    multiprocess==0.70.19 networkx==3.6.1 numpy==2.4.6 openai==3.57.0 packaging==26.4 pandas==3.1.1 \
    pyarrow==26.0.1 pydantic==2.14.4 pydantic_core==2.50.5 Pygments==2.21.0 python-dateutil==4.0.0 \
    PyYAML==6.0.4 regex==2026.11.19 requests==2.34.2 rich==15.0.0 safetensors==0.8.0 \
    shellingham==1.5.4 sniffio==1.3.1 speculators==0.9.0 sympy==1.14.0 tokenizers==0.23.3 \
    tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 \
    typing_extensions==4.16.0 urllib3==2.8.0 xxhash==4.1.0
cat > "$folder/run.py" <<'PYTHON'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators.convert import convert_model
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SHAPES = {
    "embed_tokens": (64, 32),
    "fc": (32, 96),
    "norm": (32,),
    "lm_head": (64, 32),
    "midlayer.self_attn.q_proj": (32, 64),
    "midlayer.self_attn.k_proj": (32, 64),
    "midlayer.self_attn.v_proj": (32, 64),
    "midlayer.self_attn.o_proj": (32, 32),
    "midlayer.mlp.gate_proj": (48, 32),
    "midlayer.mlp.up_proj": (48, 32),
    "midlayer.mlp.down_proj": (32, 48),
    "midlayer.input_layernorm": (32,),
    "midlayer.hidden_norm": (32,),
    "midlayer.post_attention_layernorm": (32,),
}

LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **SIZES)).save_pretrained("verifier")
LlamaConfig(
    architectures=["LlamaForCausalLMEagle3"],
    num_hidden_layers=1,
    draft_vocab_size=64,
    rope_parameters=SCALING | {"rope_theta": 500000.0},
    dtype="bfloat16",
    **SIZES,
).save_pretrained("new")
config = json.loads(Path("new/config.json").read_text())
del config["rope_parameters"], config["dtype"]
config |= {"rope_theta": 500000.0, "rope_scaling": SCALING, "torch_dtype": "bfloat16"}
Path("old").mkdir()
Path("old/config.json").write_text(json.dumps(config))
weights = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
for names in ("old", "new"):
    save_file(weights, f"{names}/model.safetensors")
    made = f"{names}-converted"
    convert_model(names, verifier="verifier", algorithm="eagle3", output_path=made)
    layer = json.loads(Path(made, "config.json").read_text())["transformer_layer_config"]
    rope = layer["rope_parameters"]
    (dtype,) = {tensor.dtype for tensor in load_file(f"{made}/model.safetensors").values()}
    print(
        f"{names} names: {rope['rope_type']}, theta {rope['rope_theta']}, "
        f"factor {rope.get('factor')}, {str(dtype).removeprefix('torch.')}"
    )
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
old names: llama3, theta 500000.0, factor 8.0, bfloat16
new names: default, theta 10000.0, factor None, float32
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
