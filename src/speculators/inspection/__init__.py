"""Read-only checks: what a checkpoint is, and whether the installation works."""
