"""The Hub's client, made to fit in: it logs into our log, and does not wait for hours.

A server's answers are looked at as they arrive: what it asks to wait, and which bytes it says it
sends.
"""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loguru import logger

from speculators.checkpoint.hub.errors import hide_secrets

if TYPE_CHECKING:
    from httpx2 import Response

__all__ = ["LongWaitError", "WrongRangeError", "watched_client"]

LONGEST_WAIT = 300
"""Seconds that the client may be asked to wait before it tries again."""

CLIENT_LOGGER = "huggingface_hub"


class LongWaitError(Exception):
    """The server asks to wait for longer than ``LONGEST_WAIT``; the message says how long."""


class WrongRangeError(Exception):
    """The server sends other bytes than it was asked for; the message says which."""


@contextmanager
def watched_client() -> Iterator[None]:
    """While the context is open, tell in our log what the client logs, and watch the answers.

    Raises:
        LongWaitError, WrongRangeError: out of a call of the client.

    """
    from huggingface_hub import get_session

    # The session is the client's own and stays as it is now; a new one is made after some errors.
    hooks = get_session().event_hooks["response"]
    if _check_answer not in hooks:
        hooks.append(_check_answer)
    _RELAY.begin()
    try:
        yield
    finally:
        _RELAY.end()


def _check_answer(response: "Response") -> None:
    wait = _asked_to_wait(response) if response.status_code >= 400 else 0
    if wait > LONGEST_WAIT:
        raise LongWaitError(f"{wait} seconds" if wait < 7200 else f"{wait / 3600:.0f} hours")
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", response.request.headers.get("Range", ""))
    if response.status_code != 206 or asked is None:
        return
    came = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", came)
    first, last, size = map(int, found.groups()) if found else (-1, -1, 0)
    wanted = min(int(asked[2] or size - 1), size - 1)
    if (first, last) != (int(asked[1]), wanted):
        raise WrongRangeError(f"{asked[0]} was asked for, and {came or 'an unknown range'} came")


def _asked_to_wait(response: "Response") -> int:
    """The seconds after which a server wants to be asked again; 0 if it does not say."""
    after = response.headers.get("Retry-After", "").strip()
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", response.headers.get("RateLimit", ""))
    return max(int(after) if re.fullmatch(r"\d{1,9}", after) else 0, int(limit[1]) if limit else 0)


class _Relay(logging.Handler):
    """Logs what the client logs, each as one line, without secrets.

    The client says in one message what failed, and in the next that it tries again; these become
    one line. If it does not try again, it raises, and the error says what failed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._opened = 0
        self._replaced: list[logging.Handler] = []
        self._guard = threading.Lock()
        self._failed = threading.local()

    def begin(self) -> None:
        """Take the place of the client's own handlers; calls may be nested, and from any thread."""
        with self._guard:
            self._opened += 1
            if self._opened == 1:
                client = logging.getLogger(CLIENT_LOGGER)
                self._replaced, client.handlers = client.handlers, [self]

    def end(self) -> None:
        """Put them back."""
        with self._guard:
            self._opened -= 1
            if self._opened == 0:
                logging.getLogger(CLIENT_LOGGER).handlers = self._replaced
        self._failed.message = ""

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        message = hide_secrets(" ".join(record.getMessage().split()))
        if " thrown while requesting " in message:
            self._failed.message = f"{message}: "
            return
        before, self._failed.message = getattr(self._failed, "message", ""), ""
        logger.log(record.levelname, "{}", f"{before}{message}")


_RELAY = _Relay()
