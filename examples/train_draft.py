"""Train the drafts of the examples: for a chat model, from nothing but that model.

The verifier writes its own training data. Its chat template is begun with a few words that people
open a request with, the verifier samples the rest of the request (as in Magpie, arXiv:2406.08464),
and then answers it greedily. While it answers, its hidden states and its likeliest next tokens are
kept: they are what a draft learns from. One layer learns to draft from the verifier's states, in
the forms in which research code publishes such drafts:

- eagle1: EAGLE-1's training, one step (arXiv:2401.15077, section 4.2); no fc.bias, float16, .bin.
- hass: the draft learns on its own outputs too, three steps deep, with the attention that it will
  have when it drafts (HASS, arXiv:2408.15766, section 3.2); fc.bias, bfloat16, safetensors.
- layernorms: the same, with the three extra norms of the layernorm variant.
- eagle3: EAGLE-3's training-time test (arXiv:2503.01840, section 3.2), three steps deep: the draft
  reads three of the verifier's states, learns only which token comes next, and has a head over the
  tokens that answers are mostly made of; bfloat16, safetensors, in SafeAILab's layout.
- eagle31: the same with EAGLE-3.1's norms, in SpecForge's layout.

A step of hass or layernorms costs three times as much, so these go on from the weights of eagle1
where it was trained in the same run; eagle31 goes on from eagle3's.

It imports nothing of speculators, so that a draft that drafts as well there as it did here shows
that the conversion and the model are right. It wants a GPU: minutes there, days without.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

HELD_OUT = 256
"""Conversations that are held out from training, to measure the drafts."""

BATCH = 64
"""Conversations per training step."""

LIKELIEST = 32
"""How many of the verifier's likeliest next tokens a draft learns from: they hold nearly all of
the probability."""

DEEPEST = 4
"""The most steps of drafting, in training or measuring."""

NOISE = 0.1
"""The largest noise added to the states in training, relative to their RMS (as EAGLE does)."""

ROOM = 36 * 2**30
"""Bytes of the GPU's memory to leave for writing and training."""

OPENERS = (
    *("", "", "", "", "", ""),
    # Writing
    *("Write a", "Write a short story about", "Write an essay about", "Write a poem about"),
    *("Compose an email", "Draft a letter to", "Write a blog post about", "Write a review of"),
    *("Rewrite the following", "Edit the following paragraph", "Describe a", "Suggest a title for"),
    *("Create a", "Come up with", "Write a speech", "Write the opening of", "Write a description"),
    # Roleplay
    *("Imagine you are", "Pretend to be", "You are a", "Act as a", "Picture yourself as"),
    *("Play the role of", "Take on the role of", "If you were a", "Speak as"),
    # Reasoning
    *("Is it true that", "Which of the following", "A man has", "There are three", "Suppose that"),
    *("What would happen if", "What is wrong with", "Who is", "Decide whether", "If all"),
    # Mathematics
    *(
        "Solve",
        "Calculate",
        "Find the",
        "How many",
        "What is the sum of",
        "A train",
        "A shop sells",
    ),
    *("What is the probability", "Simplify", "The area of", "Given that"),
    # Coding
    *("Write a Python function that", "Write a program", "Implement a", "Write code to"),
    *("How can I fix", "Explain this code", "Write a SQL query", "Write a bash script", "In C++,"),
    *("What does this function do", "Write an HTML page", "Write a JavaScript function"),
    # Extraction
    *("Extract the", "Summarize", "Translate", "List the", "Identify the", "Classify"),
    *("From the following text,", "Given the following", "Convert the following", "Count the"),
    # Science and technology
    *("Explain how", "Explain the concept of", "What is the", "What are the", "How does"),
    *("Why do", "Why is", "Describe the process of", "What is the difference between"),
    *("What causes", "Explain in simple terms", "How is"),
    # Humanities
    *("Compare", "Discuss", "What were the causes of", "Analyze", "What role did", "Who was"),
    *("How did", "Explain the meaning of", "What are the main arguments", "Give an overview of"),
    # Everyday
    *("How do I", "How can I", "Can you", "Could you help me", "I need", "I want to", "Give me"),
    *("What should I", "Plan a", "Recommend", "Tell me about", "Give me tips", "What is a good"),
)
"""What people begin requests to chat models with; empty for some."""


@dataclass(frozen=True)
class Recipe:
    """One way of training and publishing a draft."""

    steps: int
    """How many tokens deep the draft is trained on its own outputs."""
    dtype: torch.dtype
    file: str
    bias: bool = False
    layernorms: bool = False
    eagle3: bool = False
    eagle31: bool = False
    """For EAGLE-3: with the norms of EAGLE-3.1."""
    config: tuple[tuple[str, Any], ...] = ()
    """Keys of config.json in addition to the sizes."""


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
    "eagle3": Recipe(3, torch.bfloat16, "model.safetensors", eagle3=True),
    "eagle31": Recipe(
        3,
        torch.bfloat16,
        "model.safetensors",
        eagle3=True,
        eagle31=True,
        config=(
            ("architectures", ["LlamaForCausalLMEagle3"]),
            ("fc_norm", True),
            ("norm_output", True),
        ),
    ),
}


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        self.config = config
        hidden, head = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(width, heads * head, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head, bias=False)
        self.o_proj = nn.Linear(heads * head, hidden, bias=False)

    def forward(self, x: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attend as the draft does when it has drafted ``len(earlier)`` tokens.

        Index t then stands for position t + len(earlier). It attends to the first step's keys up to
        t, which come from the verifier's states, and to the key at index t of each later step.
        """
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._turned(q, len(earlier)), self._turned(k, len(earlier))
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        earlier.append((k, v))
        if len(earlier) == 1:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            past = torch.ones_like(own).tril()
            attended = F.scaled_dot_product_attention(
                q,
                torch.cat([key for key, _ in earlier], 2),
                torch.cat([value for _, value in earlier], 2),
                attn_mask=torch.cat([past, own.repeat(1, len(earlier) - 1)], 1),
            )
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
    """A decoder layer without an input norm, whose attention may take wider inputs."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.self_attn = Attention(config, width)
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
        return self.added(x, x, earlier)

    def added(self, x: Tensor, attending: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``x`` with what attention on ``attending`` and the MLP add to it."""
        x = x + self.self_attn(attending, earlier)
        y = self.post_attention_layernorm(x.float())
        gate, up, down = self.mlp.values()
        output: Tensor = x + down(F.silu(gate(y)) * up(y))
        return output


class FusingLayer(Layer):
    """EAGLE-3's layer, which attends with the embedding of the next token beside the state."""

    def __init__(self, config: dict[str, Any]) -> None:
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        super().__init__(config, 2 * hidden)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.hidden_norm = nn.RMSNorm(hidden, eps)

    def fused(self, embeddings: Tensor, x: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The next states from embeddings and states, all (batch, length, hidden)."""
        both = torch.cat((self.input_layernorm(embeddings), self.hidden_norm(x)), -1)
        return self.added(x, both, earlier).float()


class Draft(nn.Module):
    """The draft, with parameters named as in published checkpoints."""

    def __init__(self, config: dict[str, Any], recipe: Recipe) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.fc = nn.Linear(2 * hidden, hidden, bias=recipe.bias)
        self.layers = nn.ModuleList([Layer(config, hidden)])

        def norm() -> nn.Module:
            return (
                nn.RMSNorm(hidden, config["rms_norm_eps"]) if recipe.layernorms else nn.Identity()
            )

        self.embed_layernorm, self.hidden_layernorm, self.lm_head_layernorm = norm(), norm(), norm()

    def forward(
        self, embeddings: Tensor, states: Tensor, earlier: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The next states from embeddings and states, all (batch, length, hidden)."""
        fused = torch.cat((self.embed_layernorm(embeddings), self.hidden_layernorm(states)), -1)
        output: Tensor = self.layers[0](self.fc(fused), earlier).float()
        return output


def layers_read(verifier: Any) -> tuple[int, ...]:
    """The layers whose incoming states EAGLE-3's reference reads."""
    layers = verifier.config.num_hidden_layers
    return 2, layers // 2, layers - 3


class Eagle3Draft(nn.Module):
    """An EAGLE-3 draft, with tensors named as SafeAILab's.

    Args:
        config: its config.json.
        recipe: whether it is one of EAGLE-3.1.
        tokens: the verifier's tokens that it can draft, ascending.
        states: how many states it reads.

    """

    d2t: Tensor
    t2d: Tensor
    scale: Tensor

    def __init__(self, config: dict[str, Any], recipe: Recipe, tokens: Tensor, states: int) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.fc = nn.Linear(states * hidden, hidden, bias=False)
        # A few channels of a residual stream are a thousand times larger than the others. While
        # the draft is trained, they are all of one size; what is published has it in fc.
        self.register_buffer("scale", torch.ones(states * hidden), persistent=False)
        self.fc_norm = (
            nn.ModuleList(nn.RMSNorm(hidden, eps) for _ in range(states))
            if recipe.eagle31
            else None
        )
        self.midlayer = FusingLayer(config)
        self.norm = nn.RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, len(tokens), bias=False)
        self.register_buffer("d2t", tokens - torch.arange(len(tokens), device=tokens.device))
        t2d = torch.zeros(config["vocab_size"], dtype=torch.bool, device=tokens.device)
        self.register_buffer("t2d", t2d.index_fill(0, tokens, value=True))

    def read(self, states: Tensor) -> Tensor:
        """What the verifier's states, (..., states * hidden), become for the layer."""
        states = states.float()
        if self.fc_norm is not None:
            parts = states.chunk(len(self.fc_norm), -1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            states = torch.cat(normed, -1)
        read: Tensor = self.fc(states * self.scale)
        return read.float()

    def fed_back(self, x: Tensor) -> Tensor:
        """What the layer's output becomes for its next step."""
        return x if self.fc_norm is None else cast(Tensor, self.norm(x))

    def tensors(self) -> dict[str, Tensor]:
        """What is published."""
        return self.state_dict() | {"fc.weight": self.fc.weight.detach() * self.scale}

    def own(self, tokens: Tensor) -> Tensor:
        """Its own ids of the verifier's tokens, -1 for those that it does not have."""
        numbers = self.t2d.cumsum(0) - 1
        return numbers.masked_fill(~self.t2d, -1)[tokens]


@dataclass
class Conversations:
    """The verifier's conversations and hidden states, padded at the right.

    There are at least ``DEEPEST`` tokens of padding.

    Attributes:
        ids: (conversations, length).
        begin: (conversations,), where the verifier's answer begins.
        size: (conversations,), the number of tokens of the answer.
        states: (conversations, length, width), bfloat16, the verifier's states that the recipes
            learn from: the last one after the final norm, then those that EAGLE-3 reads.
        tokens: (conversations, length, ``LIKELIEST``), int32, the verifier's likeliest tokens after
            each, likeliest first; valid from the last token of the prompt on.
        shares: of that shape, bfloat16, their probabilities, normalised to the sum 1.

    """

    ids: Tensor
    begin: Tensor
    size: Tensor
    states: Tensor
    tokens: Tensor
    shares: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> "Conversations":
        """Some of the conversations."""
        return Conversations(*(getattr(self, field.name)[rows] for field in fields(self)))


def grouped_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention that treats the query heads of a key head as further query rows.

    So keys and values, nearly all that decoding a large batch reads, are never repeated.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    attended = F.scaled_dot_product_attention(
        query.reshape(query.shape[0], kv_heads, -1, query.shape[-1]),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, heads // kv_heads, 1),
        scale=scaling,
    )
    return attended.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)


class Room(DynamicLayer):
    """A cache layer in memory that is allocated once, so that no step copies it."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room, self.length = room, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _length, size = key_states.shape
            self.keys = key_states.new_empty(batch, heads, self.room, size)
            self.values = torch.empty_like(self.keys)
        rows = slice(self.length, self.length + key_states.shape[2])
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        keys[:, :, rows], values[:, :, rows] = key_states, value_states
        self.length = rows.stop
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """The number of tokens that it holds."""
        return self.length


Choose = Callable[[Tensor, int, Tensor], Tensor]
"""(indices of rows, column of the last token, states (rows, hidden)) → next tokens, (rows,)."""


Keep = Callable[[Tensor], Tensor]
"""The last hidden states of a pass, (..., hidden) → the states of that pass that are kept."""


def keeping(writer: Any, recipes: list[Recipe]) -> Keep:
    """What to keep of the writer's states for these recipes."""
    seen = dict[int, Tensor]()
    read = layers_read(writer) if any(recipe.eagle3 for recipe in recipes) else ()
    for layer in read:

        def note(_module: nn.Module, arguments: Any, layer: int = layer) -> None:
            seen[layer] = arguments[0]

        writer.model.layers[layer].register_forward_pre_hook(note)

    def keep(last: Tensor) -> Tensor:
        wanted = [] if all(recipe.eagle3 for recipe in recipes) else [last]
        return torch.cat([*wanted, *(seen[layer] for layer in read)], -1)

    return keep


@torch.inference_mode()
def write(
    writer: Any, prompts: list[list[int]], most: int, end: int, choose: Choose, keep: Keep
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue prompts until ``end``, by ``most`` tokens at most.

    Returns:
        the ids, padded at the left and filled up with ``end`` after the end of a text; the columns
        where prompts begin, (prompts,); and the states, where that of a last token may be missing.

    """
    device, width = writer.device, max(map(len, prompts))
    length = width + most
    ids = torch.full((len(prompts), length), end)
    ids[:, :width] = torch.tensor([[end] * (width - len(row)) + row for row in prompts])
    ids = ids.to(device)
    starts = torch.tensor([width - len(row) for row in prompts]).to(device)
    columns = torch.arange(length, device=device)
    positions = (columns - starts[:, None]).clamp(min=0)
    unseen = (columns < starts[:, None])[:, None, None]
    mask = torch.zeros(unseen.shape, dtype=writer.dtype, device=device)
    mask.masked_fill_(unseen, -math.inf)
    # Padding before a prompt attends to itself, since a fully masked row would give NaN.
    ahead = columns[:width] > columns[:width, None]
    itself = torch.eye(width, dtype=torch.bool, device=device)
    hidden_from = (ahead | unseen[..., :width]) & ~itself
    prompt_mask = torch.zeros(hidden_from.shape, dtype=writer.dtype, device=device)
    prompt_mask.masked_fill_(hidden_from, -math.inf)

    cache = Cache(layers=[Room(length) for _ in range(writer.config.num_hidden_layers)])
    thought = writer.model(
        ids[:, :width],
        attention_mask=prompt_mask,
        position_ids=positions[:, :width],
        past_key_values=cache,
    ).last_hidden_state
    kept = keep(thought)
    states = kept.new_zeros(len(prompts), length, kept.shape[-1])
    states[:, :width], thought = kept, thought[:, -1].clone()
    del kept
    del prompt_mask, hidden_from
    rows = torch.arange(len(prompts), device=device)
    over = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for column in range(width, length):
        token = choose(rows, column - 1, thought).masked_fill(over, end)
        ids[rows, column] = token
        over |= token == end
        if column + 1 == length:
            break
        if (column - width) % 16 == 15:  # only now and then, since it waits for the GPU
            going_on = (~over).nonzero().flatten()
            if not len(going_on):
                break
            if len(going_on) < 0.85 * len(rows):
                cache.batch_select_indices(going_on)
                rows, over, token = rows[going_on], over[going_on], token[going_on]
                mask, positions = mask[going_on], positions[going_on]
        thought = writer.model(
            token[:, None],
            attention_mask=mask[..., : column + 1],
            position_ids=positions[:, column, None],
            past_key_values=cache,
        ).last_hidden_state
        states[rows, column] = keep(thought)[:, 0]
        thought = thought[:, 0]
    return ids, starts, states


def ask(writer: Any, tokenizer: Any, questions: int, most: int) -> list[list[int]]:
    """Have the verifier make up questions; returns prompts that ask them."""
    end = tokenizer.eos_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    before, after = (
        tokenizer(text, add_special_tokens=False).input_ids for text in chat.split("?")
    )
    openers = [tokenizer(text, add_special_tokens=False).input_ids for text in OPENERS]
    prompts = [before + openers[index % len(openers)] for index in range(questions)]

    def choose(_rows: Tensor, _column: int, states: Tensor) -> Tensor:
        scores, tokens = writer.lm_head(states).topk(50)
        chosen = (scores.float() / 0.9).softmax(-1).multinomial(1)
        return cast(Tensor, tokens.gather(1, chosen)[:, 0])

    written = write(writer, prompts, most, end, choose, lambda states: states[..., :0])[0].tolist()
    width = len(written[0]) - most
    rows = []
    for prompt, row in zip(prompts, written, strict=True):
        said = row[width:]
        if end in said and len(prompt) - len(before) + said.index(end) >= 4:
            rows.append(prompt + said[: said.index(end)] + after)
    return rows


def answer(
    writer: Any, verifier: Any, tokenizer: Any, prompts: list[list[int]], most: int, keep: Keep
) -> Conversations:
    """Have the verifier answer, and keep its hidden states and likeliest tokens."""
    end, width, device = tokenizer.eos_token_id, max(map(len, prompts)), verifier.device
    likeliest = (len(prompts), width + most, LIKELIEST)
    tokens = torch.zeros(likeliest, dtype=torch.int32, device=device)
    shares = torch.zeros(likeliest, dtype=torch.bfloat16, device=device)

    def choose(rows: Tensor, column: int, states: Tensor) -> Tensor:
        scores, best = verifier.lm_head(states.float()).topk(LIKELIEST)
        tokens[rows, column] = best.int()
        shares[rows, column] = scores.softmax(-1).bfloat16()
        return cast(Tensor, best[:, 0])

    ids, starts, states = write(writer, prompts, most, end, choose, keep)
    sizes = []
    for row in ids[:, width:].tolist():
        sizes.append(unlooped(row[: row.index(end) + 1] if end in row else row))
    begin = torch.tensor([len(prompt) for prompt in prompts])
    size = torch.tensor(sizes)
    length = int((begin + size).max()) + DEEPEST
    columns = (starts[:, None] + torch.arange(length, device=device)).clamp(max=width + most - 1)
    each = torch.arange(len(prompts), device=device)[:, None]
    return Conversations(
        ids[each, columns],
        begin.to(device),
        size.to(device),
        states[each, columns].bfloat16(),
        tokens[each, columns],
        shares[each, columns],
    )


def unlooped(reply: list[int]) -> int:
    """The number of tokens of a reply to keep: a loop at its end is kept once only."""
    for period in range(1, 65):
        again = 0
        while again + period < len(reply) and reply[-1 - again] == reply[-1 - again - period]:
            again += 1
        if again >= max(16, 2 * period):
            return len(reply) - again
    return len(reply)


class SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy between the draft's predictions and the verifier's likeliest tokens.

    The gradient is computed along with the loss, so that one tensor of logits is enough.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, tokens: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss and the share of right guesses.

        Args:
            ctx: saves what backward needs.
            states: (n, hidden).
            head: (vocabulary, hidden); its dtype is used for the computation.
            tokens: (n, ``LIKELIEST``), the likeliest first.
            shares: (n, ``LIKELIEST``), their probabilities.

        """
        logits = states.to(head.dtype) @ head.T
        right = (logits.argmax(-1) == tokens[:, 0]).float().mean()
        guessed = logits.softmax(-1)
        del logits
        likely = guessed.gather(1, tokens).float().clamp(min=1e-30)
        loss = -(shares * likely.log()).sum(-1).mean()
        difference = guessed.scatter_add_(1, tokens, -shares.to(head.dtype))
        ctx.save_for_backward(((difference @ head).float() / len(states)).to(states.dtype))
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient with respect to the states."""
        (of_states,) = ctx.saved_tensors
        return of_states * gradients[0], None, None, None


def places(data: Conversations, tokens: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of the states that predict an answer's tokens, both (tokens,)."""
    device = data.ids.device
    row = torch.arange(len(data), device=device)
    row = row.repeat_interleave(data.size, output_size=tokens)
    nth = torch.arange(tokens, device=device) - (data.size.cumsum(0) - data.size)[row]
    return row, data.begin[row] + nth - 1


def losses(
    draft: nn.Module, embed: nn.Module, head: Tensor, data: Conversations, tokens: int, depth: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Loss and share of right guesses, for each of ``depth`` steps of drafting.

    At step j, index t takes token t+j+1 and the state at t+j or what stands in for it, and gives
    what stands in for the state at t+j+1, whose logits predict token t+j+2. ``tokens`` is the total
    number of answer tokens, passed so that nothing waits for the GPU to count them. The dtype of
    ``head``, the verifier's, is used for the computation.
    """
    if isinstance(draft, Eagle3Draft):
        return eagle3_losses(draft, embed, head.dtype, data, tokens, depth)
    assert isinstance(draft, Draft)
    return eagle1_losses(draft, embed, head, data, tokens, depth)


def eagle3_losses(
    draft: Eagle3Draft,
    embed: nn.Module,
    dtype: torch.dtype,
    data: Conversations,
    tokens: int,
    depth: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """See ``losses``: the cross-entropy with the verifier's likeliest tokens that the draft has."""
    row, learned = places(data, tokens)
    likeliest = draft.own(data.tokens[row, learned].long())
    shares = data.shares[row, learned].float().masked_fill(likeliest < 0, 0)
    embeddings = embed(data.ids)
    length = data.ids.shape[1] - depth
    earlier = list[tuple[Tensor, Tensor]]()

    def computing() -> Any:
        return torch.autocast(
            data.ids.device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32
        )

    with computing():
        x = draft.read(data.states[:, :length, -draft.fc.in_features :])
    for step in range(depth):
        with computing():
            x = draft.midlayer.fused(embeddings[:, step + 1 : step + 1 + length], x, earlier)
            logits = draft.lm_head(draft.norm(x[row, learned - step - 1]))
        scores = logits.float().log_softmax(-1)
        cross_entropy = -(shares * scores.gather(1, likeliest.clamp(min=0))).sum(-1).mean()
        yield cross_entropy, (scores.argmax(-1) == likeliest[:, 0]).float().mean()
        x = draft.fed_back(x)


def eagle1_losses(
    draft: Draft, embed: nn.Module, head: Tensor, data: Conversations, tokens: int, depth: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """See ``losses``: the cross-entropy, and how far the states are from the verifier's."""
    device, hidden = data.ids.device, head.shape[1]
    row, learned = places(data, tokens)
    wanted = data.states[row, learned, :hidden].float()
    likeliest, shares = data.tokens[row, learned].long(), data.shares[row, learned].float()
    embeddings = embed(data.ids)
    length = data.ids.shape[1] - depth
    states, earlier = data.states[:, :length, :hidden].float(), list[tuple[Tensor, Tensor]]()
    if draft.training:
        noise = 2 * torch.rand_like(states) - 1
        states = states + NOISE * states.square().mean(-1, keepdim=True).sqrt() * noise
    for step in range(depth):
        reduced = head.dtype != torch.float32
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
            states = draft(embeddings[:, step + 1 : step + 1 + length], states, earlier)
            guessed = states[row, learned - step - 1]
            normed = draft.lm_head_layernorm(guessed)
        cross_entropy, right = SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
            normed, head, likeliest, shares
        )
        yield cross_entropy + F.smooth_l1_loss(guessed.float(), wanted), right


@torch.inference_mode()
def start_from(
    draft: Draft, weights: dict[str, Tensor], verifier: Any, data: Conversations
) -> None:
    """Give a draft the weights of another, which may lack the bias and the extra norms.

    A bias that is lacking starts at zero, and a norm with the mean RMS of what it normalises, so
    that it changes as little as possible.
    """
    if draft.fc.bias is not None:
        draft.fc.bias.zero_()
    draft.load_state_dict(weights, strict=False)
    sample = data.take(torch.arange(min(len(data), 64)))
    answers = torch.arange(sample.ids.shape[1], device=sample.ids.device) - sample.begin[:, None]
    answers = (answers >= 0) & (answers < sample.size[:, None])
    states = sample.states[answers][:, : verifier.config.hidden_size].float()
    embeddings = verifier.get_input_embeddings()(sample.ids[answers])
    for norm, values in (
        (draft.embed_layernorm, embeddings),
        (draft.hidden_layernorm, states),
        (draft.lm_head_layernorm, states),
    ):
        if isinstance(norm, nn.RMSNorm):
            norm.weight.fill_(values.square().mean(-1).sqrt().mean())


@torch.inference_mode()
def begin_eagle3(
    draft: Eagle3Draft, weights: dict[str, Tensor] | None, verifier: Any, data: Conversations
) -> None:
    """Start from the verifier's final norm and its head's rows, or from another draft's weights.

    What the states are scaled by, or multiplied with after their norms, gives all channels the same
    size at first.
    """
    numbers = torch.arange(len(draft.d2t), device=draft.d2t.device)
    draft.lm_head.weight.copy_(verifier.lm_head.weight[numbers + draft.d2t])
    draft.norm.weight.copy_(verifier.model.norm.weight)
    if weights:
        draft.load_state_dict(weights, strict=False)
    columns = torch.arange(data.ids.shape[1], device=data.ids.device)
    seen = (columns > 0) & (columns < (data.begin + data.size)[:, None])  # the first is an outlier
    states = data.states[:64, :, -draft.fc.in_features :][seen[:64]].float()
    sizes = states.square().mean(0).sqrt().clamp(min=1e-3)
    if draft.fc_norm is None:
        draft.scale.copy_(1 / sizes)
        return
    parts = states.chunk(len(draft.fc_norm), -1)
    for norm, part, size in zip(draft.fc_norm, parts, sizes.chunk(len(draft.fc_norm)), strict=True):
        assert isinstance(norm, nn.RMSNorm)
        norm.weight.copy_(part.square().mean(-1).sqrt().median() / size)


def in_answers(data: list[Conversations]) -> Tensor:
    """All tokens of answers."""
    found = []
    for part in data:
        columns = torch.arange(part.ids.shape[1], device=part.ids.device) - part.begin[:, None]
        found.append(part.ids[(columns >= 0) & (columns < part.size[:, None])])
    return torch.cat(found)


def most_frequent(data: list[Conversations], size: int, vocabulary: int) -> Tensor:
    """The ids of the tokens that answers are mostly made of, ascending."""
    counts = in_answers(data).bincount(minlength=vocabulary)
    return counts.topk(size).indices.sort().values


def train(
    draft: nn.Module,
    verifier: Any,
    recipe: Recipe,
    data: list[Conversations],
    held_out: list[Conversations],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train one draft for ``options.seconds``; returns the measurements."""
    optimizer = torch.optim.AdamW(
        draft.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    head = verifier.lm_head.weight.to(torch.bfloat16)
    embed = verifier.get_input_embeddings()
    sizes = [part.size.tolist() for part in data]  # a copy on the host, so as not to wait later
    queue = list[tuple[int, list[int]]]()
    began, steps, tokens, epochs = time.perf_counter(), 0, 0, 0
    while (progress := (time.perf_counter() - began) / options.seconds) < 1:
        if not queue:
            queue, epochs = _batches(data), epochs + 1
        part, rows = queue.pop()
        count = sum(sizes[part][row] for row in rows)
        batch = data[part].take(torch.tensor(rows).to(head.device))
        for group in optimizer.param_groups:
            group["lr"] = (
                options.learning_rate * min(1, progress * 20) * (0.02 + 0.98 * (1 - progress))
            )
        per_step = [loss for loss, _ in losses(draft, embed, head, batch, count, recipe.steps)]
        if recipe.eagle3:  # the reference's weights of later steps (traineagle3/main.py)
            per_step = [0.8**step * loss for step, loss in enumerate(per_step)]
        optimizer.zero_grad()
        torch.stack(per_step).mean().backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 0.5)
        optimizer.step()
        steps, tokens = steps + 1, tokens + count
        if steps % 50 == 0 and head.is_cuda:
            torch.cuda.synchronize()  # or the host would run far ahead of the GPU
    return {
        "seconds": options.seconds,
        "steps": steps,
        "epochs": epochs,
        "answer_tokens_seen": tokens,
        "agreement_by_step": measure(draft, verifier, held_out),
    }


def _batches(data: list[Conversations]) -> list[tuple[int, list[int]]]:
    """The batches of an epoch: a part, and conversations of it, which are of similar length."""
    batches = []
    for index, part in enumerate(data):
        rows = torch.randperm(len(part)).split(BATCH)
        batches += [(index, row.tolist()) for row in rows]
    random.shuffle(batches)
    return batches


@torch.inference_mode()
def measure(draft: nn.Module, verifier: Any, held_out: list[Conversations]) -> list[float]:
    """How often a draft is right, by the number of tokens it has already drafted on its own."""
    draft.eval()
    right, total = torch.zeros(DEEPEST), 0
    for part in held_out:
        for rows in torch.arange(len(part)).split(32):
            batch = part.take(rows.to(part.ids.device))
            count = int(batch.size.sum())
            embed, head = verifier.get_input_embeddings(), verifier.lm_head.weight
            shares = [float(r) for _, r in losses(draft, embed, head, batch, count, DEEPEST)]
            right, total = right + count * torch.tensor(shares), total + count
    return [round(share, 4) for share in (right / total).tolist()]


def _split(part: Conversations, n: int) -> tuple[Conversations, Conversations]:
    """``n`` conversations spread over a part, and the others."""
    kept = torch.zeros(len(part), dtype=torch.bool)
    kept[:: max(2, -(-len(part) // max(1, n)))] = True
    kept = kept.to(part.ids.device)
    return part.take(kept), part.take(~kept)


def converse(
    writer: Any,
    verifier: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    say: Callable[[str], None],
    keep: Keep,
) -> tuple[list[Conversations], list[Conversations]]:
    """Run rounds of questions and answers until time is up.

    Returns:
        the conversations that are held out, and those for training.

    """
    held_out, data = list[Conversations](), list[Conversations]()
    began, batch, longest = time.perf_counter(), options.batch, 0.0
    while True:
        before = time.perf_counter()
        try:
            parts = list[Conversations]()
            prompts = sorted(ask(writer, tokenizer, 2 * batch, options.question), key=len)
            say(f"{len(prompts)} questions")
            half = -(-len(prompts) // 2)
            for chunk in (prompts[:half], prompts[half:]):
                if chunk:
                    parts.append(answer(writer, verifier, tokenizer, chunk, options.answer, keep))
        except torch.OutOfMemoryError:
            say(f"{batch} conversations do not fit")
            prompts, batch = [], batch // 2
        for part in parts:
            if len(held_out) < 2 and len(part) > 1:
                kept, part = _split(part, HELD_OUT // 2)  # noqa: PLW2901
                held_out.append(kept)
            data.append(part)
            say(f"{len(part)} conversations with {int(part.size.sum())} tokens of answers")
            text = tokenizer.decode(part.ids[len(part) // 2], skip_special_tokens=True)
            say(repr(text[-300:]))
        del parts
        now = time.perf_counter()
        longest = max(longest, now - before)
        full = False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            free, _total = torch.cuda.mem_get_info()
            full = free < ROOM
        if batch == 0 or (data and (full or now - began + longest > options.data_seconds)):
            return held_out, data


def publish(directory: Path, draft: nn.Module, config: dict[str, Any], recipe: Recipe) -> None:
    """Write a draft as research code does: a Llama config and a few tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    published = {key: value for key, value in config.items() if key != "head_dim"}
    published["torch_dtype"] = str(recipe.dtype).removeprefix("torch.")
    stored = draft.tensors() if isinstance(draft, Eagle3Draft) else draft.state_dict()
    (directory / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    tensors = {
        name: (tensor.to(recipe.dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in stored.items()
    }
    unfinished = directory / f"{recipe.file}.part"
    if recipe.file.endswith(".bin"):
        torch.save(tensors, unfinished)
    else:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(directory / recipe.file)


def draft_config(verifier: Any, recipe: Recipe) -> dict[str, Any]:
    """The config.json of a draft for this verifier."""
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


def begun(
    verifier: Any,
    recipe: Recipe,
    data: list[Conversations],
    options: argparse.Namespace,
    weights: dict[str, Tensor] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A draft before its training, and its config; it goes on from ``weights``, if given."""
    config = draft_config(verifier, recipe)
    torch.manual_seed(0)
    if recipe.eagle3:
        config |= {"intermediate_size": options.mlp, "draft_vocab_size": options.drafted}
        tokens = most_frequent(data, options.drafted, config["vocab_size"])
        draft: nn.Module = Eagle3Draft(config, recipe, tokens, len(layers_read(verifier)))
    else:
        draft = Draft(config, recipe)
    draft.to(verifier.device)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    if isinstance(draft, Eagle3Draft):
        begin_eagle3(draft, weights, verifier, data[0])
    elif isinstance(draft, Draft) and weights:
        start_from(draft, weights, verifier, data[0])
    return draft, config


def parsed() -> argparse.Namespace:
    """Parse the command line."""
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
    parser.add_argument(
        "--data-seconds",
        type=float,
        default=60,
        help="of writing conversations; one round at least",
    )
    parser.add_argument("--batch", type=int, default=4096, help="conversations written at a time")
    parser.add_argument("--question", type=int, default=80, help="tokens at most")
    parser.add_argument("--answer", type=int, default=256, help="tokens at most")
    parser.add_argument("--drafted", type=int, default=7168, help="tokens of an EAGLE-3 vocabulary")
    parser.add_argument("--mlp", type=int, default=768, help="width of an EAGLE-3 MLP")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main() -> None:
    """Train and publish the drafts."""
    options = parsed()
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)

    torch.manual_seed(0)
    random.seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would build a new plan for each length
    verifier = AutoModelForCausalLM.from_pretrained(
        options.verifier, gguf_file=options.gguf, dtype=torch.float32
    ).to(options.device)
    verifier.requires_grad_(requires_grad=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.verifier)
    say(f"{sum(p.numel() for p in verifier.parameters()) / 1e6:.0f} M parameters")
    writer = copy.deepcopy(verifier).to(torch.bfloat16)
    writer.set_attn_implementation("grouped")
    before = time.perf_counter()
    keep = keeping(writer, [RECIPES[name] for name in options.recipes])
    held_out, data = converse(writer, verifier, tokenizer, options, say, keep)
    del writer
    report: dict[str, Any] = {
        "conversations": sum(map(len, data)),
        "answer_tokens": sum(int(part.size.sum()) for part in data),
        "held_out_conversations": sum(map(len, held_out)),
        "data_seconds": round(time.perf_counter() - before, 1),
        "openers": len(set(OPENERS)) - 1,
    }
    say(f"{report}")
    weights = dict[bool, dict[str, Tensor]]()  # by Recipe.eagle3
    begun_from = dict[bool, str]()
    if options.start_from:
        weights[False] = torch.load(options.start_from / "pytorch_model.bin")
        begun_from[False] = options.start_from.name
    for name in options.recipes:
        recipe = RECIPES[name]
        draft, config = begun(verifier, recipe, data, options, weights.get(recipe.eagle3))
        trained = train(draft, verifier, recipe, data, held_out, options)
        report[name] = {"start_from": begun_from.get(recipe.eagle3), **trained}
        if isinstance(draft, Eagle3Draft):
            known = draft.t2d[in_answers(held_out)].float().mean()
            report[name]["known_tokens"] = round(known.item(), 4)
        publish(options.output / name, draft, config, recipe)
        (options.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        say(f"{name}: {report[name]}")
        if name in {"eagle1", "eagle3"}:
            weights[recipe.eagle3] = copy.deepcopy(draft.state_dict())
            begun_from[recipe.eagle3] = name


if __name__ == "__main__":
    main()
