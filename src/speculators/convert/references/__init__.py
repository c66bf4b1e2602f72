"""Drafts in plain tensor operations, one module per family, to check the models against."""
