"""Forms made from the JSON Schema of a payload, and payloads made from what was filled in. Pure.

A field for each property of an object; what has no simple field, is written as JSON. Numbers stay
text until they are read, so that none of their digits are lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from brokertask.errors import EnvelopeError
from brokertask.server.api.problems import Problem
from brokertask.values import JSON, decode

Kind: TypeAlias = Literal["text", "number", "choice", "json"]
WHOLE: Final = "payload"
PART: Final = "payload."
MAX_FIELDS: Final = 40
_SIMPLE: Final[Mapping[str, Kind]] = {"string": "text", "integer": "number", "number": "number"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of a form."""

    name: str
    """In the form."""
    label: str
    kind: Kind
    required: bool
    choices: tuple[str, ...] = ()
    """JSON texts."""
    hint: str = ""


def fields(schema: Any) -> list[Field]:
    """Return the fields for a payload of this schema; one for the whole, if it is no object."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not 0 < len(properties) <= MAX_FIELDS:
        return [_field(WHOLE, "Payload", schema, required=False)]
    required = schema.get("required", [])
    return [
        _field(f"{PART}{name}", name, each, required=name in required)
        for name, each in properties.items()
    ]


def payload_of(found: list[Field], form: Mapping[str, str]) -> Any:
    """Return the payload that was filled in; properties that were left empty are not in it.

    Raises:
        Problem: A field is no JSON, where it must be.
    """
    if found[0].name == WHOLE:
        return _value(found[0], form.get(WHOLE, ""))
    given = {each: form.get(each.name, "") for each in found}
    return {
        each.label: _value(each, text)
        for each, text in given.items()
        if text or (each.required and each.kind == "text")
    }


def _field(name: str, label: str, schema: Any, *, required: bool) -> Field:
    known = schema if isinstance(schema, dict) else {}
    hint = str(known.get("description") or "")
    kind: Kind = _SIMPLE.get(str(known.get("type")), "json")
    choices: tuple[str, ...] = ()
    if known.get("type") == "boolean":
        kind, choices = "choice", ("true", "false")
    elif kind == "text" and all(isinstance(one, str) for one in known.get("enum", [0])):
        kind, choices = (
            "choice",
            tuple(json.dumps(one, ensure_ascii=False) for one in known["enum"]),
        )
    return Field(name=name, label=label, kind=kind, required=required, choices=choices, hint=hint)


def _value(field: Field, text: str) -> Any:
    if field.kind == "text":
        return text
    if not text.strip():
        return None
    try:
        return decode(text.encode(), JSON)
    except (EnvelopeError, UnicodeEncodeError) as error:
        raise Problem("invalid", f"{field.label}: it is no JSON: {error}") from None
