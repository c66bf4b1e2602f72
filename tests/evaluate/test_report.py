"""The report's schema, as it is documented, and the figures' way into it."""

import json
from pathlib import Path

from speculators.evaluate.report import Report

SCHEMA = Path(__file__).parents[2] / "docs" / "evaluation.schema.json"


def test_the_documented_schema_is_that_of_the_code() -> None:
    assert json.loads(SCHEMA.read_text()) == Report.model_json_schema(mode="serialization")


def test_every_part_of_the_schema_is_described() -> None:
    schema = json.loads(SCHEMA.read_text())
    for part in [schema, *schema["$defs"].values()]:
        assert part["description"]
