"""An example of a payload, from the JSON schema of its type."""

from __future__ import annotations

import json
import shlex
from typing import Any, Final

from brokertask.task import Task

MAX_DEPTH: Final = 4
MAX_OPTIONAL: Final = 6
_TEXTS: Final = {
    "date": "2030-01-31",
    "date-time": "2030-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT5M",
    "email": "ada@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "path": "a.txt",
    "file-path": "a.txt",
    "ipv4": "192.0.2.1",
}


def example_command(task: Task[Any, Any]) -> str:
    """Return a command that triggers a run of `task`."""
    command = f"brokertask trigger {task.id}"
    try:
        schema = task.payload_type.json_schema()
    except Exception:  # some types have no schema; the command is still a beginning
        return command
    if schema == {"type": "null"}:
        return command
    payload = json.dumps(example(schema), ensure_ascii=False)
    return f"{command} {shlex.quote(payload)}"


def example(schema: dict[str, Any]) -> Any:
    """Return a value that a JSON schema allows, in the usual cases."""
    return _example(schema, schema.get("$defs", {}), MAX_DEPTH)


def _example(schema: dict[str, Any], known: dict[str, Any], depth: int) -> Any:
    for name in ("default", "const"):
        if name in schema:
            return schema[name]
    for name in ("examples", "enum"):
        if schema.get(name):
            return schema[name][0]
    if "$ref" in schema:
        return _example(known.get(schema["$ref"].rpartition("/")[2], {}), known, depth)
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            return _example(schema[name][0], known, depth)
    return _of_type(schema, known, depth)


def _of_type(schema: dict[str, Any], known: dict[str, Any], depth: int) -> Any:
    match schema.get("type"):
        case "string":
            text = _TEXTS.get(schema.get("format", ""), "text")
            return text.ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength")]
        case "integer" | "number":
            return _number(schema)
        case "boolean":
            return True
        case "array":
            return _array(schema, known, depth)
        case "object":
            return _object(schema, known, depth)
        case _:
            return None


def _number(schema: dict[str, Any]) -> int | float:
    low: int | float = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    step: int | float = schema.get("multipleOf", 1)
    value = -(-low // step) * step
    high: int | float = schema.get("maximum", value)
    return min(value, high)


def _array(schema: dict[str, Any], known: dict[str, Any], depth: int) -> list[Any]:
    if "prefixItems" in schema:
        return [_example(item, known, depth - 1) for item in schema["prefixItems"]]
    if depth == 0 or not schema.get("items"):
        return []
    return [_example(schema["items"], known, depth - 1)] * max(1, schema.get("minItems", 1))


def _object(schema: dict[str, Any], known: dict[str, Any], depth: int) -> dict[str, Any]:
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    wanted = required or ([*properties][:MAX_OPTIONAL] if depth else [])
    return {
        name: _example(properties[name], known, depth - 1) for name in wanted if name in properties
    }
