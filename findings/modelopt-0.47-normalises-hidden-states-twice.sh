#!/usr/bin/env bash
# nvidia-modelopt 0.47.0 trains an EAGLE-3 draft with one norm more than it is served with.
#
# In its Hugging Face flow, the module wraps transformers' decoder layer. That applies input_layernorm to the
# hidden states before attention, and the module then applies hidden_norm to the result. Everybody else keeps
# input_layernorm for the embedding and applies hidden_norm alone: speculators here, the EAGLE reference and
# the engines too. The tensors and the config are the same, so that a trained draft loads anywhere and
# computes something else. It goes unnoticed while input_layernorm is what it was initialised to, all ones.
#
# Seen: nvidia-modelopt 0.47.0 (the one file that defines the module), speculators 0.9.0, transformers 5.14.1,
# torch 2.13.0, Python 3.11; the same random weights on both sides
#     input_layernorm all ones | logits differ: no
#     input_layernorm random | logits differ: yes
# (by 5e-6 and 2.1, of at most 6.2)
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
    httpcore==1.0.9 httpx2==2.16.2 httpx==0.28.1 huggingface_hub==1.33.0 idna==3.20 Jinja2==3.1.6 \
    loguru==0.7.3 markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0 \
    multiprocess==0.70.19 networkx==3.6.1 numpy==2.4.6 nvidia-modelopt==0.47.0 openai==3.57.0 \
    packaging==26.4 pandas==3.1.1 pyarrow==26.0.1 pydantic==2.14.4 pydantic_core==2.50.5 \
    Pygments==2.21.0 python-dateutil==4.0.0 PyYAML==6.0.4 regex==2026.11.19 requests==2.34.2 \
    rich==15.0.0 safetensors==0.8.0 shellingham==1.5.4 sniffio==1.3.1 speculators==0.9.0 \
    sympy==1.14.0 tokenizers==0.22.2 tqdm==4.70.1 transformers==5.14.1 truststore==0.10.5 \
    typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0 urllib3==2.8.0 xxhash==4.1.0
cat > "$folder/run.py" <<'PYTHON'
import importlib.util
from pathlib import Path

import torch
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

LENGTH, WIDTH = 6, 32

folder = importlib.util.find_spec("modelopt").submodule_search_locations[0]
file = Path(folder, "torch/speculative/plugins/modeling_eagle.py")
spec = importlib.util.spec_from_file_location("modeling_eagle", file)
modelopt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(modelopt)


def llama(**more):
    return LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
        **more,
    )


def by_speculators(draft, states, tokens):
    logits = []
    draft.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    draft(states, tokens, document_ids=torch.zeros(1, LENGTH, dtype=torch.long), ttt_steps=1)
    return logits[0]


def by_modelopt(module, embeddings, states):
    later = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    module._maybe_init_rope()
    output, _, _ = module(module.fc(states), embeddings, attention_mask=later)
    return module.lm_head(output)


for ones in (True, False):
    torch.manual_seed(0)
    draft = Eagle3DraftModel(
        Eagle3SpeculatorConfig(transformer_layer_config=llama(), draft_vocab_size=64)
    ).eval()
    module = modelopt.EagleModule(
        llama(
            draft_vocab_size=64,
            has_lm_head=True,
            use_last_layernorm=True,
            use_aux_hidden_state=True,
            eagle_aux_hidden_state_layer_ids=[0, 1, 2],
            eagle_decoder_type="llama",
        ),
        LlamaDecoderLayer,
    ).eval()
    with torch.no_grad():
        for weight in draft.parameters():
            torch.nn.init.normal_(weight, mean=weight.ndim == 1, std=0.3)
        if ones:
            draft.layers[0].input_layernorm.weight.fill_(1)
        assert not module.load_state_dict(draft.state_dict(), strict=False).missing_keys
        states, tokens = torch.randn(1, LENGTH, 3 * WIDTH), torch.randint(64, (1, LENGTH))
        logits = by_speculators(draft, states, tokens)
        gap = (by_modelopt(module, draft.embed_tokens(tokens), states) - logits).abs().max().item()
    differs = "no" if gap < 1e-3 else "yes" if gap > 0.1 else gap
    print(f"input_layernorm {'all ones' if ones else 'random'} | logits differ: {differs}")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
input_layernorm all ones | logits differ: no
input_layernorm random | logits differ: yes
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
