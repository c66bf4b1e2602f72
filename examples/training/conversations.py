"""The conversations that drafts learn from: the verifier writes them itself."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from training.writing import Keeper, write

HELD_OUT = 256
"""Conversations that are held out from training, to measure the drafts."""

LIKELIEST = 32
"""How many of the verifier's likeliest next tokens a draft learns from: they hold nearly all of
the probability."""

DEEPEST = 4
"""The most steps of drafting, in training or measuring."""

GROUPS = 8
"""Into how many groups, by their length, the conversations of a round are put."""

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


@dataclass(frozen=True)
class Conversations:
    """The verifier's conversations and hidden states, padded at the right.

    There are at least ``DEEPEST`` tokens of padding.

    Attributes:
        layers: which of the verifier's states are kept; see ``writing.LAST``.
        ids: (conversations, length).
        begin: (conversations,), where the verifier's answer begins.
        size: (conversations,), the number of tokens of the answer.
        states: (conversations, length, len(layers) * hidden), bfloat16, the verifier's states.
        tokens: (conversations, length, ``LIKELIEST``), int32, the verifier's likeliest tokens after
            each, likeliest first; valid from the last token of the prompt on.
        shares: of that shape, bfloat16, their probabilities, normalised to the sum 1.

    """

    layers: tuple[int, ...]
    ids: Tensor
    begin: Tensor
    size: Tensor
    states: Tensor
    tokens: Tensor
    shares: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor, length: int | None = None) -> "Conversations":
        """Some of the conversations, cut to ``length``."""
        return replace(
            self,
            begin=self.begin[rows],
            size=self.size[rows],
            **{
                name: getattr(self, name)[:, :length][rows]
                for name in ("ids", "states", "tokens", "shares")
            },
        )

    def by_length(self, groups: int) -> list["Conversations"]:
        """The conversations in groups of similar length, so that little of them is padding."""
        ends = self.begin + self.size
        return [
            self.take(rows, int(ends[rows].max()) + DEEPEST)
            for rows in ends.argsort().chunk(groups)
        ]

    def read(self, layers: tuple[int, ...]) -> Tensor:
        """These of the states, concatenated: (conversations, length, len(layers) * hidden)."""
        if layers == self.layers:
            return self.states
        states = self.states.unflatten(-1, (len(self.layers), -1))
        chosen: Tensor = states[..., [self.layers.index(layer) for layer in layers], :]
        return chosen.flatten(-2)

    def in_answers(self) -> Tensor:
        """Whether tokens are of answers, (conversations, length)."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device) - self.begin[:, None]
        return (columns >= 0) & (columns < self.size[:, None])

    def some_states(self, layers: tuple[int, ...]) -> Tensor:
        """These states at some tokens, (tokens, width), float32.

        The first token of a conversation is an outlier, and is left out.
        """
        sample = self.take(torch.arange(min(len(self), 64)))
        columns = torch.arange(sample.ids.shape[1], device=sample.ids.device)
        seen = (columns > 0) & (columns < (sample.begin + sample.size)[:, None])
        return sample.read(layers)[seen].float()


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
    writer: Any, verifier: Any, tokenizer: Any, prompts: list[list[int]], most: int, keep: Keeper
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
        keep.layers,
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
    keep: Keeper,
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
            data += part.by_length(GROUPS)
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
