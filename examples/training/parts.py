"""Parts of decoder layers, and what is learned from the verifier's likeliest tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE of (batch, heads, length, head size); positions are (length,) or (batch, length)."""
    size = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, size, 2, device=x.device).float() / size)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1).unsqueeze(-3)
    first, second = x.chunk(2, -1)
    result: Tensor = x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    return result.to(x.dtype)


class Mlp(nn.Module):
    """The gated MLP of Llama and Qwen."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., hidden) from (..., hidden)."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


def evening(states: Tensor) -> Tensor:
    """What makes all channels of states, (..., width), equally large: (width,)."""
    return 1 / states.float().flatten(0, -2).square().mean(0).sqrt().clamp(min=1e-3)


class SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy between the draft's predictions and the verifier's likeliest tokens.

    The gradient is computed along with the loss, so that one tensor of logits is enough.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, tokens: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses and which guesses are right, both (n,) and float32.

        Args:
            ctx: saves what backward needs.
            states: (n, hidden).
            head: (vocabulary, hidden); its dtype is used for the computation.
            tokens: (n, ``LIKELIEST``), the likeliest first.
            shares: (n, ``LIKELIEST``), their probabilities.

        """
        logits = states.to(head.dtype) @ head.T
        right = (logits.argmax(-1) == tokens[:, 0]).float()
        guessed = logits.softmax(-1)
        del logits
        likely = guessed.gather(1, tokens).float().clamp(min=1e-30)
        losses = -(shares * likely.log()).sum(-1)
        difference = guessed.scatter_add_(1, tokens, -shares.to(head.dtype))
        ctx.save_for_backward((difference @ head).to(states.dtype))
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient with respect to the states."""
        (of_states,) = ctx.saved_tensors
        return of_states * gradients[0][:, None].to(of_states.dtype), None, None, None
