"""Stopping on the signals that service managers, batch systems and closed terminals send."""

import signal
from types import FrameType

__all__ = ["StoppedError", "stop_on_signals"]


class StoppedError(SystemExit):
    """The process was told to stop; the status is 128 plus the number of the signal.

    Args:
        number: of the signal.

    Attributes:
        message: what to say of it.

    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.message = "Terminated." if number == signal.SIGTERM else "The terminal was closed."


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the process like Ctrl-C: after cleaning up.

    The status is 143 or 129. A SIGHUP that is ignored, as ``nohup`` arranges it, stays ignored.
    """
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise StoppedError(number)
