"""Serving engines that are taught to run converted drafts."""
