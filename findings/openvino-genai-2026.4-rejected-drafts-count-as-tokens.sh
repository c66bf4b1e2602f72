#!/usr/bin/env bash
# openvino-genai 2026.4.1 ends answers before min_new_tokens once tokens were drafted in vain.
#
# min_new_tokens forbids the stop tokens until the answer is long enough. With a draft model or prompt lookup,
# LLMPipeline seems to count rejected drafts too: the worse the drafts, the earlier a stop token is allowed. With
# drafts that are all accepted it holds.
#
# Here the main model counts and w12 is the stop token, so that w6 to w12, 7 tokens, is the answer without a
# minimum. The draft model counts in steps of two, and the prompt misleads prompt lookup.
#
# Seen: openvino-genai 2026.4.1.0, openvino 2026.4.1, optimum-intel 2.2.0 (which exports the models), Python 3.11,
# greedy, all in float32 on the CPU
#     no draft, min_new_tokens 0: 7 tokens
#     no draft, min_new_tokens 12: 25 tokens
#     draft model, min_new_tokens 0: 7 tokens
#     draft model, min_new_tokens 12: 7 tokens
#     prompt lookup, min_new_tokens 0: 7 tokens
#     prompt lookup, min_new_tokens 12: 7 tokens
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 annotated-doc==0.0.7 anyio==4.16.0 certifi==2026.10.19.post1 charset-normalizer==3.5.3 \
    click==8.5.1 cloudpickle==3.1.3 filelock==4.3.1 fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 \
    httpcore==1.0.9 httpx==0.28.1 huggingface_hub==1.21.0 idna==3.20 Jinja2==3.1.6 joblib==1.6.0 \
    markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0 narwhals==2.29.0 networkx==3.6.1 \
    ninja==1.13.2 nncf==3.4.0 numpy==2.4.6 openvino==2026.4.1 openvino-genai==2026.4.1.0 \
    openvino-telemetry==2025.2.0 openvino-tokenizers==2026.4.1.0 optimum==2.3.0 optimum-intel==2.2.0 \
    packaging==26.4 pillow==13.0.0 psutil==7.2.2 pydot==4.0.1 Pygments==2.21.0 pyparsing==3.3.3 \
    PyYAML==6.0.4 regex==2026.11.19 requests==2.34.2 rich==15.0.0 safetensors==0.8.0 scikit-learn==1.9.1 \
    scipy==1.17.1 shellingham==1.5.4 sympy==1.14.0 tabulate==0.10.0 threadpoolctl==3.8.0 \
    tokenizers==0.22.2 tqdm==4.70.1 transformers==5.5.4 typer==0.25.1 typing_extensions==4.16.0 \
    urllib3==2.8.0
cat > "$folder/run.py" <<'PYTHON'
import subprocess

import openvino_genai
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>"] + [f"w{number}" for number in range(61)]
LEAST, MOST, STOP = 12, 30, WORDS.index("w12")
FLOAT32 = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}


def export(name, step):
    """Export a Llama that counts: after a word comes the one `step` further on."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            initializer_range=0.2,
            max_position_embeddings=128,
        )
    )
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.1)
        model.model.layers[0].mlp.down_proj.weight.mul_(0.1)
        model.lm_head.weight[:] = model.model.embed_tokens.weight[torch.arange(len(WORDS)) - step]
    model.save_pretrained(name)
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(name)
    subprocess.run(
        [
            *("venv/bin/optimum-cli", "export", "openvino", "--model", name),
            *("--task", "text-generation-with-past", "--weight-format", "fp32", f"{name}-exported"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


export("main", 1)
export("other", 2)
prompt = " ".join(f"w{number}" for number in [5, 6, 7, 8, 9, 40, 5])
draft = openvino_genai.draft_model("other-exported", "CPU", **FLOAT32)
for name, settings, drafting in [
    ("no draft", {}, {}),
    ("draft model", {"num_assistant_tokens": 4}, {"draft_model": draft}),
    ("prompt lookup", {"num_assistant_tokens": 4, "max_ngram_size": 1}, {"prompt_lookup": True}),
]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = openvino_genai.LLMPipeline(
        "main-exported", "CPU", scheduler_config=scheduler, **drafting, **FLOAT32
    )
    for least in (0, LEAST):
        config = openvino_genai.GenerationConfig(
            min_new_tokens=least,
            max_new_tokens=MOST,
            stop_token_ids={STOP},
            **settings,
        )
        result = pipeline.generate([prompt], config)
        print(f"{name}, min_new_tokens {least}: {len(result.texts[0].split())} tokens")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
no draft, min_new_tokens 0: 7 tokens
no draft, min_new_tokens 12: 25 tokens
draft model, min_new_tokens 0: 7 tokens
draft model, min_new_tokens 12: 7 tokens
prompt lookup, min_new_tokens 0: 7 tokens
prompt lookup, min_new_tokens 12: 7 tokens
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
