"""Values of the wire as JSON: what msgpack has and JSON has not, as text."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_jsonable_python

from brokertask.errors import EnvelopeError
from brokertask.server.api.problems import Problem
from brokertask.values import decode


def shown(value: object) -> Any:
    """Return a decoded value as JSON: bytes as base64, instants as ISO 8601, NaN as text."""
    return to_jsonable_python(
        value, bytes_mode="base64", inf_nan_mode="strings", serialize_unknown=True
    )


def shown_body(body: bytes, content_type: str) -> Any:
    """Return the value in a body as JSON.

    Raises:
        Problem: There is none in it that could be shown.
    """
    try:
        return shown(decode(body, content_type))
    except EnvelopeError as error:
        raise Problem("conflict", f"it cannot be shown: {error}") from None
