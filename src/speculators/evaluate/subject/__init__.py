"""The subject of an evaluation: a draft or an MTP with its verifier, opened and then loaded."""
