"""Drafts as PyTorch models."""
