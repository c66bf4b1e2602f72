"""Loading drafts of any family, and models with transformers without its progress bar."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from speculators.checkpoint.hub.access import HubAccess
from speculators.families.converted import Converted, open_converted
from speculators.families.family import imported
from speculators.models.speculator import Speculator

__all__ = ["load_converted", "load_draft", "without_progress_bar"]


def load_draft(
    source: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> Speculator:
    """Load a converted draft of any family, with the class that the family has for it.

    Args:
        source: the directory or Hub id of a converted draft.
        cache_dir: where downloads are kept.
        revision: a branch, tag or commit on the Hub.
        token: an access token for the Hub; the one that its client finds if not given.
        **kwargs: as for ``Speculator.from_pretrained``: ``verifier``, ``dtype``, ...

    Raises:
        FormatError: if it is not a converted draft, or its tensors are not those of its config.
        CheckpointError, HubError: if it cannot be read or downloaded.
        VerifierError: if the verifier does not fit.

    """
    converted = open_converted(source, HubAccess(cache_dir, token), revision=revision)
    return load_converted(converted, **kwargs)


def load_converted(converted: Converted, **kwargs: Any) -> Speculator:
    """Load a draft that has been opened already; see ``Speculator.from_converted``."""
    model_class: type[Speculator] = imported(converted.family.model)
    return model_class.from_converted(converted, **kwargs)


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
