"""The subject of an evaluation: a draft with its verifier, and the verifier's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from speculators.checkpoint.hub.client import watched_client
from speculators.checkpoint.hub.headers import headers_only
from speculators.checkpoint.reader import read_config, read_names
from speculators.checkpoint.repository import open_repository
from speculators.checkpoint.verifier import Verifier, open_verifier
from speculators.errors import (
    CheckpointError,
    EvaluationError,
    PromptsError,
    SpeculatorsError,
    VerifierError,
)
from speculators.evaluate.prompts import Prompt
from speculators.families.converted import Converted, open_converted
from speculators.models.loading import load_converted, without_progress_bar
from speculators.models.mtp import QwenMtp
from speculators.models.placement import device_of
from speculators.models.speculator import Speculator
from speculators.mtp.find import body_layers, find_mtp

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Subject", "load_subject"]

SPREAD = "auto"
"""The name of a device that stands for all of them."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A draft that is ready to be measured.

    Attributes:
        name: the draft's directory or Hub id.
        commit: the draft's commit on the Hub; ``None`` for a directory.
        draft: with the verifier attached.
        verifier: the model that the draft drafts for.
        verifier_name: its Hub id or directory, as given.
        tokenizer: the verifier's.

    """

    name: str
    commit: str | None
    draft: Speculator | QwenMtp
    verifier: PreTrainedModel
    verifier_name: str
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """The device for prompts."""
        return device_of(self.verifier.get_input_embeddings())

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are formatted by the verifier's chat template, not as plain text."""
        return self.tokenizer.chat_template is not None

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, formatted by the verifier's chat template if it has one.

        Without one, the messages are joined, with an empty line between them.

        Raises:
            PromptsError: if the template refuses the conversation, there are no tokens, or one is
                not in the verifier's vocabulary.

        """
        messages = [message.model_dump() for message in prompt.messages]
        try:
            if self.has_chat_template:
                text = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
                tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                text = "\n\n".join(message["content"] for message in messages)
                tokens = self.tokenizer(text)["input_ids"]
        except Exception as error:  # a template may raise whatever its author liked
            what = "chat template" if self.has_chat_template else "tokenizer"
            raise PromptsError(
                f"The verifier's {what} refuses prompt {prompt.id}: {error}"
            ) from error
        vocabulary = self.draft.verifier_vocab_size
        if not tokens or max(tokens) >= vocabulary:
            raise PromptsError(
                f"Prompt {prompt.id} has {f'token {max(tokens)}' if tokens else 'no tokens'}, but "
                f"the verifier knows {vocabulary}; its tokenizer belongs to another model."
            )
        return list(tokens)


def load_subject(
    directory: str | Path,
    *,
    verifier: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    cache_dir: Path | None = None,
    revision: str | None = None,
) -> Subject:
    """Load a converted draft or an MTP, its verifier and the verifier's tokenizer.

    Args:
        directory: the directory or Hub id of a converted draft, of an MTP that was cut out of its
            verifier, or of a verifier with its MTP.
        verifier: a directory or a Hub id; the one that the draft's config names if not given.
        dtype: of both models, by torch's name; ``auto`` for the one that the verifier is stored in.
        device: by torch's name; ``auto`` spreads the verifier over all accelerators, and into CPU
            memory if necessary; if not given, one accelerator if there is any, else ``cpu``.
        cache_dir: where downloads are kept.
        revision: a branch, tag or commit of the draft on the Hub.

    Raises:
        FormatError: if it is not a converted draft.
        VerifierError: if there is no verifier, it does not fit, or has no tokenizer.
        CheckpointError, HubError: if something cannot be read or downloaded.
        EvaluationError: if there is no such device.

    """
    place = None if device == SPREAD else _device(device)
    mtp = _find_mtp(directory, revision, cache_dir)
    if mtp is None:
        converted = open_converted(directory, revision=revision, cache_dir=cache_dir)
        opened, commit = _open_verifier(converted, verifier), converted.checkpoint.commit
    else:
        opened, commit = _verifier_of(mtp, verifier, cache_dir), mtp.commit
    options: dict[str, Any] = {"cache_dir": cache_dir}
    tokenizer = _load("tokenizer", AutoTokenizer, opened, options)
    options["dtype"] = dtype
    if place is None:
        options["device_map"] = "auto"
    with without_progress_bar():
        model = _load("weights", AutoModelForCausalLM, opened, options)
        if place is not None:
            model.to(place)
        draft: Speculator | QwenMtp
        if mtp is None:
            draft = load_converted(converted, verifier=model.eval(), dtype=model.dtype)
        else:
            draft = QwenMtp.load(
                directory, verifier=model.eval(), revision=revision, cache_dir=cache_dir
            ).to(model.dtype)
    # On the head's device, since the head computes the logits of all drafted tokens.
    draft.to(device_of(model.get_output_embeddings())).eval()  # type: ignore[arg-type]
    return Subject(
        name=str(directory),
        commit=commit,
        draft=draft,
        verifier=model,
        verifier_name=opened.name if verifier is None else str(verifier),
        tokenizer=tokenizer,
    )


@dataclass(frozen=True, slots=True)
class _MtpSource:
    """Where an MTP was found: the name, the commit, and whether its verifier is there, too."""

    name: str
    commit: str | None
    has_body: bool


def _find_mtp(
    directory: str | Path, revision: str | None, cache_dir: Path | None
) -> _MtpSource | None:
    """The MTP of a checkpoint in its verifier's own layout; ``None`` if there is none."""
    try:
        repository = open_repository(directory, revision=revision, cache_dir=cache_dir)
        config, _ = read_config(repository)
        if "speculators_model_type" in config:
            return None
        with headers_only(repository) as light:
            names = read_names(light)
    except CheckpointError:
        return None  # what is wrong is told where a converted draft is looked for
    mtp = find_mtp(config, names)
    if mtp is None or not mtp.slots:
        return None
    return _MtpSource(repository.name, repository.commit, bool(body_layers(mtp, names)))


def _verifier_of(mtp: _MtpSource, given: str | Path | None, cache_dir: Path | None) -> Verifier:
    """The verifier of an MTP: the one that is given, or the checkpoint that the MTP is in."""
    if given is None and not mtp.has_body:
        raise VerifierError(
            f"{mtp.name} is an MTP without its verifier; give that with --verifier."
        )
    return open_verifier(mtp.name if given is None else given, cache_dir=cache_dir)


def _open_verifier(converted: Converted, given: str | Path | None) -> Verifier:
    if given is not None:
        return converted.open_verifier(given)
    named = converted.config.speculators_config.verifier.name_or_path
    if named is None:
        raise VerifierError(
            f"{converted.directory} names no verifier in its config.json; give it with --verifier."
        )
    try:
        return converted.open_verifier()
    except SpeculatorsError as error:
        raise VerifierError(
            f"{error} The draft's config.json names it; give another with --verifier."
        ) from error


def _load(what: str, loader: Any, verifier: Verifier, options: dict[str, Any]) -> Any:
    try:
        with watched_client():  # so that no password in an endpoint's URL is logged
            return loader.from_pretrained(verifier.name, **options)
    except Exception as error:  # transformers lets errors of many kinds through
        reason = " ".join(str(error).split())
        raise VerifierError(
            f"The {what} of the verifier {verifier.name} cannot be loaded: {reason}"
        ) from error


def _device(name: str | None) -> torch.device:
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # both mean that torch has no such device
        reason = str(error).splitlines()[0].rstrip(".")
        raise EvaluationError(f"The device {name!r} cannot be used: {reason}.") from error
    return device
