"""How slow work on many bytes reports its progress."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int], Callable[[int], None]]
"""Begins a step, given its name (such as "Writing") and its size in bytes. The function that it
returns is called, from any thread, with the number of bytes done since the last call."""


def silent(_step: str, _total: int) -> Callable[[int], None]:
    """A ``Progress`` that shows nothing."""
    return lambda _done: None
