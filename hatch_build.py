"""What the package's metadata takes from elsewhere: its address, and a README without dead links.

An index page shows the README where its links to files of the repository lead nowhere.
"""

import re
import runpy
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?!\w+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


class Metadata(MetadataHookInterface):
    """Called by hatchling for every build."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the fields that pyproject.toml calls dynamic."""
        root = Path(self.root)
        homepage = runpy.run_path(str(root / "src" / "speculators" / "__init__.py"))["HOMEPAGE"]
        metadata["urls"] = {"Homepage": homepage} if homepage else {}
        text = (root / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": readable_elsewhere(text, homepage),
        }


def readable_elsewhere(text: str, homepage: str | None) -> str:
    """A page with its links to files made absolute, or replaced by the files' names."""
    if homepage is None:
        return LINK.sub(r"\g<text> [\g<path>]", text)
    return LINK.sub(rf"[\g<text>]({homepage}/blob/HEAD/\g<path>\g<anchor>)", text)
