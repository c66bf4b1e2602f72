"""What commands print with --json: one object each, whether they succeed or fail.

Light, since ``doctor`` prints one where other packages are missing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer
from loguru import logger

from speculators.cli.signals import StoppedError
from speculators.ending import Ending
from speculators.errors import sentence

if TYPE_CHECKING:
    from loguru import Message

__all__ = ["Printing", "message", "printed"]


@dataclass
class Printing:
    """What is printed in the end.

    Attributes:
        result: the object; the block may put another one in its place.
        warnings: what the log has warned of so far.

    """

    result: Ending
    warnings: list[str] = field(default_factory=list)


@contextmanager
def printed(asked: bool, result: Ending | None = None) -> Iterator[Printing]:
    """Print a result when the ``with`` block ends, however it does, if JSON is ``asked`` for.

    What is logged as a warning meanwhile becomes part of it, and so does the error that the block
    raises. Nothing is printed if an option is wrong.

    Args:
        asked: whether ``--json`` was given.
        result: what to print; how the command ended alone, if the block puts nothing in its place.

    """
    printing = Printing(result or Ending())

    def keep(logged: "Message") -> None:
        if logged.record["level"].name == "WARNING":
            printing.warnings.append(logged.record["message"])

    handler = logger.add(keep, level="WARNING")
    try:
        yield printing
    except typer.BadParameter:
        asked = False
        raise
    except BaseException as error:
        printing.result.fail(message(error))
        raise
    finally:
        logger.remove(handler)
        printing.result.warnings = printing.warnings
        if asked:
            print(printing.result.model_dump_json(indent=2))


def message(error: BaseException) -> str:
    """What the log says of an error, or of a signal."""
    if isinstance(error, StoppedError):
        return error.message
    return sentence(error) if isinstance(error, Exception) else "Interrupted."
