#!/usr/bin/env bash
# openvino-genai 2026.4.1 scores answers with the probabilities of the draft model.
#
# LLMPipeline.generate returns a score for each answer: the sum of the log-probabilities of its tokens. With a draft
# model, a token that was accepted is counted with the probability that the draft gave it; with prompt lookup, which
# has none, it is counted as certain. The text is the main model's, and nothing says that the score is not: whoever
# ranks answers by it, or doubts those below a threshold, asks the draft. Tokens that were not drafted, or drafted
# in vain, are counted right.
#
# Here the models count. The main model is unsure of every word; one draft says the same words and is surer, another
# says other words. The right score is computed with transformers.
#
# Seen: openvino-genai 2026.4.1.0, openvino 2026.4.1, optimum-intel 2.2.0 (which exports the models), Python 3.11,
# greedy, all in float32 on the CPU; 12 tokens, the same each time
#     no draft: score -25.1, right is -25.1
#     draft that agrees: score -11.5, right is -25.1
#     draft that disagrees: score -25.1, right is -25.1
#     prompt lookup: score -19.6, right is -25.1
# (-11.45 is the sum with the draft's log-probabilities for 8 of the tokens, -19.63 that without 3 of them.)
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
FLOAT32 = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}


def export(name, step, certainty):
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
    ).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.1)
        model.model.layers[0].mlp.down_proj.weight.mul_(0.1)
        next_word = model.model.embed_tokens.weight[torch.arange(len(WORDS)) - step]
        model.lm_head.weight[:] = certainty * next_word
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
    return model


main = export("main", 1, 0.35)
export("agrees", 1, 1.0)
export("disagrees", 2, 1.0)
prompt = [f"w{number}" for number in [5, 6, 7, 8, 9, 40, 5]]


@torch.no_grad()
def right(answer):
    """What the main model thinks of the answer."""
    tokens = torch.tensor([[WORDS.index(word) for word in prompt + answer]])
    logits = main(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, tokens[0, len(prompt) :, None]).sum().item()


def draft(name):
    return {"draft_model": openvino_genai.draft_model(f"{name}-exported", "CPU", **FLOAT32)}


for name, settings, drafting in [
    ("no draft", {}, {}),
    ("draft that agrees", {"num_assistant_tokens": 4}, draft("agrees")),
    ("draft that disagrees", {"num_assistant_tokens": 4}, draft("disagrees")),
    ("prompt lookup", {"num_assistant_tokens": 4, "max_ngram_size": 1}, {"prompt_lookup": True}),
]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = openvino_genai.LLMPipeline(
        "main-exported", "CPU", scheduler_config=scheduler, **drafting, **FLOAT32
    )
    config = openvino_genai.GenerationConfig(
        max_new_tokens=12, ignore_eos=True, logprobs=1, **settings
    )
    result = pipeline.generate([" ".join(prompt)], config)
    answer = result.texts[0].split()
    assert answer == [f"w{number}" for number in range(6, 18)]
    print(f"{name}: score {result.scores[0]:.1f}, right is {right(answer):.1f}")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
no draft: score -25.1, right is -25.1
draft that agrees: score -11.5, right is -25.1
draft that disagrees: score -25.1, right is -25.1
prompt lookup: score -19.6, right is -25.1
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
