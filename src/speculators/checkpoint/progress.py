"""How long work on many bytes tells how far it is."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int], Callable[[int], None]]
"""Begins a step, given what is done ("Writing") and the bytes in total; what it returns is called,
from any thread, with the bytes that were done since the last call."""


def silent(_step: str, _total: int) -> Callable[[int], None]:
    """A ``Progress`` that nobody watches."""
    return lambda _done: None
