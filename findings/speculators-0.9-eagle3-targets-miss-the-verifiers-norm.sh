#!/usr/bin/env bash
# speculators 0.9.0 trains EAGLE-3 drafts of Gemma and Qwen3.5 verifiers on logits that are not the verifier's.
#
# The trainer is given the verifier's states before its final norm, and makes the logits that the draft has to learn
# from them, with a norm and a head that hold the verifier's weights. The final norm of Gemma 1 to 3, Qwen3-Next and
# Qwen3.5 multiplies by one plus the weight. The trainer has that norm for some of them, for DFlash
# (vllm-project/speculators#1090). EAGLE-3 and P-EAGLE take the norm of the draft's own type, which multiplies by
# the weight, whatever the verifier. The shapes fit and the loss falls, but towards another distribution, and the
# metrics that are shown are agreement with it. DFlash is wrong for the types that its list lacks: Qwen3-Next and the
# mixtures of Qwen3.5 (of these vllm-project/speculators#1145 tells).
#
# Here the verifiers are small and random, with final norms whose weights vary by 0.3, and the targets for 16
# tokens are compared with their logits.
#
# Seen: speculators 0.9.0, transformers 5.14.1, torch 2.13.0, Python 3.11
#     qwen3: eagle3 right, peagle right, dflash right
#     gemma3_text: eagle3 wrong, peagle wrong, dflash right
#     qwen3_5_text: eagle3 wrong, peagle wrong, dflash right
#     qwen3_5_moe_text: eagle3 wrong, peagle wrong, dflash wrong
#     qwen3_next: eagle3 wrong, peagle wrong, dflash wrong
# (Where they are wrong, at most 2 of the 16 likeliest tokens are the verifier's.)
#
# It takes a Python 3.11 for which pip finds a CPU build of torch. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile \
    torch==2.13.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 certifi==2026.10.19.post1 \
    charset-normalizer==3.5.2 click==8.5.1 datasets==5.0.1 dill==0.4.1 filelock==4.3.1 fsspec==2026.9.0 \
    h11==0.16.0 hf-xet==1.8.0 hs-connectors==0.9.0 httpcore2==2.16.2 httpcore==1.0.9 httpx2==2.16.2 \
    httpx==0.28.1 huggingface_hub==1.33.0 idna==3.20 Jinja2==3.1.6 loguru==0.7.3 markdown-it-py==4.3.0 \
    MarkupSafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0 multiprocess==0.70.19 networkx==3.6.1 numpy==2.4.6 \
    openai==3.57.0 packaging==26.4 pandas==3.1.1 pyarrow==26.0.1 pydantic==2.14.4 pydantic_core==2.50.5 \
    Pygments==2.21.0 python-dateutil==4.0.0 PyYAML==6.0.4 regex==2026.11.19 requests==2.34.2 rich==15.0.0 \
    safetensors==0.8.0 shellingham==1.5.4 sniffio==1.3.1 speculators==0.9.0 sympy==1.14.0 \
    tokenizers==0.22.2 tqdm==4.70.1 transformers==5.14.1 truststore==0.10.5 typer==0.29.2 \
    typing-inspection==0.4.5 typing_extensions==4.16.0 urllib3==2.8.0 xxhash==4.1.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from speculators.models.dflash import DFlashDraftModel
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.models.peagle import PEagleDraftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
HYBRID = {"layer_types": ["full_attention"] * 4}
VERIFIERS = {
    "qwen3": {},
    "gemma3_text": {},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID | EXPERTS,
    "qwen3_next": HYBRID | EXPERTS,
}
FAMILIES = {
    "eagle3": (Eagle3DraftModel, LlamaConfig),
    "peagle": (PEagleDraftModel, LlamaConfig),
    "dflash": (DFlashDraftModel, Qwen3Config),
}
torch.manual_seed(0)
torch.set_grad_enabled(False)
prompt = torch.randint(64, (1, 16))
for kind, more in VERIFIERS.items():
    config = AutoConfig.for_model(kind, num_hidden_layers=4, **SIZES, **more)
    verifier = AutoModelForCausalLM.from_config(config).eval()
    norm = verifier.model.norm
    norm.weight.add_(0.3 * torch.randn_like(norm.weight))
    verifier.save_pretrained(kind)
    states = []
    norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    logits = verifier(prompt).logits
    seen = []
    for family, (draft_class, config_class) in FAMILIES.items():
        draft = draft_class.from_training_args(
            config_class(num_hidden_layers=1, **SIZES),
            draft_vocab_size=SIZES["vocab_size"],
            verifier_name_or_path=kind,
            target_layer_ids=[1, 2, 3],
            norm_before_residual=True,
            ttt_steps=3,
            mask_token_id=0,
            draft_attn_impl="eager",
        )
        targets = draft.verifier_lm_head(draft.verifier_norm(states[0]))
        same = torch.allclose(targets, logits, atol=1e-3)
        seen.append(f"{family} {'right' if same else 'wrong'}")
    print(f"{kind}:", ", ".join(seen))
PYTHON
(cd "$folder" && venv/bin/python run.py 2> errors || { cat errors; exit 1; }) | tee "$folder/seen"
cat > "$folder/expected" <<'TEXT'
qwen3: eagle3 right, peagle right, dflash right
gemma3_text: eagle3 wrong, peagle wrong, dflash right
qwen3_5_text: eagle3 wrong, peagle wrong, dflash right
qwen3_5_moe_text: eagle3 wrong, peagle wrong, dflash wrong
qwen3_next: eagle3 wrong, peagle wrong, dflash wrong
TEXT
diff "$folder/expected" "$folder/seen"
echo "As described."
