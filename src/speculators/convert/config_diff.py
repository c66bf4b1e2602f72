"""What becomes of each key of a config.json that is converted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from speculators.convert.plan import ConversionPlan

__all__ = ["ConfigChange", "config_diff"]

NESTED = ("transformer_layer_config", "speculators_config")
"""Keys of the new config.json whose nested keys are listed one by one."""


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """One key, before and after.

    Attributes:
        change: what happens to it.
        source: the key in the source's config; ``None`` if it is not there.
        before: its value there.
        target: the key in the new config, with dots between levels; ``None`` if left out.
        after: its value there.
        why: the reason, if there is one to give.

    """

    change: Literal["kept", "changed", "left out", "added"]
    source: str | None = None
    before: Any = None
    target: str | None = None
    after: Any = None
    why: str | None = None


def config_diff(plan: ConversionPlan) -> list[ConfigChange]:
    """Compare the source's config with the planned one, in the order of the source's keys.

    A null value counts as a missing key.
    """
    after = _flat(plan.config.model_dump(exclude_none=True))
    changes = []
    for key, before in _flat(plan.source.config).items():
        target = next((it for it in (f"transformer_layer_config.{key}", key) if it in after), None)
        why = plan.config_left_out.get(key)
        if target is not None:
            value = after.pop(target)
            same = value == before
            change: Literal["kept", "changed"] = "kept" if same else "changed"
            changes.append(ConfigChange(change, key, before, target, value, None if same else why))
        elif before is not None:
            changes.append(ConfigChange("left out", key, before, why=why))
    added = [ConfigChange("added", target=key, after=value) for key, value in after.items()]
    return changes + added


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            {f"{key}.{inner}": it for inner, it in value.items()}
            if key in NESTED and isinstance(value, dict)
            else {key: value}
        )
    return flat
