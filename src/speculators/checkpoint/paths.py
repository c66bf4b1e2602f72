"""Paths as users give them."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from speculators.errors import CheckpointError, SpeculatorsError, nearest, printable, visible

__all__ = ["local_path", "meant_path"]

MAX_NAMES = 2000
LIKENESS = 0.8


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
        raise error(f"The path {printable(text)} has bytes that are not text; rename it.")
    try:
        path = Path(given).expanduser()
        path.exists()
    except RuntimeError:
        raise error(
            f"The path {text} begins with ~ and a name that no user has; write it out."
        ) from None
    except OSError as problem:
        shown = printable(text)
        raise error(f"The path {shown} cannot be looked up: {problem.strerror}.") from problem
    return path


def meant_path(path: Path) -> str:
    """What to add to a clause about a path that does not exist; empty if none is near.

    Any of its folders may be misspelt, too.
    """
    found = Path(path.anchor)
    try:
        for name in path.relative_to(path.anchor).parts:
            following = found / name
            if not following.exists():
                beside = [it.name for it in islice(found.iterdir(), MAX_NAMES)]
                meant = nearest(name, beside, likeness=LIKENESS)
                if meant is None:
                    return ""
                following = found / meant
            found = following
    except OSError:
        return ""
    shown = visible(str(found))
    return f" (did you mean {shown if path.is_absolute() else f'./{shown}'}?)"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 are escaped as lone surrogates
        return False
    return True
