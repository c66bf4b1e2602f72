"""Train the drafts of the examples: for a chat model, from nothing but that model.

The verifier writes its own training data. It is given its chat template up to the user's turn and
samples what a user would ask (as in Magpie, arXiv:2406.08464); then it answers. One layer learns to
continue the verifier's hidden states, in the forms in which research code publishes such drafts:

- eagle1: EAGLE-1's training, one step (arXiv:2401.15077, section 4.2); no fc.bias, float16, .bin.
- hass: the draft learns on its own outputs too, three steps deep, with the attention that it will
  have when it drafts (HASS, arXiv:2408.15766, section 3.2); fc.bias, bfloat16, safetensors.
- layernorms: the same, with the three extra norms of the layernorm variant.

It imports nothing of speculators, so that a draft that drafts as well there as it did here shows
that the conversion and the model are right. It wants a GPU: minutes there, days without.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer

HELD_OUT = 128
"""Conversations that are kept from training, to measure the draft with."""

BATCH = 32
"""Conversations in a step of training."""


@dataclass(frozen=True)
class Recipe:
    """One way of training and publishing a draft."""

    steps: int
    """How many tokens deep the draft is trained on its own outputs."""
    dtype: torch.dtype
    file: str
    bias: bool = False
    layernorms: bool = False
    config: tuple[tuple[str, Any], ...] = ()
    """Keys of config.json beside the sizes."""


RECIPES = {
    "eagle1": Recipe(1, torch.float16, "pytorch_model.bin", config=(("bias", False),)),
    "hass": Recipe(
        3,
        torch.bfloat16,
        "model.safetensors",
        bias=True,
        config=(("bias", True), ("rope_theta", 100000.0)),
    ),
    "layernorms": Recipe(
        3,
        torch.float16,
        "model.safetensors",
        layernorms=True,
        config=(("bias", False),),
    ),
}


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        hidden, head = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, heads * head, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head, bias=False)
        self.o_proj = nn.Linear(heads * head, hidden, bias=False)

    def forward(self, x: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attend as the draft does when it has drafted ``len(earlier)`` tokens.

        Index t then stands for the position t + len(earlier). It sees the first step's keys up to
        t, made of the verifier's states, and of each later step the one at its own index.
        """
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._turned(q, len(earlier)), self._turned(k, len(earlier))
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        earlier.append((k, v))
        if len(earlier) == 1:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            (first_k, first_v), *own = earlier
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ first_k.transpose(-1, -2)).masked_fill(future, -math.inf)
            scores = torch.cat([scores, *((q * k).sum(-1, keepdim=True) for k, _ in own)], -1)
            weights = (scores.float() / math.sqrt(q.shape[-1])).softmax(-1).to(v.dtype)
            attended = weights[..., : x.shape[1]] @ first_v
            for index, (_, value) in enumerate(own):
                attended = attended + weights[..., x.shape[1] + index, None] * value
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.config["head_dim"]))
        return heads.transpose(1, 2)

    def _turned(self, x: Tensor, ahead: int) -> Tensor:
        size, theta = self.config["head_dim"], self.config.get("rope_theta", 10000.0)
        frequencies = theta ** (-torch.arange(0, size, 2, device=x.device).float() / size)
        positions = torch.arange(x.shape[2], device=x.device).float() + ahead
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        first, second = x.chunk(2, -1)
        turned: Tensor = x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
        return turned.to(x.dtype)


class Layer(nn.Module):
    """A decoder layer without a norm at its input."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden, config["rms_norm_eps"])
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, inner, bias=False),
                "up_proj": nn.Linear(hidden, inner, bias=False),
                "down_proj": nn.Linear(inner, hidden, bias=False),
            }
        )

    def forward(self, x: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """See ``Attention``."""
        x = x + self.self_attn(x, earlier)
        y = self.post_attention_layernorm(x)
        gate, up, down = self.mlp.values()
        output: Tensor = x + down(F.silu(gate(y)) * up(y))
        return output


class Draft(nn.Module):
    """The draft; the names of its parameters are those of published checkpoints."""

    def __init__(self, config: dict[str, Any], recipe: Recipe) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.fc = nn.Linear(2 * hidden, hidden, bias=recipe.bias)
        self.layers = nn.ModuleList([Layer(config)])

        def norm() -> nn.Module:
            return (
                nn.RMSNorm(hidden, config["rms_norm_eps"]) if recipe.layernorms else nn.Identity()
            )

        self.embed_layernorm, self.hidden_layernorm, self.lm_head_layernorm = norm(), norm(), norm()

    def forward(
        self, embeddings: Tensor, states: Tensor, earlier: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The states that follow, (batch, length, hidden), of two of that shape."""
        fused = torch.cat((self.embed_layernorm(embeddings), self.hidden_layernorm(states)), -1)
        output: Tensor = self.layers[0](self.fc(fused), earlier)
        return output


@dataclass
class Conversations:
    """What the verifier wrote and thought.

    Attributes:
        ids: (conversations, length) on the GPU, padded on the right.
        answer: (conversations, length), true where a token is the verifier's answer.
        states: (conversations, length, hidden), its last hidden states after its final norm.

    """

    ids: Tensor
    answer: Tensor
    states: Tensor


@torch.inference_mode()
def converse(
    verifier: Any, tokenizer: Any, batch: int, question: int, answer: int
) -> tuple[Tensor, Tensor]:
    """Let the verifier ask itself ``batch`` questions and answer them.

    Returns:
        ids and answer of ``Conversations``.

    """
    device, end, pad = verifier.device, tokenizer.eos_token_id, tokenizer.pad_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    before, after = chat.split("?")
    start = tokenizer(before, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
    turn = tokenizer(after, add_special_tokens=False).input_ids[1:]  # the end is sampled
    asked = verifier.generate(
        start.expand(batch, -1),
        max_new_tokens=question,
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        eos_token_id=end,
        pad_token_id=pad,
    )
    texts = [row[: row.index(end) + 1] for row in _after(asked, start) if end in row[8:]]
    prompts = [start[0].tolist() + text + turn for text in texts]
    width = max(map(len, prompts))
    padded = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    answered = verifier.generate(
        padded,
        attention_mask=mask.to(device),
        max_new_tokens=answer,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
    rows = [
        (prompt, row[: row.index(end) + 1] if end in row else row)
        for prompt, row in zip(prompts, _after(answered, padded), strict=True)
    ]
    length = width + answer
    ids = torch.full((len(rows), length), pad)
    is_answer = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, (prompt, reply) in enumerate(rows):
        ids[index, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        is_answer[index, len(prompt) : len(prompt) + len(reply)] = True
    return ids.to(device), is_answer.to(device)


def _after(generated: Tensor, prompt: Tensor) -> list[list[int]]:
    rows: list[list[int]] = generated[:, prompt.shape[1] :].tolist()
    return rows


@torch.inference_mode()
def think(verifier: Any, ids: Tensor, batch: int = 64) -> Tensor:
    """The verifier's last hidden states, after its final norm, for right-padded ids."""
    return torch.cat([verifier.model(rows).last_hidden_state for rows in ids.split(batch)])


def losses(
    draft: Draft, verifier: Any, data: Conversations, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Loss and share of right guesses, for each step of drafting.

    At step j index t takes the token t+j+1 and what stands for the state t+j, and should give the
    state t+j+1, whose logits are those of the token t+j+2.
    """
    embeddings = verifier.get_input_embeddings()(data.ids)
    states, earlier = data.states[:, : -steps - 1], list[tuple[Tensor, Tensor]]()
    length = states.shape[1]
    for step in range(steps):
        states = draft(embeddings[:, step + 1 : step + 1 + length], states, earlier)
        wanted = data.states[:, step + 1 : step + 1 + length]
        counts = data.answer[:, step + 2 : step + 2 + length]
        counts = F.pad(counts, (0, length - counts.shape[1]))
        guess = verifier.lm_head(draft.lm_head_layernorm(states[counts]))
        truth = verifier.lm_head(wanted[counts].to(guess.dtype))
        cross_entropy = -(truth.float().softmax(-1) * guess.float().log_softmax(-1)).sum(-1).mean()
        regression = F.smooth_l1_loss(states[counts].float(), wanted[counts].float())
        right = (guess.argmax(-1) == truth.argmax(-1)).float().mean()
        yield cross_entropy + regression, right


@torch.inference_mode()
def start_from(draft: Draft, directory: Path, verifier: Any, data: Conversations) -> None:
    """Give a draft the weights of a published one, which may lack the extra norms.

    Those then begin as what changes the least: with the usual size of what they normalise.
    """
    draft.load_state_dict(torch.load(directory / "pytorch_model.bin"), strict=False)
    states = data.states[data.answer]
    embeddings = verifier.get_input_embeddings()(data.ids[data.answer])
    for norm, values in (
        (draft.embed_layernorm, embeddings),
        (draft.hidden_layernorm, states),
        (draft.lm_head_layernorm, states),
    ):
        if isinstance(norm, nn.RMSNorm):
            norm.weight.fill_(values.square().mean(-1).sqrt().mean())


def train(
    draft: Draft, verifier: Any, recipe: Recipe, data: Conversations, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one draft for ``options.seconds``; returns what was measured."""
    device, seconds = data.ids.device, options.seconds
    optimizer = torch.optim.AdamW(draft.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    held_out, rest = _split(data)
    order = torch.randperm(len(rest.ids), device=device)
    began, done, tokens = time.perf_counter(), 0, 0
    while (progress := (time.perf_counter() - began) / seconds) < 1:
        if (done + 1) * BATCH > len(order):
            order, done = order[torch.randperm(len(order), device=device)], 0
        rows = order[done * BATCH : (done + 1) * BATCH]
        batch = Conversations(rest.ids[rows], rest.answer[rows], rest.states[rows])
        for group in optimizer.param_groups:
            group["lr"] = (
                options.learning_rate * min(1, progress * 20) * (0.02 + 0.98 * (1 - progress))
            )
        with torch.autocast(device.type, dtype=torch.bfloat16):
            per_step = [loss for loss, _ in losses(draft, verifier, batch, recipe.steps)]
        optimizer.zero_grad()
        torch.stack(per_step).mean().backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 0.5)
        optimizer.step()
        done, tokens = done + 1, tokens + int(batch.answer.sum())
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
        agreement = [
            [float(right) for _, right in losses(draft, verifier, part, 4)]
            for part in _parts(held_out)
        ]
    means = [round(sum(column) / len(column), 4) for column in zip(*agreement, strict=True)]
    return {
        "seconds": seconds,
        "answer_tokens_seen": tokens,
        "agreement_by_step": means,
    }


def _split(data: Conversations) -> tuple[Conversations, Conversations]:
    n = min(HELD_OUT, len(data.ids) // 4)
    return (
        Conversations(data.ids[:n], data.answer[:n], data.states[:n]),
        Conversations(data.ids[n:], data.answer[n:], data.states[n:]),
    )


def _parts(data: Conversations) -> Iterator[Conversations]:
    for start in range(0, len(data.ids), BATCH):
        rows = slice(start, start + BATCH)
        yield Conversations(data.ids[rows], data.answer[rows], data.states[rows])


def publish(directory: Path, draft: Draft, config: dict[str, Any], recipe: Recipe) -> None:
    """Write a draft as research code does: a Llama's config and a few tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    published = {key: value for key, value in config.items() if key != "head_dim"}
    published["torch_dtype"] = str(recipe.dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    tensors = {
        name: tensor.detach().to("cpu", recipe.dtype).contiguous()
        for name, tensor in draft.state_dict().items()
    }
    if recipe.file.endswith(".bin"):
        torch.save(tensors, directory / recipe.file)
    else:
        save_file(tensors, directory / recipe.file, metadata={"format": "pt"})


def draft_config(verifier: Any, recipe: Recipe) -> dict[str, Any]:
    """The config.json of a draft of this verifier."""
    theirs = verifier.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_attention_heads": theirs.num_attention_heads,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": theirs.hidden_size // theirs.num_attention_heads,
        "num_hidden_layers": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "vocab_size": theirs.vocab_size,
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
        "pad_token_id": theirs.pad_token_id,
        "tie_word_embeddings": False,
        "use_cache": True,
    } | dict(recipe.config)


def main() -> None:
    """Train and publish the drafts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("verifier", help="a directory with a chat model")
    parser.add_argument("output", type=Path, help="where the drafts' directories are made")
    parser.add_argument("--gguf", help="the verifier's weights, if they are a GGUF file in there")
    parser.add_argument("--tokenizer", help="where it is, if not in the verifier's directory")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--start-from", type=Path, help="a published draft to go on from")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its peak")
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each draft")
    parser.add_argument("--rounds", type=int, default=2, help="of conversations")
    parser.add_argument("--batch", type=int, default=3072, help="conversations in a round")
    parser.add_argument("--question", type=int, default=64, help="tokens at most")
    parser.add_argument("--answer", type=int, default=256, help="tokens at most")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()

    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    verifier = AutoModelForCausalLM.from_pretrained(
        options.verifier, gguf_file=options.gguf, dtype=torch.float32
    ).to(options.device)
    verifier.requires_grad_(requires_grad=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.verifier)
    say(f"{sum(p.numel() for p in verifier.parameters()) / 1e6:.0f} M parameters")
    rounds: list[Conversations] = []
    writer = copy.deepcopy(verifier).to(torch.bfloat16)
    for _ in range(options.rounds):
        ids, answer = converse(writer, tokenizer, options.batch, options.question, options.answer)
        rounds.append(Conversations(ids, answer, torch.empty(0)))
        say(f"{len(ids)} conversations with {int(answer.sum())} tokens of answers")
        say(repr(tokenizer.decode(ids[0], skip_special_tokens=True)[-400:]))
    width = max(r.ids.shape[1] for r in rounds)
    ids = torch.cat([F.pad(r.ids, (0, width - r.ids.shape[1])) for r in rounds])
    answer = torch.cat([F.pad(r.answer, (0, width - r.answer.shape[1])) for r in rounds])
    data = Conversations(ids, answer, think(verifier, ids))
    say(f"hidden states {tuple(data.states.shape)}")
    report: dict[str, Any] = {"conversations": len(ids), "answer_tokens": int(answer.sum())}
    for name in options.recipes:
        recipe = RECIPES[name]
        config = draft_config(verifier, recipe)
        torch.manual_seed(0)
        draft = Draft(config, recipe).to(data.ids.device)
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        if options.start_from:
            start_from(draft, options.start_from, verifier, data)
        report[name] = train(draft, verifier, recipe, data, options)
        publish(options.output / name, draft, config, recipe)
        (options.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        say(f"{name}: {report[name]}")


if __name__ == "__main__":
    main()
