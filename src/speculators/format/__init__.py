"""The speculators format, without torch: its config.json and its tensors."""
