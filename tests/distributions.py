"""The exact distribution of sampled sequences, and a test whether samples follow one."""

import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny_models import tiny_verifier

VOCABULARY = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.6},
    "top_k": {"top_k": 3, "temperature": 1.3},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "repetition_penalty": {"top_k": 0, "repetition_penalty": 1.7},
}
TOKENS = 3


def small_verifier() -> PreTrainedModel:
    """A verifier with so few tokens that all sequences can be counted."""
    model = tiny_verifier(context=0.1, initializer_range=0.25, vocab_size=VOCABULARY)
    model.generation_config.pad_token_id = None
    return model


def chi_square_is_likely(counts: Counter[Any], probabilities: dict[Any, float]) -> bool:
    """Pearson's chi-square test at the level of 1e-4; rare outcomes are pooled.

    The quantile is by Wilson and Hilferty (1931).
    """
    draws = sum(counts.values())
    impossible = [outcome for outcome in counts if probabilities.get(outcome, 0.0) == 0.0]
    if impossible:
        return False
    cells = [(counts[o], p * draws) for o, p in probabilities.items() if p * draws >= 8]
    rare_counts = draws - sum(count for count, _ in cells)
    rare_expected = draws - sum(expected for _, expected in cells)
    if rare_expected >= 8:
        cells.append((rare_counts, rare_expected))
    else:
        assert rare_counts <= 40
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    degrees = len(cells) - 1
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3
    return bool(statistic < quantile)


def transform(scores: Tensor, before: list[int], settings: dict[str, Any]) -> Tensor:
    """Probabilities from logits under sampling settings, written here from their definitions."""
    if "repetition_penalty" in settings:
        penalty = settings["repetition_penalty"]
        for token in set(before):
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    scores = scores / settings.get("temperature", 1.0)
    if settings["top_k"]:
        scores[scores < scores.sort(descending=True).values[settings["top_k"] - 1]] = -torch.inf
    p = scores.softmax(-1)
    if "top_p" in settings:
        order = p.argsort(descending=True)
        before_it = p[order].cumsum(0) - p[order]
        p[order[before_it >= settings["top_p"]]] = 0
    return p / p.sum()


def analytic(
    verifier: PreTrainedModel, prompt: list[int], settings: dict[str, Any]
) -> dict[tuple[int, ...], float]:
    """The probability of each sequence of ``TOKENS`` tokens after a prompt."""
    found = {}
    tails = list(itertools.product(range(VOCABULARY), repeat=TOKENS))
    ids = torch.tensor([[*prompt, *tail] for tail in tails], device=verifier.device)
    with torch.no_grad():
        logits = verifier(ids).logits.double().cpu()
    for row, tail in zip(logits, tails, strict=True):
        probability = 1.0
        for i, token in enumerate(tail):
            before = [*prompt, *tail[:i]]
            p = transform(row[len(prompt) - 1 + i].clone(), before, settings)
            probability *= float(p[token])
        found[tail] = probability
    return found
