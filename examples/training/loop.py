"""The training of one draft."""

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.conversations import Conversations
from training.draft import Draft

BATCH = 64
"""Conversations per training step."""

SAVING = 60.0
"""A draft is published every so many seconds of training, in case that is cut off later."""


def train(
    draft: Draft,
    verifier: Any,
    data: list[Conversations],
    held_out: list[Conversations],
    options: argparse.Namespace,
    say: Callable[[str], None],
    save: Callable[[], None],
) -> dict[str, Any]:
    """Train one draft for ``options.seconds``; returns the measurements.

    Every now and then, ``say`` is told how far it is, and ``save`` is called.
    """
    optimizer = torch.optim.AdamW(
        draft.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    head = verifier.lm_head.weight.to(torch.bfloat16)
    embed = verifier.get_input_embeddings()
    sizes = [part.size.tolist() for part in data]  # a copy on the host, so as not to wait later
    queue = list[tuple[int, list[int]]]()
    began, steps, tokens, epochs, saved = time.perf_counter(), 0, 0, 0, 0.0
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
        loss = draft.loss(embed, head, batch, count)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 0.5)
        optimizer.step()
        steps, tokens = steps + 1, tokens + count
        if steps % 50 == 0 and head.is_cuda:
            torch.cuda.synchronize()  # or the host would run far ahead of the GPU
        if progress * options.seconds > saved + SAVING:
            saved = progress * options.seconds
            say(f"{steps} steps in {saved:.0f} s, loss {loss.item():.3f}")
            save()
    seen = {"seconds": options.seconds, "steps": steps, "epochs": epochs}
    draft.eval()
    measured = draft.measured(embed, verifier.lm_head.weight, held_out)
    return {**seen, "answer_tokens_seen": tokens, **measured}


def _batches(data: list[Conversations]) -> list[tuple[int, list[int]]]:
    """The batches of an epoch: a part, and conversations of it, which are of similar length."""
    batches = []
    for index, part in enumerate(data):
        rows = torch.randperm(len(part)).split(BATCH)
        batches += [(index, row.tolist()) for row in rows]
    random.shuffle(batches)
    return batches
