"""Speculative decoding: a draft proposes tokens, its verifier decides which of them to keep."""

from speculators.decode.drafter import Draft
from speculators.decode.gpu.cuda_graphs import Workspace
from speculators.decode.loop import Generation, VerifiedStep, speculate

__all__ = ["Draft", "Generation", "VerifiedStep", "Workspace", "speculate"]
