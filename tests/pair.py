"""A tiny draft and its verifier with a tokenizer, and prompts to evaluate them on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast as FastTokenizer

from helpers import (
    HIDDEN,
    PLAIN,
    VOCABULARY,
    Tensors,
    golden_vectors,
    save_quietly,
    source_tensors,
    tiny_llama,
    write_checkpoint,
)
from speculators.convert.eagle import EagleConverter

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

PROMPTS = [
    {"question_id": 81, "category": "writing", "turns": ["Rain in Spain?", "And now shorter."]},
    {"question_id": 82, "category": "writing", "turns": ["The plain."]},
    {"question_id": 101, "category": "math", "turns": ["1 + 1 is what?"]},
]
NEW_TOKENS = 12


@dataclass(frozen=True)
class Pair:
    """A converted draft, and the verifier that its config names."""

    draft: Path
    verifier: Path


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> FastTokenizer:
    """A tokenizer of bytes and some pairs of them, made on the fly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the rain in spain stays mainly in the plain"], trainer)
    fast = FastTokenizer(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = chat_template
    return fast


def make_pair(root: Path) -> Pair:
    """Make both in a folder."""
    model = tiny_llama(
        golden_vectors(PLAIN)["lm_head.weight"],
        source_tensors()["embed_tokens.weight"],
        max_position_embeddings=1024,
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # every output is as long as it may be
    verifier = save_quietly(model, root / "verifier")
    tiny_tokenizer().save_pretrained(verifier)
    source = write_checkpoint(root / "source", edit=often_right)
    return Pair(EagleConverter().convert(source, root / "draft", verifier), verifier)


def often_right(tensors: Tensors) -> None:
    """Pass embeddings on almost unchanged, like a verifier with small random weights."""
    seen = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
    tensors["fc.weight"] = torch.cat((torch.eye(HIDDEN), 0.002 * seen), dim=1)
    for name in ("layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"):
        tensors[name] *= 0.01
