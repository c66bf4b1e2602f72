"""Whether two checkpoints hold the same draft, in whatever layouts."""
