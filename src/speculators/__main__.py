"""The process of the command line: ``speculators``, or ``python -m speculators``."""

import atexit
import gc
import os
import sys

from speculators.cli import main

__all__ = ["run"]

GARBAGE = 50_000
"""After how many new objects to look for garbage. Imports make many more, and hardly any garbage;
with Python's own number, looking takes a tenth of the time of a short command."""


def run() -> None:
    """Run the command line, and end the process with its status."""
    gc.set_threshold(GARBAGE)
    status = 1  # that of an exception, which the interpreter prints
    atexit.register(lambda: _end(status))  # the first that is registered is the last that is called
    try:
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


def _end(status: int) -> None:
    """End the process as it is: it takes torch a tenth of a second or more to be torn down."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # the interpreter tries again, and says what is wrong
    os._exit(status)


if __name__ == "__main__":
    run()
