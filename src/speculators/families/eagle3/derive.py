"""The config of a converted draft, derived from a checkpoint of any publisher."""

from speculators.families.family import Derived, Source

__all__ = ["derive"]


def derive(source: Source) -> Derived:
    """Derive the config of a converted draft from a research checkpoint."""
    raise NotImplementedError(source)
