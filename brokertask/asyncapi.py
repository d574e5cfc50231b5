"""The AsyncAPI 3.0 document of an app: what it takes from the broker, and what it tells there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from pydantic import TypeAdapter

from brokertask.task import Task
from brokertask.topology import Names
from brokertask.typed import schema_of
from brokertask.values import JSON, MSGPACK

REFERENCE: Final = "#/components/schemas/{model}"
HEADERS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "bt-expires": {
            "type": "integer",
            "description": "Do not start the run later than this, in ms since the epoch.",
        },
        "bt-tags": {"type": "array", "maxItems": 32, "items": {"type": "string"}},
        "traceparent": {"type": "string"},
        "tracestate": {"type": "string"},
        "baggage": {"type": "string"},
    },
}
"""What any publisher may set."""
EVENT: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["event", "run_id", "task", "attempt", "at_ms", "worker"],
    "properties": {
        "event": {"type": "string"},
        "run_id": {"type": "string"},
        "task": {"type": "string"},
        "attempt": {"type": "integer", "minimum": 1},
        "at_ms": {"type": "integer", "description": "When, in ms since the epoch."},
        "worker": {"type": "string"},
    },
}
"""What all events have in common; docs/concepts/wire-format.md has the rest."""


def document(
    name: str, version: str, tasks: Iterable[Task[Any, Any]], names: Names
) -> dict[str, Any]:
    """Return the document of an app with these tasks."""
    schemas: dict[str, Any] = {"Event": EVENT}
    channels: dict[str, Any] = {"events": _events(names)}
    operations: dict[str, Any] = {
        "tellEvents": {"action": "send", "channel": {"$ref": "#/channels/events"}}
    }
    for task in tasks:
        key = f"trigger.{task.id}".replace(":", "-")
        channels[key] = _channel(task, names, schemas)
        operations[f"run.{task.id}".replace(":", "-")] = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{key}"},
            "summary": (task.__doc__ or "").strip().partition("\n")[0] or f"Run {task.id}",
        }
    return {
        "asyncapi": "3.0.0",
        "info": {"title": name, "version": version},
        "defaultContentType": MSGPACK,
        "channels": channels,
        "operations": operations,
        "components": {"schemas": schemas},
    }


def _channel(task: Task[Any, Any], names: Names, schemas: dict[str, Any]) -> dict[str, Any]:
    message = {
        "name": task.id,
        "title": f"A trigger of {task.id}",
        "contentType": MSGPACK,
        "description": f"As {JSON}, it is converted.",
        "headers": HEADERS,
        "payload": _schema(task.payload_type, schemas),
        "x-result": _schema(task.result_type, schemas),
    }
    return {
        "address": task.id,
        "messages": {"trigger": message},
        "bindings": {"amqp": _exchange(names.tasks, "direct")},
    }


def _events(names: Names) -> dict[str, Any]:
    return {
        "address": "{event}.{task}",
        "parameters": {
            "event": {"description": "What happened, such as completed or failed."},
            "task": {"description": "The task's id."},
        },
        "messages": {
            "event": {
                "name": "event",
                "contentType": MSGPACK,
                "payload": {"$ref": REFERENCE.format(model="Event")},
            }
        },
        "bindings": {"amqp": _exchange(names.events, "topic")},
    }


def _exchange(name: str, kind: str) -> dict[str, Any]:
    exchange = {"name": name, "type": kind, "durable": True, "autoDelete": False, "vhost": "/"}
    return {"is": "routingKey", "exchange": exchange, "bindingVersion": "0.3.0"}


def _schema(adapter: TypeAdapter[Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a type, its parts among `schemas`; {} if it has none."""
    schema = schema_of(adapter, references=REFERENCE) or {}
    schemas.update(schema.pop("$defs", {}))
    return schema
