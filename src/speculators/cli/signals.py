"""Stopping on the signals that service managers, batch systems and closed terminals send."""

import signal
from types import FrameType

__all__ = ["stop_on_signals"]


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the process like Ctrl-C: after cleaning up.

    The status is 128 plus the number of the signal: 143 and 129. A SIGHUP that is ignored, as
    ``nohup`` arranges it, stays ignored.
    """
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    from loguru import logger

    logger.error("Terminated." if number == signal.SIGTERM else "The terminal was closed.")
    raise SystemExit(128 + number)
