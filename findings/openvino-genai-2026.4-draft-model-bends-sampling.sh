#!/usr/bin/env bash
# openvino-genai 2026.4.1 samples words that only the draft model likes.
#
# With a draft model and do_sample, LLMPipeline should sample from the main model, whatever is drafted. Here both
# models ignore the context, so that what is right is known: of 48 words the main model gives 12 twenty times the
# probability of the others, together 87 %. The draft favours 12 words too, 6 of them others, which have 2 % in
# the main model. With the draft, they are a fifth to a third of the text. No error, no warning. Prompt lookup
# draws right.
#
# Seen: openvino-genai 2026.4.1.0, openvino 2026.4.1, optimum-intel 2.2.0 (which exports the models), Python 3.11,
# all in float32 on the CPU; 1500 tokens each
#     no draft: likely words right, words that only the draft likes right
#     prompt lookup: likely words right, words that only the draft likes right
#     draft model: likely words too few, words that only the draft likes too many
# (86 % and 3 % without a draft, 64 % and 20 % with it)
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

SPECIAL, WORDS, LIKELY, TIMES, LENGTH = ["<unk>", "<s>", "</s>"], 48, 12, 20, 1500
RIGHT = LIKELY * TIMES / (LIKELY * TIMES + WORDS - LIKELY)
FLOAT32 = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}


def export(name, first_likely):
    """Export a Llama that ignores its context; LIKELY words have TIMES the probability of the others."""
    words = SPECIAL + [f"w{number}" for number in range(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=2 * LENGTH,
        )
    ).eval()
    weights = torch.tensor([1e-9] * len(SPECIAL) + [1.0] * WORDS)
    weights[len(SPECIAL) + first_likely :][:LIKELY] = TIMES
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.randn(64)
        state = model.model(torch.zeros(1, 1, dtype=torch.long)).last_hidden_state[0, 0]
        model.lm_head.weight[:] = weights.log()[:, None] * state / state.square().sum()
    model.save_pretrained(name)
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


def shares(settings, **drafting):
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = openvino_genai.LLMPipeline(
        "main-exported", "CPU", scheduler_config=scheduler, **drafting, **FLOAT32
    )
    config = openvino_genai.GenerationConfig(
        do_sample=True,
        top_k=64,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=LENGTH,
        ignore_eos=True,
        **settings,
    )
    text = pipeline.generate(["w0 w1 w2"], config).texts[0]
    words = torch.tensor([int(word.removeprefix("w")) for word in text.split()])
    other = (words >= LIKELY) & (words < LIKELY + LIKELY // 2)
    return (words < LIKELY).float().mean().item(), other.float().mean().item()


export("main", 0)
export("other", LIKELY // 2)
draft = openvino_genai.draft_model("other-exported", "CPU", **FLOAT32)
tokens = {"num_assistant_tokens": 4}
for name, settings, drafting in [
    ("no draft", {}, {}),
    ("prompt lookup", tokens | {"max_ngram_size": 1}, {"prompt_lookup": True}),
    ("draft model", tokens, {"draft_model": draft}),
]:
    likely, other = shares(settings, **drafting)
    likely_is = "right" if abs(likely - RIGHT) < 0.05 else "too few" if likely < RIGHT else likely
    other_is = "right" if abs(other - (1 - RIGHT) / 6) < 0.05 else "too many"
    print(f"{name}: likely words {likely_is}, words that only the draft likes {other_is}")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
no draft: likely words right, words that only the draft likes right
prompt lookup: likely words right, words that only the draft likes right
draft model: likely words too few, words that only the draft likes too many
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
