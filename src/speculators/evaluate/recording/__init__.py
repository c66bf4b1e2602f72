"""Recordings: texts of a verifier with its hidden states, and scoring drafts on them."""
