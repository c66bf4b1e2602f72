"""Training drafts for the examples, with nothing of speculators; see train_draft.py."""
