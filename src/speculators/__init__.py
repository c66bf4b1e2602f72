"""Convert EAGLE draft checkpoints to one standard format, prove them, and run them."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("speculators")
