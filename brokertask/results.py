"""The result of a step as it is remembered, such that it comes back as what it was. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from brokertask.errors import InvalidPayload, UnsupportedType
from brokertask.typed import dump, load
from brokertask.values import MSGPACK, decode, encode


def packed(key: str, kind: TypeAdapter[Any] | None, value: object) -> bytes:
    """Return a step's result as it is remembered.

    Raises:
        UnsupportedType: It would not come back as what it is.
    """
    try:
        if kind is not None:
            return encode(dump(kind, value))
        result = encode(value)
    except InvalidPayload as error:
        raise UnsupportedType(f"the result of step {key!r}: {error}") from error
    if not same(decode(result, MSGPACK), value):
        raise UnsupportedType(
            f"step {key!r} returned a {type(value).__name__}, which would come back as something "
            "else; annotate what its function returns"
        )
    return result


def restored(key: str, kind: TypeAdapter[Any] | None, result: bytes) -> Any:
    """Return a step's result from what is remembered.

    Raises:
        UnsupportedType: It is not what its function's annotation says.
    """
    value = decode(result, MSGPACK)
    if kind is None:
        return value
    try:
        return load(kind, value)
    except InvalidPayload as error:
        raise UnsupportedType(
            f"the result of step {key!r} is not what its function's annotation says: {error}"
        ) from None


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of values as they come back: what their owner does to them leaves it alone.

    Raises:
        InvalidPayload: One would not come back as what it is.
    """
    # As deep as it is where it is remembered.
    copy: dict[str, Any] = decode(encode({"metadata": values}), MSGPACK)["metadata"]
    if not same(copy, dict(values)):
        raise InvalidPayload("metadata holds plain values only: text, numbers, lists, maps")
    return copy


def same(one: object, other: object) -> bool:
    """Whether two plain values are equal in type and value all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)
