#!/usr/bin/env bash
# transformers 5.24.0 samples from another distribution if the assistant has another tokenizer.
#
# With do_sample, generate() implements lossless speculative decoding for any two vocabularies. It cuts the
# assistant's output matrix down to the shared words, in the order in which the tokenizer lists its vocabulary,
# and spreads the resulting logits over the target's vocabulary in the order of the ids. A fast tokenizer lists
# its vocabulary in no order at all. So the verification divides by the draft probability of another word than
# the one that was drafted, and accepts and replaces the wrong ones. No error, no warning: other text.
#
# Both models here ignore the context, so that what is right is known: the target gives 12 of its 48 words 20
# times the probability of the others, together 87 %. The assistant favours 12 other words.
#
# Seen: transformers 5.24.0, tokenizers 0.23.3, torch 2.13.0, Python 3.11
#     no assistant: the likely words have their 87 %
#     assistant of the same tokenizer: the likely words have their 87 %
#     assistant of another tokenizer: the likely words have less
#     assistant of another tokenizer that lists its vocabulary by id: the likely words have their 87 %
# (In the third line they had 49 % in one run; the order, and with it the number, changes from run to run.)
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 anyio==4.16.0 filelock==4.3.1 fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 \
    httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 MarkupSafe==3.0.4 \
    mpmath==1.3.0 networkx==3.6.1 numpy==2.4.6 packaging==26.4 PyYAML==6.0.4 regex==2026.11.19 \
    safetensors==0.8.0 sympy==1.14.0 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.24.0 \
    truststore==0.10.5 typing_extensions==4.16.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"word{number}" for number in range(48)]
LIKELY, TIMES, LENGTH = 12, 20, 1500
RIGHT = LIKELY * TIMES / (LIKELY * TIMES + len(WORDS) - LIKELY)


def tokenizer(words):
    made = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, "?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


class ById(PreTrainedTokenizerFast):
    def get_vocab(self):
        return dict(sorted(super().get_vocab().items(), key=lambda item: item[1]))


def model(words, likely):
    """A Llama that ignores its context, since all words have one embedding."""
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=2 * LENGTH,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    weights = torch.tensor([TIMES if word in likely else int(word in WORDS) for word in words])
    with torch.no_grad():
        made.model.embed_tokens.weight[:] = torch.randn(16)
        state = made.model(torch.zeros(1, 1, dtype=torch.long)).last_hidden_state[0, 0]
        made.lm_head.weight[:] = (weights + 1e-9).log()[:, None] * state / state.square().sum()
    return made


torch.manual_seed(0)
words, other_words = ["?", *WORDS], ["only", "here", *reversed(WORDS), "?"]
likely, unlikely = WORDS[:LIKELY], WORDS[-LIKELY:]
target, ours, theirs = model(words, likely), tokenizer(words), tokenizer(other_words)
by_id = ById(tokenizer_object=theirs.backend_tokenizer, unk_token="?")
for name, more in {
    "no assistant": {},
    "assistant of the same tokenizer": {"assistant_model": model(words, unlikely)},
    "assistant of another tokenizer": {
        "assistant_model": model(other_words, unlikely),
        "tokenizer": ours,
        "assistant_tokenizer": theirs,
    },
    "assistant of another tokenizer that lists its vocabulary by id": {
        "assistant_model": model(other_words, unlikely),
        "tokenizer": ours,
        "assistant_tokenizer": by_id,
    },
}.items():
    prompt = torch.tensor([[1, 2, 3]])
    made = target.generate(prompt, do_sample=True, top_k=0, max_new_tokens=LENGTH, **more)[0, 3:]
    share = (made <= LIKELY).float().mean().item()
    verdict = "less" if share < RIGHT - 0.1 else f"their {RIGHT:.0%}".replace("%", " %")
    print(f"{name}: the likely words have {verdict if share < RIGHT + 0.1 else share}")
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
no assistant: the likely words have their 87 %
assistant of the same tokenizer: the likely words have their 87 %
assistant of another tokenizer: the likely words have less
assistant of another tokenizer that lists its vocabulary by id: the likely words have their 87 %
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
