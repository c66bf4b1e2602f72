"""Convert speculative-decoding drafts to one standard format, prove them, and run them.

Nothing is imported by this package itself. What to import from where:

- ``speculators.convert.eagle.EagleConverter`` and ``speculators.convert.eagle3.Eagle3Converter``:
  convert;
- ``speculators.models.load_draft``: load a converted draft, to generate with it;
- ``speculators.convert.export.export``: write it in the layout of other software;
- ``speculators.publish.draft.publish_draft``: upload it;
- ``speculators.errors.SpeculatorsError``: the base of all errors.

docs/api.md lists the rest; ``speculators --help``, the commands.
"""

import os.path  # pathlib would take longer to import

__all__ = ["ANOTHERS", "HOMEPAGE", "INSTALL", "__version__"]

HOMEPAGE: str | None = None
"""The address of the project's repository, once it is public; no other place tells it."""

INSTALL = f"pip install git+{HOMEPAGE}" if HOMEPAGE else "pip install ."
"""How somebody gets this package; without an address, it is run in a copy of the repository."""

ANOTHERS = "config.py"
"""A module that every release of the PyPI project called speculators has, and this one has not."""

if os.path.exists(os.path.join(os.path.dirname(__file__), ANOTHERS)):  # noqa: PTH110, PTH118, PTH120
    import warnings

    warnings.warn(
        "Two projects called speculators are installed over each other, so that neither works as "
        "it should; `speculators doctor` says what to do.",
        stacklevel=2,
    )


def __getattr__(name: str) -> str:
    """Look up ``__version__`` only on access: it takes longer than the rest of the import."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("speculators")
