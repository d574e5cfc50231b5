"""Functions that users hand over: what they are called, what they return, and calling them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import (
    Any,
    Final,
    Never,
    NoReturn,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)
from weakref import WeakKeyDictionary

import anyio.to_thread
from pydantic import PydanticUserError, TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError

from brokertask.errors import ConfigurationError, UnsupportedType

InThread: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Calls a function in a thread: a method of `threads.Threads`."""


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives an awaitable, as far as can be seen without calling it."""
    return inspect.iscoroutinefunction(inspect.unwrap(_called(function)))


def in_loop(function: Callable[..., Any]) -> bool:
    """Whether a function is called in the event loop: calling it gives a coroutine.

    A sync function that only wraps an async one, as with asyncio.run, needs a thread.
    """
    return inspect.iscoroutinefunction(_called(function))


async def call(function: Callable[[], Any], *, thread: InThread | None = None) -> Any:
    """Call a function of either kind and return its result; a sync one runs in a thread.

    Cancelled, it does not wait for the thread, which Python cannot end. Without a `thread` to run
    it in, outside of a worker, it is one of anyio's.
    """
    if in_loop(function):
        return await function()
    if thread is None:
        result = await anyio.to_thread.run_sync(function, abandon_on_cancel=True)
    else:
        result = await thread(function)
    # A plain wrapper around an async function looks like a sync one until it is called.
    return await result if inspect.isawaitable(result) else result


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that the caller runs in, if it does in one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def qualified_name(function: Callable[..., Any]) -> str:
    """Return what a function is called in its module, or the class of another callable."""
    inner = _innermost(function)
    name = getattr(inner, "__qualname__", None)
    return name if isinstance(name, str) else type(inner).__qualname__


def place_of(function: Callable[..., Any]) -> str:
    """Return where a function is written: file and line.

    Raises:
        ConfigurationError: It is no function.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        raise ConfigurationError(f"a task is a function, not {function!r}")
    return f"{code.co_filename}:{code.co_firstlineno}"


def adapter(annotation: Any, what: str) -> TypeAdapter[Any]:
    """Return what validates and dumps values of an annotated type.

    Raises:
        UnsupportedType: pydantic has no form for it; `what` is named as what has the type.
    """
    try:
        return TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedType(
            f"{what} has a type that cannot cross the wire: {reason} "
            "Use types pydantic knows: models, dataclasses, TypedDicts, builtins"
        ) from None


def result_type(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    """Return the type that a function says its result has; None if it says nothing.

    Cost: up to 1 ms the first time; then 1 µs, for functions that stay.

    Raises:
        UnsupportedType: It is one that cannot be remembered.
    """
    inner = _innermost(function)
    try:
        return _known[inner]
    except (KeyError, TypeError):
        found = _result_type(inner)
    with suppress(TypeError):  # neither hashable nor weakly referable: nothing to know it by
        _known[inner] = found
    return found


_known: Final[WeakKeyDictionary[Callable[..., Any], TypeAdapter[Any] | None]] = WeakKeyDictionary()


def _result_type(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    name = qualified_name(function)
    called = function if inspect.isroutine(function) else type(function).__call__
    try:
        hints = get_type_hints(called, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise UnsupportedType(
            f"the result of {name}: its annotation names something unknown ({error})"
        ) from error
    annotation = hints.get("return", Any)
    if get_origin(annotation) in (Awaitable, Coroutine):
        annotation = get_args(annotation)[-1]
    if annotation in (Any, object, NoReturn, Never) or isinstance(annotation, TypeVar):
        return None
    return adapter(annotation, f"the result of {name}")


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is called in the end: the function of a partial, the method of an object."""
    while isinstance(function, partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    # A bound method is made anew each time it is looked up; its function stays.
    return function.__func__ if inspect.ismethod(function) else function
