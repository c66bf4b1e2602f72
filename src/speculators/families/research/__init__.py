"""What research checkpoints of several families have in common, and how it is read."""
