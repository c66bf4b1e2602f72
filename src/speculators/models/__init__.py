"""Drafts as PyTorch models."""

from speculators.models.loading import load_draft

__all__ = ["load_draft"]
