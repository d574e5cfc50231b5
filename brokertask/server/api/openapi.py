"""The OpenAPI 3.1 document, made from the operations as they are declared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from brokertask import __version__
from brokertask.server.api.operations import Operation
from brokertask.server.api.problems import CONTENT_TYPE, KINDS, Kind, ProblemView

REFERENCE: Final = "#/components/schemas/{model}"
PREFIX: Final = "/api/v1"
DESCRIPTION: Final = """\
Runs of tasks, what they wait for, and what may be done to them. Errors are problems (RFC 9457).
Lists come in pages: `next` of one is the `cursor` of the next. Instants are ms since the epoch,
durations seconds."""
EVERYWHERE: Final[tuple[Kind, ...]] = (
    "malformed",
    "misdirected",
    "too_many_requests",
    "store_unavailable",
)
"""Problems that any operation may have."""


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the document."""
    schemas = _Schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _operation(operation, schemas)
        paths.setdefault(PREFIX + operation.path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "brokertask", "version": __version__, "description": DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API token: `brokertask tokens create`.",
                }
            },
        },
        "security": [{"token": []}, {}],
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in operations)],
    }


class _Schemas:
    """The schemas of all that is sent and answered."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        asked: list[tuple[int, JsonSchemaMode, TypeAdapter[Any]]] = []
        self._keys: dict[tuple[str, str, str], int] = {}
        for operation in operations:
            where = (operation.path, operation.method)
            if operation.query is not None:
                self._ask(asked, (*where, "query"), "validation", TypeAdapter(operation.query))
            if operation.body is not None:
                self._ask(asked, (*where, "body"), "validation", TypeAdapter(operation.body))
            if operation.answer is not None:
                self._ask(asked, (*where, "answer"), "serialization", operation.answer)
            for name, adapter in operation.path_types.items():
                self._ask(asked, (*where, f"path {name}"), "validation", adapter)
        self._ask(asked, ("", "", "problem"), "serialization", TypeAdapter(ProblemView))
        self._schemas, shared = TypeAdapter.json_schemas(asked, ref_template=REFERENCE)
        self.components: dict[str, Any] = shared.get("$defs", {})

    def of(self, operation: Operation | None, part: str) -> dict[str, Any]:
        """Return the schema of a part of an operation."""
        path, method = ("", "") if operation is None else (operation.path, operation.method)
        key = self._keys[path, method, part]
        found = {name: schema for (name, _), schema in self._schemas.items()}[key]
        return dict(found)

    def resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return a schema with the component that it refers to in its place."""
        reference = schema.get("$ref")
        return self.components[reference.rpartition("/")[2]] if reference else schema

    def _ask(
        self,
        asked: list[tuple[int, JsonSchemaMode, TypeAdapter[Any]]],
        where: tuple[str, str, str],
        mode: JsonSchemaMode,
        adapter: TypeAdapter[Any],
    ) -> None:
        self._keys[where] = len(asked)
        asked.append((len(asked), mode, adapter))


def _operation(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    summary, description = operation.words
    rights = f"Role: {operation.role}" + (
        ", with the right `payloads`" if operation.reveals else ""
    )
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": summary,
        "description": f"{description}\n\n{rights}.".strip(),
        "parameters": [*_path_parameters(operation, schemas), *_query(operation, schemas)],
        "responses": _responses(operation, schemas),
    }
    if operation.body is not None:
        content = {"application/json": {"schema": schemas.of(operation, "body")}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.public:
        described["security"] = []
        described["description"] = description
    return described


def _path_parameters(operation: Operation, schemas: _Schemas) -> list[dict[str, Any]]:
    names = re.findall(r"{(\w+)}", operation.path)
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": schemas.of(operation, f"path {name}"),
        }
        for name in names
    ]


def _query(operation: Operation, schemas: _Schemas) -> list[dict[str, Any]]:
    if operation.query is None:
        return []
    model = schemas.resolved(schemas.of(operation, "query"))
    described = []
    for name, schema in model["properties"].items():
        parameter = {"name": name, "in": "query", "schema": _given(schema)}
        if "description" in schema:
            parameter["description"] = schema["description"]
        described.append({**parameter, "required": name in model.get("required", ())})
    return described


def _given(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter that is there: in a query string nothing is null."""
    options = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if "anyOf" not in schema or len(options) != 1:
        return schema
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return {**rest, **options[0]}


def _responses(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    summary = operation.words[0]
    good: dict[str, Any] = {"description": summary}
    if operation.answer is not None:
        good["content"] = {"application/json": {"schema": schemas.of(operation, "answer")}}
    elif operation.status != 204:
        good["content"] = {operation.media: {"schema": {"type": "string"}}}
    responses = {str(operation.status): good}
    kinds: list[Kind] = [*EVERYWHERE, *_implied(operation), *operation.problems]
    problem = {CONTENT_TYPE: {"schema": schemas.of(None, "problem")}}
    for status in sorted({KINDS[kind][0] for kind in kinds}):
        words = "; ".join(
            f"`{kind}`: {title.lower()}"
            for kind, (code, title) in KINDS.items()
            if kind in kinds and code == status
        )
        responses[str(status)] = {"description": words, "content": problem}
    return responses


def _implied(operation: Operation) -> Iterable[Kind]:
    if not operation.public:
        yield from ("unauthenticated", "forbidden")
    if operation.method != "GET":
        yield "forbidden"
    if operation.path_types:
        yield "not_found"
    if operation.path_types or operation.query is not None or operation.body is not None:
        yield "invalid"
    if operation.body is not None:
        yield from ("too_large", "unsupported_media_type")
