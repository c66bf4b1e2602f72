"""What the training loop knows of a draft."""

from typing import Any

from torch import Tensor, nn

from training.conversations import Conversations


class Draft(nn.Module):
    """A draft that can be trained and measured; its parameters are named as published ones.

    The verifier's embedding and head, (vocabulary, hidden), are passed to it. The dtype of the head
    is used for the computation.

    Attributes:
        config: its config.json.
        reads: which of the verifier's states it reads; see ``writing.LAST``.

    """

    def __init__(self, config: dict[str, Any], reads: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.reads = config, reads

    def loss(self, embed: nn.Module, head: Tensor, data: Conversations, tokens: int) -> Tensor:
        """What is minimised.

        ``tokens`` is the total number of answer tokens, passed so that nothing waits for the GPU to
        count them.
        """
        raise NotImplementedError

    def measured(
        self, embed: nn.Module, head: Tensor, held_out: list[Conversations]
    ) -> dict[str, Any]:
        """How often it is right about conversations that it was not trained on."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What is published."""
        return self.state_dict()
