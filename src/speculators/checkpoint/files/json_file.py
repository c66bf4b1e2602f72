"""JSON objects from untrusted files: configs, indexes, the headers of weight files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from loguru import logger

from speculators.errors import CheckpointError, printable

__all__ = ["MAX_JSON_BYTES", "parse_json", "read_json"]

# An index has some 150 bytes per tensor, and the largest models have 150,000 tensors. A hostile
# file may take twenty times its size in memory once it is parsed.
MAX_JSON_BYTES = 32 << 20


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
        raise ValueError("holds no JSON object")  # noqa: TRY004 - its value is wrong, not its type
    return value, twice[0] if twice else None


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path: the file.
        unique: whether a duplicate key is an error. In a config it is only worth a warning:
            transformers, too, takes the last one.

    Raises:
        CheckpointError: if it holds anything else, is too large, or has a duplicate key that is an
            error.

    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has more than {MAX_JSON_BYTES >> 20} MiB, as no config or index has; "
            "fetch it again."
        )
    try:
        value, twice = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} {error}; fetch it again.") from error
    if twice and unique:
        raise CheckpointError(f"{path} has the key {printable(twice)} twice; fetch it again.")
    if twice:
        logger.warning(f"{path} has the key {printable(twice)} twice, and the last one counts")
    return value
