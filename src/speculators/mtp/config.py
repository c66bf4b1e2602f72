"""What config.json says of an MTP, and how files of JSON are written."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.mtp.find import Mtp, promise
from speculators.mtp.types import language_config

__all__ = ["promising", "write_json"]


def promising(config: dict[str, Any], mtp: Mtp) -> dict[str, Any]:
    """A config.json that promises the layers of an MTP.

    One that says a number of layers already stays as it is: some engines run only the first.
    """
    key, layers = promise(config, mtp.type)
    if layers is not None:
        return config
    changed = copy.deepcopy(config)
    part = changed if language_config(changed) is changed else changed["text_config"]
    part[key] = mtp.layers
    return changed


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a new JSON file, laid out as transformers does it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
