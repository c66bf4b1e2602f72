"""Speculative decoding: an EAGLE draft proposes, its verifier decides."""

from speculators.decode.cuda_graphs import Workspace
from speculators.decode.drafting import Draft
from speculators.decode.loop import Generation, speculate

__all__ = ["Draft", "Generation", "Workspace", "speculate"]
