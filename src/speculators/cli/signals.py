"""Stopping on SIGTERM, which service managers, containers and batch systems send."""

import signal
from types import FrameType

from loguru import logger

__all__ = ["stop_on_sigterm"]


def stop_on_sigterm() -> None:
    """Let SIGTERM end the process like Ctrl-C: after cleaning up, but with the status 143."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    logger.error("Terminated.")
    raise SystemExit(128 + number)
