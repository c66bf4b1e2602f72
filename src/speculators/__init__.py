"""Convert draft models to one standard format, prove them, run them and measure them."""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look up ``__version__`` only on access: it takes longer than the rest of the import."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("speculators")
