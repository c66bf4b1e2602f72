"""The tests' own greedy speculative decoding, without caches or masks.

It shares only the weights with the product: the draft is evaluated by ``plain_draft``, and
trees are dictionaries of paths.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plain_draft import plain_draft
from speculators.models.eagle import EagleSpeculator

Path = tuple[int, ...]
"""The tokens after the root on the way to a node."""


class PlainDrafting:
    """The draft's log-probabilities of the next token after a path.

    Args:
        model: the draft, of a Llama layer and with its verifier attached.
        tokens: the confirmed tokens.

    """

    def __init__(self, model: EagleSpeculator, tokens: list[int]) -> None:
        assert model.verifier is not None
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert embedding is not None
        assert head is not None
        self.weights = dict(model.state_dict()) | {"embed_tokens.weight": embedding.weight}
        self.config = model.config.layer.to_dict() | dict(model.config.layer.rope_parameters)
        self.head = head.weight.double()
        self.tokens = tokens
        inputs = torch.tensor([tokens[:-1]])
        self.true_states = model.verifier.base_model(inputs).last_hidden_state[0].double()
        self.fed_back: dict[Path, Tensor] = {}

    def __call__(self, path: Path) -> Tensor:
        """The log-probabilities after the root and this path."""
        fed = [self.fed_back[path[:length]] for length in range(len(path))]
        states = torch.stack([*self.true_states, *fed])
        ids = torch.tensor([*self.tokens[1:], *path])
        self.fed_back[path] = plain_draft(self.weights, self.config, ids, states)[-1]
        return (self.head @ self.fed_back[path]).log_softmax(-1)


Drafting = Callable[[Path], Tensor]
"""The log-probabilities of the verifier's tokens after a path."""

Propose = Callable[[Drafting], set[Path]]


def plain_chain(length: int) -> Propose:
    def propose(draft: Drafting) -> set[Path]:
        path: Path = ()
        found = set()
        for _ in range(length):
            path = (*path, int(draft(path).argmax()))
            found.add(path)
        return found

    return propose


def plain_static_tree(ranks: Iterable[Path]) -> Propose:
    def propose(draft: Drafting) -> set[Path]:
        tokens: dict[Path, Path] = {(): ()}
        for node in sorted(ranks, key=len):
            above = tokens[node[:-1]]
            best = draft(above).sort(descending=True).indices
            tokens[node] = (*above, int(best[node[-1]]))
        return set(tokens.values()) - {()}

    return propose


def plain_dynamic_tree(nodes: int, depth: int, top_k: int) -> Propose:
    def propose(draft: Drafting) -> set[Path]:
        def children(path: Path, score: float) -> dict[Path, float]:
            best = draft(path).topk(top_k)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            return {(*path, token): score + value for token, value in pairs}

        level = children((), 0.0)
        candidates = dict(level)
        for _ in range(depth):
            best = sorted(level, key=level.__getitem__, reverse=True)[:top_k]
            level = {k: v for path in best for k, v in children(path, level[path]).items()}
            candidates |= level
        return set(sorted(candidates, key=candidates.__getitem__, reverse=True)[:nodes])

    return propose


def plain_speculation(
    model: EagleSpeculator, prompt: list[int], new_tokens: int, propose: Propose
) -> tuple[list[int], list[int], list[int]]:
    """Tokens; for each step, how many drafted tokens were accepted, how many in a row offered."""
    verifier = model.verifier
    assert isinstance(verifier, PreTrainedModel)
    return plain_steps(
        verifier, lambda tokens: PlainDrafting(model, tokens), prompt, new_tokens, propose
    )


def plain_steps(
    verifier: PreTrainedModel,
    drafting_after: Callable[[list[int]], Drafting],
    prompt: list[int],
    new_tokens: int,
    propose: Propose,
) -> tuple[list[int], list[int], list[int]]:
    """The same for any draft, given what it drafts after confirmed tokens."""

    def best(tokens: list[int]) -> int:
        return int(verifier(torch.tensor([tokens])).logits[0, -1].argmax())

    tokens = [*prompt, best(prompt)]
    accepted, offered = [], []
    while len(tokens) < len(prompt) + new_tokens:
        tree = propose(drafting_after(tokens))
        path: Path = ()
        while True:
            path = (*path, best([*tokens, *path]))
            if path not in tree:
                break
        accepted.append(len(path) - 1)
        offered.append(max(map(len, tree)))
        tokens += path
    return tokens[: len(prompt) + new_tokens], accepted, offered
