"""Text files that speculators writes, and never replaces once somebody has edited them."""

import hashlib
import re
from pathlib import Path

__all__ = ["README", "is_stamped", "stamped", "write_stamped"]

README = "README.md"
"""What the Hub shows as the model card."""

_STAMP = "<!-- written by speculators; sha256 of what is above: {} -->\n"
_LAST_LINE = re.compile(re.escape(_STAMP).replace(r"\{\}", "([0-9a-f]{64})"))


def is_stamped(text: str) -> bool:
    """Whether a text is exactly as speculators wrote it."""
    lines = text.splitlines(keepends=True) or [""]
    stamp = _LAST_LINE.fullmatch(lines[-1])
    return stamp is not None and stamp[1] == _sha256("".join(lines[:-1]))


def write_stamped(file: Path, text: str) -> bool:
    """Write Markdown or HTML with a stamp, unless the file exists without a valid stamp.

    Args:
        file: the file to write.
        text: what to write, ending with a newline.

    Returns:
        Whether it was written.

    Raises:
        OSError: if writing fails.

    """
    if file.exists() and not is_stamped(file.read_text(encoding="utf-8", errors="replace")):
        return False
    file.write_text(stamped(text), encoding="utf-8")
    return True


def stamped(text: str) -> str:
    """A text with its stamp, as ``write_stamped`` writes it."""
    return text + _STAMP.format(_sha256(text))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
