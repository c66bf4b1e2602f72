"""Paths as users give them."""

from collections.abc import Callable
from pathlib import Path

from speculators.errors import CheckpointError, SpeculatorsError, printable

__all__ = ["local_path"]


def local_path(
    given: str | Path, error: Callable[[str], SpeculatorsError] = CheckpointError
) -> Path:
    """A path as the user gave it, with ``~`` expanded.

    Args:
        given: the path.
        error: makes the error, given its sentence.

    Raises:
        SpeculatorsError: if it has a NUL or bytes that are not UTF-8, begins with ``~`` and the
            name of nobody, or is too long or otherwise impossible.

    """
    text = str(given)
    if "\0" in text or not _is_text(text):
        raise error(f"The path {printable(text)} has bytes that are no text; rename it.")
    try:
        path = Path(given).expanduser()
        path.exists()
    except RuntimeError:
        raise error(f"The path {text} begins with ~ and nobody's name; write it out.") from None
    except OSError as problem:
        shown = printable(text)
        raise error(f"The path {shown} cannot be looked up: {problem.strerror}.") from problem
    return path


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 are escaped as lone surrogates
        return False
    return True
