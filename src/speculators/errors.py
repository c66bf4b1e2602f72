"""Every error that speculators raises on purpose.

Each message is one sentence that says what is wrong, where (file or tensor), and
what to do. The command line prints it and exits with status 1.
"""

__all__ = [
    "CheckpointError",
    "ConversionError",
    "EvaluationError",
    "FormatError",
    "GenerationError",
    "HubError",
    "ManifestError",
    "NoWeightsError",
    "OutputError",
    "PromptsError",
    "SpeculatorsError",
    "UnsafeCheckpointError",
    "ValidationError",
    "VerifierError",
    "printable",
    "sentence",
]


class SpeculatorsError(Exception):
    """Base of all errors below: catch this one to catch them all."""


class CheckpointError(SpeculatorsError, ValueError):
    """A file of a checkpoint is missing, damaged, or of a kind that is not read."""


class NoWeightsError(CheckpointError):
    """A checkpoint has none of the files that weights are looked for in."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle asks for something other than rebuilding tensors; nothing of it was run."""


class ConversionError(SpeculatorsError, ValueError):
    """No conversion plan can be made: the tensors, the config and the flags do not agree."""


class VerifierError(SpeculatorsError, ValueError):
    """The verifier cannot be read, or does not fit the draft."""


class FormatError(SpeculatorsError, ValueError):
    """A directory is not in the speculators format, or breaks its rules."""


class GenerationError(SpeculatorsError, ValueError):
    """Speculation cannot give what the verifier alone would give with these settings."""


class ManifestError(SpeculatorsError, ValueError):
    """A batch's manifest cannot be read, or asks for what cannot be done."""


class OutputError(SpeculatorsError, OSError):
    """The output cannot be written where it was asked for."""


class EvaluationError(SpeculatorsError, ValueError):
    """A draft cannot be measured in the way that was asked for."""


class PromptsError(SpeculatorsError, ValueError):
    """A file of prompts is missing, empty, or has a line that is no prompt."""


class HubError(SpeculatorsError, OSError):
    """A file cannot be had from the Hugging Face Hub."""


class ValidationError(SpeculatorsError, ValueError):
    """A converted checkpoint does not hold or compute what its source does."""


def printable(text: str) -> str:
    """``text`` from a file as a message can show it: short, and without control characters."""
    return ascii(text[:100])[1:-1] + ("..." if len(text) > 100 else "")


def sentence(error: Exception) -> str:
    """What to tell a user of an error; of one that was not foreseen, what to do about it."""
    if isinstance(error, SpeculatorsError):
        return str(error)
    if isinstance(error, OSError):  # a disk or a file system that fails where nothing expects it
        return f"{error}."
    first, *_ = [*str(error).splitlines(), ""]
    return (
        f"This should not happen ({type(error).__name__}: {first}): run it again with --debug, and "
        "report what that prints."
    )
