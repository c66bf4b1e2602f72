"""Recording texts of a verifier, and adding states of further layers to a recording."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from speculators import __version__
from speculators.checkpoint.output.links import link_or_copy
from speculators.checkpoint.output.staging import staged_directory
from speculators.errors import EvaluationError
from speculators.evaluate.defaults import BATCH
from speculators.evaluate.prompts import Prompt
from speculators.evaluate.recording.manifest import (
    RECORDING,
    RECORDING_FILE,
    Identity,
    Manifest,
    RecordedPrompt,
    Recording,
    digest_of_prompts,
    layer_file,
    open_recording,
    text_file,
)
from speculators.evaluate.recording.shards import read_tokens
from speculators.evaluate.recording.texts import decode_texts, layer_states
from speculators.evaluate.report import Settings
from speculators.evaluate.subject.loading import LoadedVerifier

__all__ = ["add_layers", "record"]


def record(
    verifier: LoadedVerifier,
    identity: Identity,
    prompts: Sequence[Prompt],
    settings: Settings,
    output: Path,
    *,
    layers: Sequence[int] = (),
    longest_draft: int,
    batch_size: int = BATCH,
    overwrite: bool = False,
    moved: Callable[[float], None] = lambda _: None,
    done: Callable[[RecordedPrompt], None] = lambda _: None,
) -> Recording:
    """Decode prompts with a verifier, and keep the texts with its hidden states.

    Args:
        verifier: the verifier.
        identity: what it will be recognised by.
        prompts: at least one.
        settings: how to decode.
        output: the directory to create.
        layers: of the verifier, whose inputs to keep besides its last hidden states.
        longest_draft: the depth of the deepest proposals that can be scored.
        batch_size: how many prompts are decoded at the same time.
        overwrite: replace ``output`` if it is a recording.
        moved: called with the share of a prompt by which the work went on since the last call.
        done: called with each prompt that was recorded.

    Raises:
        PromptsError: if a prompt cannot be encoded for the verifier.
        GenerationError, EvaluationError: if the verifier cannot be decoded with, or does not have
            a layer.
        OutputError: if something is in the way at ``output``, or it cannot be written.

    """
    model, device = verifier.model, verifier.device
    encoded = [verifier.encode(prompt) for prompt in prompts]
    recorded: dict[int, RecordedPrompt] = {}
    with staged_directory(output, overwrite=overwrite, marker=RECORDING) as staging:
        for batch in _batches(list(map(len, encoded)), batch_size):
            share = len(batch) / (settings.max_new_tokens + longest_draft - 1)
            left = float(len(batch))

            def step(share: float = share) -> None:
                nonlocal left
                left -= share
                moved(share)

            torch.manual_seed(settings.seed + batch[0])
            texts = decode_texts(
                model,
                [encoded[index] for index in batch],
                settings,
                beyond=longest_draft - 1,
                device=device,
                advance=step,
            )
            for index, text in zip(batch, texts, strict=True):
                tensors = {"tokens": text.tokens, "states": text.states}
                if text.probabilities is not None:
                    tensors["probabilities"] = text.probabilities
                (staging / text_file(index)).write_bytes(save(tensors))
                recorded[index] = RecordedPrompt(
                    id=prompts[index].id,
                    category=prompts[index].category,
                    prompt_tokens=text.prompt_tokens,
                    new_tokens=text.new_tokens,
                )
                done(recorded[index])
            if layers:
                known = [text.tokens[: len(text.states)] for text in texts]
                _write_layers(staging, batch, layer_states(model, known, layers, device))
            moved(left)
        manifest = Manifest(
            speculators_version=__version__,
            verifier=identity,
            chat_template=verifier.has_chat_template,
            prompts_sha256=digest_of_prompts(prompts),
            settings=settings,
            dtype=str(model.dtype).removeprefix("torch."),
            longest_draft=longest_draft,
            layers=tuple(sorted({*layers})),
            prompts=[recorded[index] for index in range(len(prompts))],
        )
        _write_manifest(staging, manifest)
    return Recording(output, manifest)


def add_layers(
    recording: Recording,
    verifier: LoadedVerifier,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    batch_size: int = BATCH,
    moved: Callable[[float], None] = lambda _: None,
) -> Recording:
    """Add the states that enter further layers, by one pass over the recorded texts.

    The directory is replaced in one step; what it held is kept.

    Args:
        recording: the recording, which must be of this verifier.
        verifier: the verifier.
        prompts: those that were recorded.
        layers: of the verifier; those that are recorded already are left out.
        batch_size: how many texts are passed over at the same time.
        moved: called with the number of texts done since the last call.

    Raises:
        EvaluationError: if a prompt has other tokens than those recorded.
        GenerationError: if the verifier does not have a layer.
        OutputError: if it cannot be written.

    """
    directory, manifest = recording.directory, recording.manifest
    new = sorted({*layers} - {*manifest.layers})
    if not new:
        return recording
    lengths = [prompt.prompt_tokens + prompt.new_tokens for prompt in manifest.prompts]
    for index, prompt in enumerate(prompts):
        encoded = verifier.encode(prompt)
        if read_tokens(recording, index)[: manifest.prompts[index].prompt_tokens].tolist() != (
            encoded
        ):
            raise EvaluationError(
                f"The verifier's tokenizer gives other tokens for prompt {prompt.id} than when "
                f"{directory} was recorded; record again, into another directory."
            )
    with staged_directory(directory, overwrite=True, marker=RECORDING) as staging:
        for path in sorted(directory.iterdir()):
            if path.name != RECORDING_FILE:
                link_or_copy(path, staging / path.name)
        for batch in _batches(lengths, batch_size):
            known = [read_tokens(recording, index)[: lengths[index] - 1] for index in batch]
            _write_layers(staging, batch, layer_states(verifier.model, known, new, verifier.device))
            moved(len(batch))
        every = tuple(sorted({*manifest.layers, *new}))
        _write_manifest(staging, manifest.model_copy(update={"layers": every}))
    return open_recording(directory)


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of prompts, in groups of similar length so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _write_layers(staging: Path, batch: Sequence[int], states: Sequence[dict[int, Tensor]]) -> None:
    for index, by_layer in zip(batch, states, strict=True):
        for layer, of_layer in by_layer.items():
            (staging / layer_file(index, layer)).write_bytes(save({"states": of_layer}))


def _write_manifest(staging: Path, manifest: Manifest) -> None:
    text = manifest.model_dump_json(indent=2) + "\n"
    (staging / RECORDING_FILE).write_text(text, encoding="utf-8")
