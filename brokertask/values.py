"""One value as bytes: msgpack or JSON, bounded before it is built. Pure.

`encode` writes what `decode` reads again; `pack` is for our own structures, which need no check.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import fields, is_dataclass
from datetime import datetime
from types import NoneType
from typing import Any, Final, cast

import msgpack
from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic_core import to_jsonable_python

from brokertask.errors import EnvelopeError, InvalidPayload

MSGPACK: Final = "application/msgpack"
JSON: Final = "application/json"
MAX_DEPTH: Final = 64
MAX_COLLECTION: Final = 100_000
MAX_TEXT: Final = 2_000
LAST_INSTANT_MS: Final = 253_402_300_799_999
"""The end of the year 9999, where datetimes end; no number in a header may be larger."""

_ALWAYS_READ: Final = (NoneType, bool, int, float, str, bytes)
_MSGPACK_TYPES: Final = (MSGPACK, "application/x-msgpack", "application/vnd.msgpack")
# Each level of nesting takes at least one of these bytes: fixmap, fixarray, array 16/32, map 16/32
# in msgpack, and an opening bracket in JSON. Fewer of them than the limit can't be too deep.
_NOT_CONTAINERS: Final = bytes(set(range(256)) - {*range(0x80, 0xA0), *range(0xDC, 0xE0), *b"[{"})


def kind_of(content_type: str) -> str:
    """Return a content type in lower case and without parameters."""
    return content_type.partition(";")[0].strip().lower()


def clip(text: str, limit: int = MAX_TEXT) -> str:
    """Return `text` cut in its middle to at most `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def encode(value: object) -> bytes:
    """Return a value as msgpack that every reader takes.

    Aware datetimes are msgpack timestamps; UUID, Decimal, Path, Enum, … are text or numbers.
    Cost: about 2 µs for a small value.

    Raises:
        InvalidPayload: Something in it has no form on the wire, or no reader would take it.
    """
    body = pack(value)
    if isinstance(value, _ALWAYS_READ):
        return body
    try:
        decode(body, MSGPACK)
    except EnvelopeError as error:
        raise InvalidPayload(f"no worker could read it: {error}") from None
    return body


def pack(value: object) -> bytes:
    """Return a value as msgpack, unchecked: `decode` may refuse what is too deep or too long.

    Raises:
        InvalidPayload: Something in it has no form on the wire.
    """
    try:
        return cast("bytes", msgpack.packb(value, default=_simpler, datetime=True))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidPayload(f"cannot be written as msgpack: {error}") from error


def decode(body: bytes, content_type: str) -> Any:
    """Return the value in `body`: one msgpack or JSON value, bounded in depth and lengths.

    Cost: about 1 µs for a small payload. The caller bounds the size.

    Raises:
        EnvelopeError: reason `undecodable` or `too_deep`.
    """
    kind = kind_of(content_type)
    try:
        if kind in _MSGPACK_TYPES:
            value = _unpack(body)
        elif kind == JSON:
            value = json.loads(body, parse_constant=_refuse_constant)
        else:
            raise EnvelopeError(
                f"content type {clip(kind, 80)!r}; send {MSGPACK} or {JSON}", reason="undecodable"
            )
    except (msgpack.StackError, RecursionError):
        raise EnvelopeError(f"nested deeper than {MAX_DEPTH}", reason="too_deep") from None
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise EnvelopeError(
            f"not {kind}: {clip(f'{type(error).__name__}: {error}', 200)}", reason="undecodable"
        ) from None
    if _may_be_deep(body) and _deeper_than(value, MAX_DEPTH):
        raise EnvelopeError(f"nested deeper than {MAX_DEPTH}", reason="too_deep")
    return value


def _unpack(body: bytes) -> Any:
    # Each item takes a byte at least. An array is allocated as long as it says it is, at every
    # level of nesting, so that a lie of a few bytes would otherwise cost gigabytes.
    longest = min(MAX_COLLECTION, len(body))
    return msgpack.unpackb(
        body,
        timestamp=3,
        strict_map_key=False,
        ext_hook=_refuse_extension,
        max_array_len=longest,
        max_map_len=longest,
    )


def _may_be_deep(body: bytes) -> bool:
    return len(body) > MAX_DEPTH and len(body.translate(None, _NOT_CONTAINERS)) > MAX_DEPTH


def _deeper_than(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, dict | list))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, dict | list))
        if not inner:
            return False
        level = inner
    return True


def _simpler(value: object) -> object:
    """Return a form of `value` that is nearer to msgpack; what is inside it comes here in turn."""
    if isinstance(value, SecretStr | SecretBytes):
        raise InvalidPayload(
            "a pydantic Secret would be sent as asterisks; send a reference to the secret instead"
        )
    if isinstance(value, datetime):
        raise InvalidPayload("a datetime without a time zone; use datetime.now(UTC) or similar")
    if isinstance(value, set | frozenset | deque):
        return list(value)
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, round_trip=True, warnings=False)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    try:
        return to_jsonable_python(value)
    except ValueError as error:
        raise TypeError(str(error)) from None


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"msgpack extension type {code} of {len(data)} bytes has no meaning here")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
