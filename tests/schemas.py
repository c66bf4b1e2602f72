"""The JSON schemas in docs/, made from the code: ``python tests/schemas.py`` writes them."""

import ast
import inspect
import json
from pathlib import Path
from textwrap import dedent
from typing import Literal

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema

from speculators.cli.diff_result import DiffResult
from speculators.cli.results import BatchResult, ConvertResult, ValidateResult
from speculators.evaluate.recording.manifest import Manifest
from speculators.evaluate.report import Comparison, Report
from speculators.families.dflash import DFlash2Config, DFlashConfig, DSparkConfig
from speculators.families.eagle import EagleConfig
from speculators.families.eagle3 import Eagle3Config
from speculators.format.conversion import ConversionRecord
from speculators.inspection.findings import Finding
from speculators.inspection.installation import Diagnosis

DOCS = Path(__file__).parents[1] / "docs"

READ: dict[str, type[BaseModel]] = {
    "config": EagleConfig,
    "conversion": ConversionRecord,
    "dflash": DFlashConfig,
    "dflash2": DFlash2Config,
    "dspark": DSparkConfig,
    "eagle3": Eagle3Config,
    "recording": Manifest,
}
"""Files that are read: a key with a default may be missing."""

PRINTED: dict[str, type[BaseModel]] = {
    "comparison": Comparison,
    "batch": BatchResult,
    "convert": ConvertResult,
    "diff": DiffResult,
    "doctor": Diagnosis,
    "evaluation": Report,
    "inspect": Finding,
    "validate": ValidateResult,
}
"""Files that are only written: every key is there."""


class Described(GenerateJsonSchema):
    """Describes each field by the docstring below it.

    pydantic's ``use_attribute_docstrings`` does the same, but whenever a model is imported, and
    takes a tenth of the time of a short command.
    """

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        described = super().model_schema(schema)
        for model in schema["cls"].__mro__:
            if issubclass(model, BaseModel) and model is not BaseModel:
                for name, text in docstrings_of_fields(model).items():
                    described["properties"].get(name, {}).setdefault("description", text)
        return described


def docstrings_of_fields(model: type) -> dict[str, str]:
    """The string below each field that a class defines itself, by the field's name."""
    (definition,) = ast.parse(dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    found = dict[str, str]()
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = inspect.cleandoc(text)
    return found


def schema_file(name: str) -> Path:
    return DOCS / f"{name}.schema.json"


def schema(name: str) -> str:
    """The schema, as the text of its file."""
    mode: Literal["validation", "serialization"] = "validation" if name in READ else "serialization"
    model = (READ | PRINTED)[name]
    return (
        json.dumps(model.model_json_schema(mode=mode, schema_generator=Described), indent=2) + "\n"
    )


if __name__ == "__main__":
    for name in READ | PRINTED:
        schema_file(name).write_text(schema(name), encoding="utf-8")
