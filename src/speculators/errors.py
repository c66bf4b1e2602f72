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
    "OutputError",
    "PromptsError",
    "SpeculatorsError",
    "UnsafeCheckpointError",
    "ValidationError",
    "VerifierError",
]


class SpeculatorsError(Exception):
    """Base of all errors below: catch this one to catch them all."""


class CheckpointError(SpeculatorsError, ValueError):
    """A file of a checkpoint is missing, damaged, or of a kind that is not read."""


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
