"""Every error that speculators raises on purpose.

Each message is one sentence that says what is wrong, where (file or tensor), and
what to do. The command line prints it and exits with status 1.
"""

from collections.abc import Collection, Iterable
from itertools import islice

__all__ = [
    "CheckpointError",
    "ConversionError",
    "EvaluationError",
    "FormatError",
    "GenerationError",
    "HubError",
    "IncompleteVerifierError",
    "InputError",
    "ManifestError",
    "NativeLayoutError",
    "NoWeightsError",
    "NotFetchedError",
    "OutputError",
    "PromptsError",
    "SpeculatorsError",
    "UnsafeCheckpointError",
    "ValidationError",
    "VerifierError",
    "did_you_mean",
    "nearest",
    "printable",
    "sentence",
    "visible",
]


class SpeculatorsError(Exception):
    """Base of all errors below: catch this one to catch them all."""


class CheckpointError(SpeculatorsError, ValueError):
    """A file of a checkpoint is missing, damaged, or of an unsupported kind."""


class NoWeightsError(CheckpointError):
    """A checkpoint has no weight files, or their headers cannot be read without the weights."""


class NotFetchedError(CheckpointError):
    """In place of weights there is only what names them: an index, or pointers of Git LFS."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle asks for more than rebuilding tensors; nothing in it was run."""


class ConversionError(SpeculatorsError, ValueError):
    """A checkpoint cannot be converted or exported with these tensors, config and flags."""


class NativeLayoutError(ConversionError):
    """A draft that the speculators format cannot express; some engines serve it as published.

    Attributes:
        served_by: these engines.

    """

    def __init__(self, message: str, served_by: Iterable[str]) -> None:
        super().__init__(message)
        self.served_by = frozenset(served_by)


class VerifierError(SpeculatorsError, ValueError):
    """The verifier cannot be read, or does not fit the draft."""


class IncompleteVerifierError(VerifierError):
    """A verifier whose weights are there, but not the matrix that a draft takes from it."""


class FormatError(SpeculatorsError, ValueError):
    """A directory is not in the speculators format, or breaks its rules."""


class GenerationError(SpeculatorsError, ValueError):
    """With these settings, speculation cannot produce what the verifier alone would."""


class InputError(SpeculatorsError, ValueError):
    """A draft is called with tensors or arguments that it does not take."""


class ManifestError(SpeculatorsError, ValueError):
    """A batch's manifest cannot be read, or asks for something impossible."""


class OutputError(SpeculatorsError, OSError):
    """The output cannot be written at the requested path."""


class EvaluationError(SpeculatorsError, ValueError):
    """A draft cannot be evaluated as requested, or a report cannot be read."""


class PromptsError(SpeculatorsError, ValueError):
    """A file of prompts is missing, empty, or has a line that is not a prompt."""


class HubError(SpeculatorsError, OSError):
    """Fetching from or uploading to the Hugging Face Hub failed."""


class ValidationError(SpeculatorsError, ValueError):
    """A converted checkpoint does not hold or compute what its source does."""


def printable(text: str) -> str:
    """Make text from a file safe to show in a message: short, without control characters."""
    return ascii(text[:100])[1:-1] + ("..." if len(text) > 100 else "")


def visible(text: str) -> str:
    """Text with its control characters escaped, so that it cannot forge a line or a colour."""
    if text.isprintable():
        return text
    return "".join(it if it.isprintable() else ascii(it)[1:-1] for it in text)


def listed(names: Collection[str], at_most: int = 4) -> str:
    """The first names, in their order, and how many more there are."""
    more = len(names) - at_most
    return ", ".join(islice(names, at_most)) + (f" and {more} more" if more > 0 else "")


def nearest(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The known word that somebody probably meant who wrote another one, if there is such a one.

    Args:
        word: what was written.
        known: what could have been meant.
        likeness: from 0 to 1, how alike the two have to be at least.

    """
    from difflib import get_close_matches

    spelt = {it.casefold(): it for it in known}
    found = get_close_matches(word.casefold(), spelt, n=1, cutoff=likeness)
    return spelt[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to add to a clause about a word that is not known; empty if no known one is near."""
    found = nearest(word, known)
    return f" (did you mean {found!r}?)" if found else ""


def sentence(error: Exception) -> str:
    """The sentence that reports an error to the user; for an unforeseen one, also what to do."""
    if isinstance(error, SpeculatorsError):
        return str(error)
    if isinstance(error, OSError):  # a disk or file system failed where nothing handles it
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}."
    first, *_ = [*str(error).splitlines(), ""]
    return (
        f"This should not happen ({type(error).__name__}: {first}): run it again with --debug, and "
        "report what that prints."
    )
