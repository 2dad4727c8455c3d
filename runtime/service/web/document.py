"""The OpenAPI document, made true where FastAPI describes what this server does not do."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

NOT_OURS = "422"
"""The status with which FastAPI refuses parameters unless it is told otherwise; here, `errors` answers with 400."""
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
ITS_SCHEMAS = ("HTTPValidationError", "ValidationError")


def install(app: FastAPI) -> None:
    """Let the application tell the mended document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            mend(generate())
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


def mend(document: dict[str, Any]) -> None:
    """Take out of a document what is not so."""
    for operation in operations(document):
        operation["responses"].pop(NOT_OURS, None)
        for parameter in operation.get("parameters", ()):
            parameter["schema"] = without_null(parameter["schema"])
    write_whole(document["paths"])
    for name in ITS_SCHEMAS:
        document["components"]["schemas"].pop(name, None)


def write_whole(found: Any) -> None:
    """Write the bounds of integers as such. As floats, those of seeds would not be exact."""
    if isinstance(found, list):
        for each in found:
            write_whole(each)
    elif isinstance(found, dict):
        for name in BOUNDS & found.keys():
            if isinstance(found[name], float) and found[name].is_integer():
                found[name] = int(found[name])
        for each in found.values():
            write_whole(each)


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The operations of a document."""
    for path in document["paths"].values():
        yield from path.values()


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body, complete in itself."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(found: Any) -> Any:
        if isinstance(found, list):
            return [inlined(each) for each in found]
        if not isinstance(found, dict):
            return found
        if "$ref" in found:
            return {
                **inlined(parts[found["$ref"].rpartition("/")[2]]),
                **{k: v for k, v in found.items() if k != "$ref"},
            }
        return {name: inlined(each) for name, each in found.items()}

    complete: dict[str, Any] = inlined(schema)
    return complete


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value that can be left out, but cannot be null, such as a header or a field of a form."""
    if "anyOf" not in schema:
        return schema
    kinds = [kind for kind in schema["anyOf"] if kind != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return {**rest, **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})}
