"""The subject of an evaluation: a draft with its verifier, and the verifier's tokenizer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from speculators.checkpoint.hub.client import watched_client
from speculators.checkpoint.verifier import Verifier, check_loaded
from speculators.errors import EvaluationError, PromptsError, VerifierError
from speculators.evaluate.prompts import Prompt
from speculators.evaluate.report import Settings
from speculators.evaluate.subject.mtp import OpenedMtp
from speculators.evaluate.subject.opening import SPREAD, Opened
from speculators.models.loading import load_converted, without_progress_bar
from speculators.models.mtp import QwenMtp
from speculators.models.placement import device_of
from speculators.models.speculator import Speculator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "LoadedVerifier",
    "Subject",
    "generation_config",
    "load_subject",
    "load_verifier",
    "torch_device",
]


@dataclass(frozen=True, slots=True)
class LoadedVerifier:
    """A verifier that is ready to decode.

    Attributes:
        name: its Hub id or directory.
        model: the model.
        tokenizer: its tokenizer.

    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """The device for prompts."""
        return device_of(self.model.get_input_embeddings())

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
        vocabulary = len(self.model.get_output_embeddings().weight)
        if not tokens or max(tokens) >= vocabulary:
            raise PromptsError(
                f"Prompt {prompt.id} has {f'token {max(tokens)}' if tokens else 'no tokens'}, but "
                f"the verifier knows {vocabulary}; its tokenizer belongs to another model."
            )
        return list(tokens)


@dataclass(frozen=True, slots=True)
class Subject:
    """A draft that is ready to be measured.

    Attributes:
        name: the draft's directory or Hub id.
        commit: the draft's commit on the Hub; ``None`` for a directory.
        draft: with the verifier attached.
        verifier: the model that the draft drafts for.

    """

    name: str
    commit: str | None
    draft: Speculator | QwenMtp
    verifier: LoadedVerifier


def load_subject(
    opened: Opened | OpenedMtp,
    *,
    dtype: str = "auto",
    device: str | None = None,
) -> Subject:
    """Load a converted draft or an MTP, its verifier and the verifier's tokenizer.

    Args:
        opened: the draft and its verifier.
        dtype: of both models, as for ``load_verifier``.
        device: likewise.

    Raises:
        FormatError, CheckpointError, HubError: if the draft cannot be read or downloaded.
        VerifierError, EvaluationError: as for ``load_verifier``.

    """
    verifier = load_verifier(opened.verifier, opened.verifier_name, dtype=dtype, device=device)
    model = verifier.model
    draft: Speculator | QwenMtp
    with without_progress_bar():
        if isinstance(opened, Opened):
            draft = load_converted(opened.converted, verifier=model, dtype=model.dtype)
            repository = opened.converted.repository
        else:
            repository = opened.mtp.repository
            draft = QwenMtp.read(repository, opened.mtp.config, verifier=model).to(model.dtype)
    # On the head's device, since the head computes the logits of all drafted tokens.
    draft.to(device_of(model.get_output_embeddings())).eval()  # type: ignore[arg-type]
    return Subject(opened.name, repository.commit, draft, verifier)


def load_verifier(
    opened: Verifier,
    name: str | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
) -> LoadedVerifier:
    """Load a verifier and its tokenizer.

    Args:
        opened: the verifier.
        name: what it is called, if not by its own name.
        dtype: by torch's name; ``auto`` for the one that it is stored in.
        device: by torch's name; ``auto`` spreads it over all accelerators, and into CPU memory if
            necessary; if not given, one accelerator if there is any, else ``cpu``.

    Raises:
        VerifierError: if it cannot be loaded, is not complete, or has no tokenizer.
        EvaluationError: if there is no such device.

    """
    place = None if device == SPREAD else torch_device(device)
    hub = opened.repository.hub
    options: dict[str, Any] = {"cache_dir": hub.cache_dir, "token": hub.token}
    tokenizer = _load("tokenizer", AutoTokenizer, opened, options)
    options["dtype"] = dtype
    if place is None:
        options["device_map"] = "auto"
    with without_progress_bar():
        model, found = _load(
            "weights", AutoModelForCausalLM, opened, options | {"output_loading_info": True}
        )
    check_loaded(opened.name, found["missing_keys"])
    if place is not None:
        model.to(place)
    return LoadedVerifier(name or opened.name, model.eval(), tokenizer)


def generation_config(
    verifier: PreTrainedModel, settings: Settings, max_new_tokens: int
) -> GenerationConfig:
    """The verifier's generation config, with the settings of an evaluation applied.

    Tokens are sampled from the whole distribution or, with ``top_p``, a part of it.
    """
    generation = copy.deepcopy(verifier.generation_config) or GenerationConfig()
    generation.max_new_tokens = max_new_tokens
    generation.do_sample = settings.temperature > 0
    # A top_k of 0 is off. For None, generate would take the verifier's own, and in greedy decoding
    # warn that it is not used; its defaults do not do that.
    generation.temperature, generation.top_k, generation.top_p = (
        (settings.temperature, 0, settings.top_p) if settings.temperature else (1.0, 50, 1.0)
    )
    if generation.pad_token_id is None:  # unused in a batch of one, but generate wants it
        generation.pad_token_id = 0
    return generation


def torch_device(name: str | None) -> torch.device:
    """The device of this name; if not given, one accelerator if there is any, else ``cpu``.

    Raises:
        EvaluationError: if torch does not have it.

    """
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


def _load(what: str, loader: Any, verifier: Verifier, options: dict[str, Any]) -> Any:
    try:
        with watched_client():  # so that no password in an endpoint's URL is logged
            return loader.from_pretrained(verifier.name, **options)
    except Exception as error:  # transformers lets errors of many kinds through
        reason = " ".join(str(error).split())
        raise VerifierError(
            f"The {what} of the verifier {verifier.name} cannot be loaded: {reason}"
        ) from error
