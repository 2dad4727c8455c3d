"""The OpenAPI document, made true where FastAPI describes what this server does not do."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

NOT_OURS = "422"
"""The status with which FastAPI refuses parameters unless it is told otherwise; here, `errors` answers with 400."""
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
    for name in ITS_SCHEMAS:
        document["components"]["schemas"].pop(name, None)


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The operations of a document."""
    for path in document["paths"].values():
        yield from path.values()


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value that can be left out, but cannot be null, such as a header or a field of a form."""
    if "anyOf" not in schema:
        return schema
    kinds = [kind for kind in schema["anyOf"] if kind != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return {**rest, **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})}
