"""Fewer and larger kernels for the same computation, on GPUs."""
