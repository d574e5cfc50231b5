"""Typed values to plain ones and back, by pydantic; what goes wrong is said without any value."""

from __future__ import annotations

from typing import Any, Final, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core.core_schema import ErrorType

from brokertask.errors import InvalidPayload
from brokertask.values import clip

_SHOWN: Final = 10
_LONGEST_NAME: Final = 40
# Their texts quote the input, or are the users' own.
_SAYING_TOO_MUCH: Final = {
    "value_error",
    "assertion_error",
    "union_tag_invalid",
    "get_attribute_error",
    "iteration_error",
    "mapping_type",
    "import_error",
}
_HARMLESS: Final = frozenset(get_args(ErrorType)) - _SAYING_TOO_MUCH


def schema_of(
    kind: TypeAdapter[Any], *, references: str = "#/$defs/{model}"
) -> dict[str, Any] | None:
    """Return the JSON Schema of a type, or None if JSON has nothing like it."""
    try:
        return kind.json_schema(ref_template=references)
    except PydanticInvalidForJsonSchema:
        return None


def dump(kind: TypeAdapter[Any], value: object) -> object:
    """Return a value as plain ones, such that `load` gives it back.

    Raises:
        InvalidPayload: A serializer of the type failed.
    """
    try:
        return kind.serializer.to_python(value, round_trip=True, warnings=False)
    except Exception as error:
        raise InvalidPayload(f"it cannot be serialized: {type(error).__name__}") from error


def load(kind: TypeAdapter[Any], value: object) -> Any:
    """Return the typed value in plain ones.

    Lax even for strict models: on the wire a UUID is text and a tuple an array. Fields go by
    their alias, as others write them, or by their name, as `dump` does.

    Raises:
        InvalidPayload: It does not match, or a validator of the type failed.
    """
    try:
        return kind.validator.validate_python(value, strict=False, by_alias=True, by_name=True)
    except Exception as error:
        raise _invalid(error) from _cause(error)


def check(kind: TypeAdapter[Any], value: object) -> Any:
    """Return a value that a caller gave as `kind`, validated by the type's own rules.

    Raises:
        InvalidPayload: As `load`.
    """
    try:
        return kind.validator.validate_python(value)
    except Exception as error:
        raise _invalid(error) from _cause(error)


def _invalid(error: Exception) -> InvalidPayload:
    if isinstance(error, ValidationError):
        return InvalidPayload(explain(error))
    return InvalidPayload(f"a validator failed: {type(error).__name__}")


def _cause(error: Exception) -> Exception | None:
    """Return what may be shown of an error: a ValidationError says what the value was."""
    return None if isinstance(error, ValidationError) else error


def explain(error: ValidationError) -> str:
    """Return what is wrong, field by field, without any value: values may be secret."""
    problems = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(
        f"{'.'.join(clip(str(part), _LONGEST_NAME) for part in problem['loc']) or 'value'}: "
        + problem["type"]
        + (f" ({problem['msg']})" if problem["type"] in _HARMLESS else "")
        for problem in problems[:_SHOWN]
    )
