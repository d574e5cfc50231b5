"""What a task's function takes and returns, read from its annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, get_args, get_type_hints

from pydantic import TypeAdapter

from brokertask.context import Context
from brokertask.errors import UnsupportedType
from brokertask.functions import adapter
from brokertask.schedule import Tick

NEVER_USED: Final = (
    "would never be used, as a payload is always sent; put it into a model, as the default of a "
    "field"
)


@dataclass(frozen=True, slots=True)
class Signature:
    """Which parameters of a task are its payload and its context, and the types."""

    payload_name: str | None
    context_name: str | None
    payload: TypeAdapter[Any]
    result: TypeAdapter[Any]
    takes_tick: bool
    """Its payload tells a scheduled run which tick it is of."""

    @staticmethod
    def of(function: Callable[..., Any], where: str) -> Signature:
        """Return that of a function; `where` it is written is for the errors.

        Raises:
            UnsupportedType: No message could carry it.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise UnsupportedType(f"{where}: a generator has no one result; return a list")
        try:
            hints = get_type_hints(function, include_extras=True)
        except (NameError, AttributeError, TypeError, SyntaxError) as error:
            raise UnsupportedType(
                f"{where}: an annotation names something unknown ({error}); "
                "types of tasks must be importable from their module"
            ) from error
        payload_name = context_name = None
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise UnsupportedType(f"{where}: parameter {str(parameter)!r} has to have a name")
            if parameter.name not in hints:
                raise UnsupportedType(f"{where}: parameter {parameter.name!r} needs a type")
            if hints[parameter.name] is Context:
                context_name = parameter.name
            elif Context in get_args(hints[parameter.name]):
                raise UnsupportedType(
                    f"{where}: {parameter.name!r} is always given; annotate it as Context alone"
                )
            elif parameter.default not in (parameter.empty, None):
                raise UnsupportedType(f"{where}: the default of {parameter.name!r} {NEVER_USED}")
            elif payload_name is None:
                payload_name = parameter.name
            else:
                raise UnsupportedType(
                    f"{where}: {payload_name!r} and {parameter.name!r}: a task takes one payload "
                    "and a Context; put the two into a pydantic model or a dataclass"
                )
        payload = hints[payload_name] if payload_name else None
        return Signature(
            payload_name,
            context_name,
            adapter(payload, f"{where}: the payload"),
            adapter(hints.get("return", Any), f"{where}: the result"),
            payload in (Tick, Tick | None),
        )
