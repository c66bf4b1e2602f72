"""Standard input, output and error where whoever started the process has closed them."""

import os
import sys

__all__ = ["open_missing_streams"]


def open_missing_streams() -> None:
    """Open the null device in the place of each standard stream that is closed.

    Otherwise the next file that is opened would take the stream's number, and what is printed would
    go into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
