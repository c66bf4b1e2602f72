"""Looking without changing anything: what a checkpoint is, and whether the installation works."""
