"""Conversations in which one sees which tokens were drafted, and which of them were accepted."""
