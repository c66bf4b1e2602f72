"""The manifest of a recording: what was recorded, and whether it fits what is asked of it.

Without torch.

A recording is a directory. ``recording.json`` says what was recorded, and how. For each prompt a
safetensors file holds its text and the verifier's last hidden states, and further ones hold the
states of single layers:

    00000.safetensors            tokens, states, probabilities (of sampled texts)
    00000.layer-14.safetensors   states

``tokens``, (prompt + new + beyond), int64, are the prompt, the output, and the tokens that the
verifier would go on with after its end. Drafted tokens may reach that far. ``states``,
(prompt + new - 1, verifier width), are the verifier's at all tokens of prompt and output but the
last one. ``probabilities``, (new + beyond), float32, are those with which tokens were sampled.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic import ValidationError as PydanticValidationError

from speculators.checkpoint.output.staging import Marker
from speculators.checkpoint.paths import meant_path
from speculators.checkpoint.verifier import Verifier
from speculators.errors import EvaluationError
from speculators.evaluate.prompts import Prompt
from speculators.evaluate.report import Model, Settings
from speculators.format.problems import first_problem

__all__ = [
    "RECORDING",
    "RECORDING_FILE",
    "Identity",
    "Manifest",
    "RecordedPrompt",
    "Recording",
    "digest_of_prompts",
    "identify",
    "layer_file",
    "open_recording",
    "text_file",
]

RECORDING_FILE = "recording.json"

RECORDING = Marker("a recording of speculators", RECORDING_FILE, "speculators_recording")

SAMPLES, SAMPLE_BYTES = 64, 4096
"""How much of a file of weights is read to recognise it: so many pieces, evenly distributed."""


class Identity(Model):
    """What a verifier is recognised by, wherever it is."""

    name: str
    """Its Hub id, or the absolute path of its directory."""
    config_sha256: str
    """Of its config.json."""
    commit: str | None
    """On the Hub; ``null`` for a directory."""
    weights_sha256: str | None
    """Of samples of its files of weights, with their sizes; ``null`` on the Hub."""

    def is_same(self, other: "Identity") -> bool:
        """Whether both are the same model, as far as both know."""
        known = (
            (self.commit, other.commit),
            (self.weights_sha256, other.weights_sha256),
        )
        return self.config_sha256 == other.config_sha256 and all(
            one == another for one, another in known if one is not None and another is not None
        )


class RecordedPrompt(Model):
    """One prompt and the length of its text."""

    id: str
    category: str
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=1)


class Manifest(Model):
    """The whole recording.json."""

    model_config = ConfigDict(frozen=True)

    speculators_recording: Literal[1] = 1
    """The version of this schema."""
    speculators_version: str
    verifier: Identity
    chat_template: bool
    """Whether the verifier's chat template was applied; otherwise prompts are plain text."""
    prompts_sha256: str
    """Of the prompts, with their ids and categories."""
    settings: Settings
    dtype: str
    """That the verifier ran in, by torch's name."""
    longest_draft: int = Field(ge=1)
    """The depth of the deepest proposals that can be scored: texts go on so far after their end."""
    layers: tuple[int, ...]
    """Whose inputs were recorded besides the verifier's last hidden states: i stands for the
    residual stream that enters decoder layer i."""
    prompts: list[RecordedPrompt]


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording on this machine."""

    directory: Path
    manifest: Manifest

    def check_verifier(self, verifier: Identity, of: str) -> None:
        """Check that it is the verifier that was recorded.

        Args:
            verifier: the other one.
            of: whose it is, for the message.

        Raises:
            EvaluationError: if it is another.

        """
        recorded = self.manifest.verifier
        if not recorded.is_same(verifier):
            raise EvaluationError(
                f"{self.directory} is a recording of {recorded.name}, but the verifier of {of} is "
                f"{verifier.name}, which is a different model; record that one."
            )

    def check_layers(self, layers: Iterable[int], draft: str) -> None:
        """Check that the states that a draft reads were recorded.

        Raises:
            EvaluationError: if not.

        """
        wanted = sorted({*layers})
        if missing := sorted({*wanted} - {*self.manifest.layers}):
            numbers = ",".join(map(str, sorted({*wanted, *self.manifest.layers})))
            raise EvaluationError(
                f"{draft} reads states of the verifier that {self.directory} does not have (those "
                f"entering its layers {', '.join(map(str, missing))}); add them: speculators "
                f"record {self.manifest.verifier.name} {self.directory} --layers {numbers}, with "
                "the same other options as before."
            )

    def check_depth(self, depth: int) -> None:
        """Check that texts go on far enough for proposals of this depth.

        Raises:
            EvaluationError: if not.

        """
        if depth > self.manifest.longest_draft:
            raise EvaluationError(
                f"{self.directory} was recorded for drafts of up to {self.manifest.longest_draft} "
                f"tokens in a row, not {depth}; record again with --longest-draft {depth}."
            )

    def check_settings(
        self, prompts: Sequence[Prompt] | None = None, **given: str | float | None
    ) -> None:
        """Check that what was asked for is what was recorded.

        Args:
            prompts: those asked for, if any were.
            **given: settings by the names of their options; ``None`` if not asked for.

        Raises:
            EvaluationError: if it is not.

        """
        manifest, settings = self.manifest, self.manifest.settings
        recorded = {
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            "limit": settings.prompts_total,
            "dtype": manifest.dtype,
            "longest_draft": manifest.longest_draft,
        }
        for name, value in given.items():
            if value is not None and value != recorded[name]:
                raise EvaluationError(
                    f"{self.directory} was recorded with {recorded[name]} as its "
                    f"--{name.replace('_', '-')}, not {value}; give the same, or record again."
                )
        if prompts is not None and digest_of_prompts(prompts) != manifest.prompts_sha256:
            raise EvaluationError(
                f"{self.directory} was recorded with other prompts "
                f"({settings.prompts_file or 'those that come with speculators'}, "
                f"{settings.prompts_total} of them); give the same, or record again."
            )


def open_recording(directory: Path) -> Recording:
    """Read the manifest of a recording.

    Raises:
        EvaluationError: if there is none, or a file is missing.

    """
    file = directory / RECORDING_FILE
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        meant = "" if directory.exists() else meant_path(directory)
        raise EvaluationError(
            f"{file} cannot be read ({error.strerror}){meant}; give what 'speculators record' "
            "wrote."
        ) from error
    except PydanticValidationError as error:
        raise EvaluationError(
            f"{file} is not the manifest of a recording: {first_problem(error)}."
        ) from error
    for index in range(len(manifest.prompts)):
        for name in (text_file(index), *(layer_file(index, it) for it in manifest.layers)):
            if not (directory / name).is_file():
                raise EvaluationError(f"{directory} lacks {name}; record again.")
    return Recording(directory, manifest)


def text_file(index: int) -> str:
    """The name of the file with the text of a prompt, by its number from 0."""
    return f"{index:05}.safetensors"


def layer_file(index: int, layer: int) -> str:
    """The name of the file with the states that enter a layer."""
    return f"{index:05}.layer-{layer}.safetensors"


def digest_of_prompts(prompts: Iterable[Prompt]) -> str:
    """The SHA-256 of prompts, by their content."""
    content = [
        [prompt.id, prompt.category, *([it.role, it.content] for it in prompt.messages)]
        for prompt in prompts
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def identify(verifier: Verifier) -> Identity:
    """Tell which model a verifier is; nothing but its config is fetched from the Hub.

    Raises:
        HubError: if its config cannot be fetched.
        OSError: if a file of weights cannot be read.

    """
    config = verifier.repository.file("config.json")
    assert config is not None, "the verifier was opened"
    commit = verifier.repository.commit
    weights = [
        path for path in config.parent.iterdir() if path.suffix in {".safetensors", ".bin", ".pt"}
    ]
    return Identity(
        name=verifier.name,
        config_sha256=hashlib.sha256(config.read_bytes()).hexdigest(),
        commit=commit,
        weights_sha256=None if commit or not weights else _sampled(sorted(weights)),
    )


def _sampled(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for piece in range(SAMPLES):
                file.seek(piece * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
