"""The verifier's side of a draft, without torch: its sizes, its head, its embedding."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.reader import read_config, read_tensors
from speculators.checkpoint.repository import LocalDirectory, Repository, open_repository
from speculators.checkpoint.tensor import FLOATS, TensorInfo, describe_shape
from speculators.errors import (
    CheckpointError,
    IncompleteVerifierError,
    VerifierError,
    listed,
)

__all__ = ["TEXT_CONFIGS", "Verifier", "check_loaded", "language_model_config", "open_verifier"]

# As transformers 5.19 names them: what `_tied_weights_keys` ties in its models, the attributes that
# `get_input_embeddings` and `get_output_embeddings` return, and the names in older checkpoints that
# its `conversion_mapping` renames. Files of models of several parts have their language model's
# tensors below one of these.
PARTS = (
    "",
    "model.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
    "model.language_model.model.",
    "text_model.",
    "text_model.model.",
    "model.text_model.",
    "model.decoder.",
    "decoder.",
    "language_model.decoder.",
    "language_model.model.decoder.",
    "thinker.",
    "thinker.model.",
    "llm.",
    "llm.model.",
    "model.llm.",
)
HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "output.weight",
    "output_layer.weight",
    "transformer.output_layer.weight",
    "output_projection.weight",
    "lm_head.out_proj.weight",
    "lm_head.linear.weight",
    "proj_out.weight",
    "head.weight",
    "unembed.weight",
    # Quantized, so that the embedding is not taken in their place.
    "lm_head.qweight",
    "lm_head.weight_packed",
)
EMBEDDINGS = (
    "embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.word_embeddings.weight",
    "transformer.embedding.word_embeddings.weight",
    "transformer.tokens_embed.weight",
    "transformer.embeddings.weight",
    "gpt_neox.embed_in.weight",
    "gpt_neox_japanese.embed_in.weight",
    "backbone.embeddings.weight",
    "backbone.embedding.weight",
    "rwkv.embeddings.weight",
    "biogpt.embed_tokens.weight",
    "embeddings.tok_embeddings.weight",
    "embed_tokens.embed_tokens.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
    "embeddings.weight",
    "embedding.weight",
    "embed_in.weight",
    "shared.weight",
    "wte.weight",
    "embed.weight",
)
HEAD_NAMES = tuple(part + name for name in HEADS for part in PARTS)
EMBEDDING_NAMES = tuple(part + name for name in EMBEDDINGS for part in PARTS)
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys whose object is the language model's config in those of models of several parts (InternVL,
DeepSeek-VL, Qwen-Omni); it may have one of these itself. One without sizes is about something
else."""
SIZES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
}
"""Size → the keys by which configs give it."""
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
        tied: whether its config.json says that the head is the embedding; ``None`` if it says
            nothing. A head that is stored is the head in any case.
        repository: where its files are.
        layers: the number of its decoder layers, if its config.json says so.

    """

    name: str
    architectures: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    tied: bool | None
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
                    f"The draft does not fit the verifier {self.name}: its {what} is {draft}, but "
                    f"the verifier's is {verifier}; give the model that it was trained for."
                )

    def head(self) -> TensorInfo:
        """The output head, which maps hidden states to logits: (vocabulary, hidden).

        The one that is stored, or the embedding if there is none and the config does not say that
        the two differ. Nothing more is fetched than the weight file that holds it.

        Raises:
            IncompleteVerifierError: if the weights are there, but no head of the right shape.
            VerifierError: if its dtype is not one of ``FLOATS``.
            CheckpointError, HubError: if the weights cannot be read or fetched.

        """
        info = self._find(HEAD_NAMES)
        if info is None and self.tied is not False:
            info = self._find(EMBEDDING_NAMES)
        return self._checked(info, "output head", HEADS)

    def embedding(self) -> TensorInfo:
        """The embedding of its tokens, (vocabulary, hidden); see ``head``."""
        return self._checked(self._find(EMBEDDING_NAMES), "embedding", EMBEDDINGS)

    def _find(self, names: Sequence[str]) -> TensorInfo | None:
        """The first tensor of these names, one of the right shape if there is any."""
        tensors = read_tensors(self.repository, only=names)
        found = [tensors[name] for name in names if name in tensors]
        fitting = (it for it in found if it.shape == (self.vocab_size, self.hidden_size))
        return next(fitting, found[0] if found else None)

    def _checked(self, info: TensorInfo | None, what: str, names: Sequence[str]) -> TensorInfo:
        if info is None:
            why = (
                " and its config.json says that it is not the embedding (tie_word_embeddings)"
                if what == "output head" and self.tied is False
                else ""
            )
            raise IncompleteVerifierError(
                f"The verifier {self.name} has no tensor for its {what}: none is called "
                f"{', '.join(names[:3])} or the like{why}; give the complete model."
            )
        if info.dtype not in FLOATS:
            raise VerifierError(
                f"The verifier {self.name} has its {what} ({info.name}) in the type {info.dtype}; "
                f"one of {', '.join(FLOATS)} is read."
            )
        if info.shape != (self.vocab_size, self.hidden_size):
            raise IncompleteVerifierError(
                f"The verifier {self.name} has an {what} ({info.name}) of shape "
                f"{describe_shape(info.shape)}, but its config.json says "
                f"{describe_shape((self.vocab_size, self.hidden_size))}."
            )
        return info


def open_verifier(base_model: str | os.PathLike[str], hub: HubAccess = DEFAULT_ACCESS) -> Verifier:
    """Read a verifier's config.json; its weights are not touched.

    Args:
        base_model: a directory or a Hub id.
        hub: the cache and the token.

    Raises:
        VerifierError: if there is no config, or it is not that of a language model.
        HubError: if it cannot be fetched from the Hub.

    """
    try:
        repository = open_repository(base_model, hub)
        config, config_file = read_config(repository)
    except CheckpointError as error:
        raise VerifierError(f"The verifier cannot be read: {error}") from error
    if "speculators_model_type" in config:
        raise VerifierError(
            f"The verifier {repository.name} is a draft in the speculators format itself; "
            "give the model that the draft was trained for."
        )
    text = language_model_config(config)
    sizes = {size: _first(text, keys) for size, keys in SIZES.items()}
    layers = _first(text, LAYER_COUNTS)
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and all(isinstance(it, str) for it in architectures)
    hidden, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    if (
        not isinstance(hidden, int)
        or not isinstance(vocabulary, int)
        or not (architectures and named)
    ):
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
        hidden_size=hidden,
        vocab_size=vocabulary,
        # In models of several parts either of the two may say it.
        tied=any(said) if (said := _flags(config, text, "tie_word_embeddings")) else None,
        repository=repository,
        layers=layers if type(layers) is int else None,
    )


def check_loaded(name: str, missing: Collection[str]) -> None:
    """Check that a verifier was loaded whole: transformers makes up at random what is missing.

    Args:
        name: of the verifier, for messages.
        missing: the ``missing_keys`` of the loading info of transformers.

    Raises:
        VerifierError: if there are some.

    """
    if missing:
        raise VerifierError(
            f"The verifier {name} lacks {listed(sorted(missing))}; give a complete checkpoint of "
            "the language model."
        )


def language_model_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json; the whole if it has no parts."""
    for key in TEXT_CONFIGS:
        if isinstance(nested := config.get(key), dict):
            part = language_model_config(nested)
            if any(_first(part, keys) is not None for keys in SIZES.values()):
                return part
    return config


def _first(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first of these keys that a config gives."""
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _flags(config: Mapping[str, Any], text: Mapping[str, Any], key: str) -> list[bool]:
    return [it[key] for it in (config, text) if isinstance(it.get(key), bool)]
