"""Importing torch, transformers and a family's model while bytes are being read or written."""

import gc
import sys
from contextlib import suppress
from importlib import import_module
from threading import Thread

from speculators.families.family import Family

__all__ = ["import_ahead"]

NEEDED = ("speculators.models.loading", "speculators.convert.checks.embedding")


def import_ahead(family: Family) -> None:
    """Begin to import what validating a draft of a family needs, in a thread.

    Whoever imports it afterwards waits until it is there; if it cannot be imported, that import
    fails as well, and says so.
    """
    if NEEDED[0] in sys.modules:
        return  # a conversion before this one did it
    named = (family.model, family.reference, family.check)
    modules = (*NEEDED, *(name.partition(":")[0] for name in named))
    Thread(target=_import, args=(modules,), name="imports").start()


def _import(modules: tuple[str, ...]) -> None:
    enabled = gc.isenabled()
    gc.disable()  # it would look through all that is imported, again and again
    try:
        with suppress(Exception):
            for module in modules:
                import_module(module)
        # All that was made is old from now on: otherwise it would be looked through twice more.
        gc.freeze()
        gc.unfreeze()
    finally:
        if enabled:
            gc.enable()
