"""Integrations that let serving engines run converted drafts."""
