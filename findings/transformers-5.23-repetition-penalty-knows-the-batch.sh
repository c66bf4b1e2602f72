#!/usr/bin/env bash
# From transformers 5.23.0 on, the repetition penalty that generate() hands to a custom decoding loop works
# only on the whole batch that it was made for.
#
# generate(custom_generate=...) passes the logits processors to the loop. Until 5.22 a loop could apply them
# to one row, or to the rows that have not ended yet. Since 5.23 RepetitionPenaltyLogitsProcessor keeps a
# tensor with one entry for each prompt of the batch, so that the same call raises an error about shapes for
# a left-padded batch. Loops whose rows advance at different rates (speculative decoding) cannot help it.
#
# Seen with Python 3.11 and torch 2.13.0. The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 2> /dev/null
cat > "$folder/loop.py" <<'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
model = LlamaForCausalLM(config)


def loop(model, input_ids, logits_processor, **_):
    """Score the second row alone, as a loop does once the first row has ended."""
    try:
        logits_processor(input_ids[1:], torch.zeros(1, 32))
        seen = "scored"
    except Exception as error:
        seen = type(error).__name__
    penalty = next(p for p in logits_processor if "RepetitionPenalty" in type(p).__name__)
    kept = getattr(penalty, "prompt_ignore_length", None)
    shape = tuple(kept.shape) if isinstance(kept, torch.Tensor) else kept
    print(transformers.__version__, "| one row:", seen, "| prompt_ignore_length:", shape)
    return input_ids


model.generate(
    torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]),
    attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    repetition_penalty=1.3,
    max_new_tokens=2,
    custom_generate=loop,
    pad_token_id=0,
)
EOF
for release in 5.22.2 5.23.0 5.24.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==$release" 2> /dev/null
    (cd "$folder" && venv/bin/python loop.py 2> /dev/null) | tee -a "$folder/seen"
done
cat > "$folder/expected" <<'EOF'
5.22.2 | one row: scored | prompt_ignore_length: None
5.23.0 | one row: ValueError | prompt_ignore_length: (2,)
5.24.0 | one row: ValueError | prompt_ignore_length: (2,)
EOF
diff "$folder/expected" "$folder/seen"
echo "As described."
