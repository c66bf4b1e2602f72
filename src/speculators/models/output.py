"""What a draft returns, and the two names of the cache.

transformers calls a model's cache ``past_key_values`` until 5.23 and ``cache`` from 5.24 on, where
the older name brings a notice of deprecation. Drafts know both names with every release.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import ModelOutput

__all__ = ["CACHE", "DraftOutput", "the_cache"]

OLDER_NAME = "past_key_values"

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else OLDER_NAME
"""The argument by which the installed transformers' layers and masks take the cache."""


def the_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, by whichever of its names it was given.

    Raises:
        ValueError: if it was given by both.

    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are names of the same thing; give only one.")
    return past_key_values if cache is None else cache


@dataclass(init=False)
class DraftOutput(ModelOutput):
    """The output of a draft's forward pass.

    The cache can also be given and read as ``past_key_values``: as an argument, an attribute and
    a key. Listed are only the fields.

    Attributes:
        logits: (batch, sequence, draft vocabulary), in the head's dtype.
        last_hidden_state: (batch, sequence, hidden), what is fed back as the next position's
            hidden state: the last layer's output, before the norm ahead of the head unless the
            draft says otherwise (``norm_output`` of EAGLE-3.1).
        cache: of the draft's layers, if one is used.

    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache: Cache | None = None

    def __init__(
        self,
        logits: Tensor | None = None,
        last_hidden_state: Tensor | None = None,
        cache: Cache | None = None,
        *,
        past_key_values: Cache | None = None,
    ) -> None:
        self.logits = logits
        self.last_hidden_state = last_hidden_state
        self.cache = the_cache(cache, past_key_values)
        self.__post_init__()  # type: ignore[no-untyped-call]

    @property
    def past_key_values(self) -> Cache | None:
        """The cache."""
        return self.cache

    # transformers would take the older name for another field, or give notice of its deprecation.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_field(name), value)  # type: ignore[no-untyped-call]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_field(key), value)  # type: ignore[no-untyped-call]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_field(key))  # type: ignore[no-untyped-call]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_field(key))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default if it has none."""
        return super().get(_field(key), default)


def _field(name: Any) -> Any:
    return "cache" if name == OLDER_NAME else name
