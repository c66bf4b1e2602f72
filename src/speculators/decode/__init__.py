"""Speculative decoding: an EAGLE draft proposes, its verifier decides."""

from speculators.decode.drafting import Draft
from speculators.decode.loop import Generation, speculate
from speculators.decode.replay import Workspace

__all__ = ["Draft", "Generation", "Workspace", "speculate"]
