"""The verifier's side of a draft, without torch: its sizes, its head, its embedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.checkpoint.reader import read_config, read_tensors
from speculators.checkpoint.repository import LocalDirectory, Repository, open_repository
from speculators.checkpoint.tensor import FLOATS, TensorInfo, describe_shape
from speculators.errors import CheckpointError, VerifierError

__all__ = ["Verifier", "open_verifier"]

HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight")
EMBEDDING_NAMES = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""The keys by which configs give the number of decoder layers."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a draft needs to know about its verifier.

    Attributes:
        name: the Hub id, or the absolute path of the directory.
        architectures: from its config.json.
        hidden_size: the size of its last hidden states.
        vocab_size: the number of rows of its head.
        tied: whether the head is the embedding.
        repository: where its files are.
        layers: the number of its decoder layers, if its config.json says so.

    """

    name: str
    architectures: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    tied: bool
    repository: Repository
    layers: int | None = None

    def check_fits(self, hidden_size: int, vocab_size: int) -> None:
        """Check that a draft of these sizes can be used with this verifier.

        Raises:
            VerifierError: if not.

        """
        for what, draft, verifier in (
            ("hidden size", hidden_size, self.hidden_size),
            ("vocabulary", vocab_size, self.vocab_size),
        ):
            if draft != verifier:
                raise VerifierError(
                    f"The draft does not fit the verifier {self.name}: its {what} is {draft}, "
                    f"the verifier's is {verifier}; give the model that it was trained for."
                )

    def head(self) -> TensorInfo:
        """The output head, which maps hidden states to logits: (vocabulary, hidden).

        Nothing more is fetched than the weight file that holds it.

        Raises:
            VerifierError: if there is none, or its shape or dtype is wrong.
            CheckpointError, HubError: if the weights cannot be read or fetched.

        """
        return self._matrix("output head", EMBEDDING_NAMES if self.tied else HEAD_NAMES)

    def embedding(self) -> TensorInfo:
        """The embedding of its tokens, (vocabulary, hidden); see ``head``."""
        return self._matrix("embedding", EMBEDDING_NAMES)

    def _matrix(self, what: str, names: Sequence[str]) -> TensorInfo:
        tensors = read_tensors(self.repository, only=names)
        info = next((tensors[name] for name in names if name in tensors), None)
        if info is None:
            raise VerifierError(
                f"The verifier {self.name} has no tensor for its {what}: "
                f"none of {', '.join(names)} is there."
            )
        if info.dtype not in FLOATS:
            raise VerifierError(
                f"The verifier {self.name} has its {what} ({info.name}) in the type {info.dtype}; "
                f"one of {', '.join(FLOATS)} is read."
            )
        if info.shape != (self.vocab_size, self.hidden_size):
            raise VerifierError(
                f"The verifier {self.name} has an {what} ({info.name}) of shape "
                f"{describe_shape(info.shape)}, its config.json says "
                f"{describe_shape((self.vocab_size, self.hidden_size))}."
            )
        return info


def open_verifier(base_model: str | Path, *, cache_dir: str | Path | None = None) -> Verifier:
    """Read a verifier's config.json; its weights are not touched.

    Raises:
        VerifierError: if there is no config, or it is not that of a language model.
        HubError: if it cannot be fetched from the Hub.

    """
    try:
        repository = open_repository(base_model, cache_dir=cache_dir)
        config, config_file = read_config(repository)
    except CheckpointError as error:
        raise VerifierError(f"The verifier cannot be read: {error}") from error
    if "speculators_model_type" in config:
        raise VerifierError(
            f"The verifier {repository.name} is a draft in the speculators format itself; "
            "give the model that the draft was trained for."
        )
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) and nested else config
    sizes = {key: text.get(key) for key in ("hidden_size", "vocab_size")}
    layers = next((text[key] for key in LAYER_COUNTS if key in text), None)
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and all(isinstance(it, str) for it in architectures)
    if not all(isinstance(size, int) for size in sizes.values()) or not architectures or not named:
        raise VerifierError(
            f"{config_file} does not give hidden_size, vocab_size and architectures, "
            "so it is not a verifier's config."
        )
    return Verifier(
        name=(
            str(repository.path.resolve())
            if isinstance(repository, LocalDirectory)
            else repository.name
        ),
        architectures=tuple(architectures),
        hidden_size=text["hidden_size"],
        vocab_size=text["vocab_size"],
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        repository=repository,
        layers=layers if type(layers) is int else None,
    )
