"""The JSON schema of job files, by which editors check them: `make schema` writes it to jobs/schema.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from pipeline.config.job_file import VARIABLE
from pipeline.config.schema import KINDS, Job


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of a job file of any kind. It is the same on every machine."""
    definitions = TypeAdapter(Job).json_schema(schema_generator=_FileSchema)["$defs"]
    for kind, job in KINDS.items():
        definitions[job.__name__]["properties"]["kind"] = {"const": kind}
    return {
        "$schema": _FileSchema.schema_dialect,
        "title": "A job of sagan",
        "type": "object",
        "properties": {"kind": {"enum": list(KINDS)}},
        "required": ["kind"],
        # With one condition per kind instead of a union of all kinds, editors show a mistake at its key.
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": {"$ref": f"#/$defs/{job.__name__}"},
            }
            for kind, job in KINDS.items()
        ],
        "$defs": definitions,
    }


class _FileSchema(GenerateJsonSchema):
    """A generator of the schema of job files, in which `${NAME}` may stand for a value of any type."""

    def generate_inner(self, schema: Any) -> JsonSchemaValue:
        described = super().generate_inner(schema)
        if schema["type"] in ("int", "float", "bool", "literal", "list", "tuple") or "pattern" in schema:
            return {"anyOf": [described, {"type": "string", "pattern": VARIABLE.pattern}]}
        return described

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        default = schema.get("default")
        if isinstance(default, BaseModel) or dataclasses.is_dataclass(default):  # its keys have defaults
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title would only repeat the key
