"""Convert EAGLE draft checkpoints to one standard format, prove them, and run them."""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look ``__version__`` up when it is asked for: doing so takes longer than all else here."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("speculators")
