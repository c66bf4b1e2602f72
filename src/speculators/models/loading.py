"""Loading models with transformers, without its progress bar."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

__all__ = ["without_progress_bar"]


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar, which it shows even where there is no terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
