"""The output of a draft."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

__all__ = ["DraftOutput"]


@dataclass
class DraftOutput(ModelOutput):
    """The output of a forward pass.

    Attributes:
        logits: (batch, sequence, vocabulary), in the head's dtype.
        last_hidden_state: (batch, sequence, hidden), the layer's output, before the norm ahead of
            the head: this is fed back as the next position's hidden state.
        past_key_values: the layer's cache, if one is used.

    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
