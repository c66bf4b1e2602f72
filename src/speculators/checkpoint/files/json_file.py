"""JSON objects from untrusted files: configs, indexes, the headers of weight files."""

import codecs
import json
from collections import Counter
from pathlib import Path
from typing import Any

from loguru import logger

from speculators.checkpoint.identity import FileIdentity, open_unchanged
from speculators.errors import CheckpointError, printable

__all__ = ["MAX_JSON_BYTES", "parse_json", "read_json"]

# An index has some 150 bytes per tensor, and the largest models have 150,000 tensors. A hostile
# file may take twenty times its size in memory once it is parsed.
MAX_JSON_BYTES = 32 << 20

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""How a file begins that PowerShell writes by default, or an editor saves as "Unicode"."""


def parse_json(raw: bytes) -> tuple[dict[str, Any], str | None]:
    """Parse a JSON object in UTF-8.

    Returns:
        The object, and a key that occurs twice in it or in a nested object (the last one counts);
        ``None`` if there is no such key.

    Raises:
        ValueError: if it is not a JSON object. The message continues a sentence that begins with
            the name of what was parsed: "is not valid JSON (...)".

    """
    twice: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice.append(next(key for key, count in counts.items() if count > 1))
        return built

    try:
        value = json.loads(raw.decode(), object_pairs_hook=build)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("does not hold a JSON object")  # noqa: TRY004 - its value is wrong, not its type
    return value, twice[0] if twice else None


def read_json(
    path: Path, *, unique: bool = False, identity: FileIdentity | None = None
) -> dict[str, Any]:
    """Read a file that holds a JSON object, in UTF-8 with or without a byte order mark.

    Args:
        path: the file.
        unique: whether a duplicate key is an error. In a config it is only worth a warning:
            transformers, too, takes the last one.
        identity: what the file was when it was first read; see ``open_unchanged``.

    Raises:
        CheckpointError: if it holds anything else, is too large, or has a duplicate key that is an
            error.

    """
    with open_unchanged(path, identity) as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has more than {MAX_JSON_BYTES >> 20} MiB, which no config or index has; fetch "
            "it again."
        )
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if raw.startswith(UTF16) or raw[:2].count(0) == 1:
        raise CheckpointError(f"{path} is not valid JSON, but UTF-16; save it as UTF-8.")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON, since its byte {error.start} is not UTF-8; save it as "
            "UTF-8, or fetch it again."
        ) from error
    try:
        value, twice = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}; fetch it again.") from error
    if twice and unique:
        raise CheckpointError(f"{path} has the key {printable(twice)} twice; fetch it again.")
    if twice:
        logger.warning(f"{path} has the key {printable(twice)} twice, and the last one counts")
    return value
