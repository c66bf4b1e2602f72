"""Multi-token prediction (MTP): drafts that live inside a language model's own checkpoint."""
