"""Errors of the Hub's client, as sentences.

Errors are told apart by the names of their classes, not by type: they come from the client and from
its HTTP library (httpx under huggingface_hub 1, httpx2 under 2), neither of which is imported with
this module.
"""

import errno
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import NoReturn

from speculators.errors import HubError

__all__ = ["hide_secrets", "kinds_of", "raise_hub_error"]

# What the client wraps around the cause: "not in the local cache", and "Error while uploading".
_WRAPPERS = {"LocalEntryNotFoundError", "RuntimeError"}
# The client's words for a file of the wrong size.
_SIZES = re.compile(r"^Consistency check failed.* of size (\d+) but has size (\d+).*", re.DOTALL)
# Access tokens, in a header or bare, and credentials in a URL: all up to the last @ of its host.
_SECRET = re.compile(r"(?<=Bearer )[^\s'\"]+|\bhf_\w{8,}|(?<=//)[^/\s]+(?=@)")


def hide_secrets(text: str) -> str:
    """A text without access tokens and passwords."""
    from huggingface_hub import constants

    # A password may have a slash in it, which a pattern takes for the end of the host.
    _, _, endpoint = constants.ENDPOINT.partition("//")
    credentials, _, _ = endpoint.rpartition("@")
    return _SECRET.sub("***", text.replace(credentials, "***") if credentials else text)


def raise_hub_error(error: Exception, sentences: Mapping[str, str], **words: object) -> NoReturn:
    """Raise a ``HubError`` that says what went wrong and what to do.

    Args:
        error: what the Hub's client raised.
        sentences: a name that ``kinds_of`` gives → a sentence without its full stop, with the
            placeholders ``{endpoint}``, ``{kind}``, ``{reason}`` and those of ``words``. There
            must be one for ``Exception``.
        **words: the values of further placeholders.

    """
    from huggingface_hub import constants

    sentence = next(sentences[kind] for kind in kinds_of(error) if kind in sentences) + "."
    message = sentence.format(
        endpoint=hide_secrets(constants.ENDPOINT),
        kind=type(error).__name__,
        reason=_reason(error),
        **words,
    )
    # A traceback would show the cause's own text, with the secret in it.
    secret = hide_secrets(str(error)) != str(error)
    raise HubError(message) from (None if secret else error)


def kinds_of(error: BaseException) -> Iterator[str]:
    """Yield names for an error, the most specific first; the last are those of its base classes."""
    error = _root(error)
    if isinstance(error, OSError) and error.errno:
        yield errno.errorcode.get(error.errno, "errno")
        yield "errno"
    response = getattr(error, "response", None)
    token_sent = response is not None and "authorization" in response.request.headers
    for base in type(error).__mro__:
        names = [base.__name__]
        if response is not None and base.__name__ == "HfHubHTTPError":
            hundreds = f"{response.status_code // 100}xx"
            names[:0] = [f"HTTP {response.status_code}", f"HTTP {hundreds}"]
            names.append(f"{response.request.method} {hundreds}")
        for name in names:
            if token_sent:
                yield f"{name}, token sent"
            yield name


def _root(error: BaseException) -> BaseException:
    """Find the original error behind the client's wrappers."""
    while type(error).__name__ in _WRAPPERS and error.__cause__:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """Quote an error, shortened to fit into a sentence, and without secrets."""
    error = _root(error)
    response = getattr(error, "response", None)
    if response is not None:
        text = f"{response.status_code} {response.reason_phrase}"
        message = getattr(error, "server_message", None)
        if message and message != response.reason_phrase:
            text += f": {message}"
    elif isinstance(error, OSError) and error.errno:
        text = f"{error.strerror}: {error.filename}" if error.filename else f"{error.strerror}"
    else:
        text = _SIZES.sub(r"\1 bytes were announced and \2 came", str(error))
    line = next(iter(text.strip().splitlines()), type(error).__name__)
    line = re.sub(r"^\[Errno -?\d+\] ", "", line).rstrip(".")
    return textwrap.shorten(hide_secrets(line), 200, placeholder=" ...")
