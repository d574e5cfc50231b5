"""A declared function: its id, types and options, checked when it is declared."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    get_args,
    overload,
)

from pydantic import TypeAdapter

from brokertask import typed
from brokertask.batch import Source, as_they_come
from brokertask.client import Client
from brokertask.context import Context
from brokertask.durations import Duration, seconds
from brokertask.errors import (
    InvalidOption,
    InvalidPayload,
)
from brokertask.functions import InThread, call, in_loop, is_async, place_of
from brokertask.retry import Retry
from brokertask.run import Run
from brokertask.schedule import Schedule
from brokertask.signature import Signature
from brokertask.topology import QueueOptions, TaskQueue, check_task_id
from brokertask.trigger import ChildOptions, TriggerOptions
from brokertask.values import encode
from brokertask.waitable import Call, Map, Sender

P = TypeVar("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_CONCURRENCY: Final = 10
Checkpoint: TypeAlias = Literal["step", "retry"]
CallNext = Callable[[Context], Awaitable[Any]]
Middleware = Callable[[Context, CallNext], Awaitable[Any]]
"""`async (context, call_next) -> result`: wraps the call of a task, the outermost first."""


class TaskOptions(TypedDict, total=False):
    """What `@app.task` takes."""

    id: str
    """The contract on the wire. Default: the function's name."""
    retry: Retry
    """Default: 3 attempts, 1 to 60 s apart."""
    concurrency: int
    """How many runs of it one worker process executes at a time; 10 by default."""
    timeout: Duration | None
    """How long one attempt may take before it is cancelled and fails; none by default."""
    queue: QueueOptions
    """Limits of its queue."""
    checkpoint: Checkpoint
    """When finished steps are on the broker's disk: `step` (the default), before the next begins;
    `retry`, when the attempt ends, so that a crash forgets those of its attempt."""
    middleware: Sequence[Middleware]
    """Wrapped around this task only, inside the app's."""
    schedule: Schedule
    """When a server triggers it by itself; a worker tells the servers when it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A task's options, checked and complete."""

    retry: Retry
    concurrency: int
    timeout: float | None
    queue: QueueOptions
    checkpoint: Checkpoint
    middleware: tuple[Middleware, ...]
    schedule: Schedule | None


class Task(Generic[P, R]):
    """A declared task with payload type `P` and result type `R`.

    `await task(payload)` is a plain call, here and now; `await task.trigger(payload)` asks for a
    run on a worker.
    """

    def __init__(
        self, function: Callable[..., Any], *, id: str, options: Options, client: Client
    ) -> None:
        self.function = function
        self.id = check_task_id(id)
        self.options = options
        self.client = client
        self.where = place_of(function)
        self.is_async = inspect.iscoroutinefunction(function)
        signature = Signature.of(function, self.where)
        self._payload_name = signature.payload_name
        self._context_name = signature.context_name
        self.takes_context = signature.context_name is not None
        self._in_loop = in_loop(function)
        self.payload_type: TypeAdapter[Any] = signature.payload
        self.result_type: TypeAdapter[Any] = signature.result
        self.schedule_plain = self._schedule_plain(takes_tick=signature.takes_tick)
        self.success_hooks: list[Callable[[Context, R], Awaitable[None]]] = []
        self.failure_hooks: list[Callable[[Context, BaseException], Awaitable[None]]] = []
        self.cancel_hooks: list[Callable[[Context, str], Awaitable[None]]] = []
        self.__doc__ = function.__doc__
        # As a step it is known by its function's name and types.
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<Task {self.id} at {self.where}>"

    @overload
    async def __call__(self: Task[None, R], *, ctx: Context | None = None) -> R: ...
    @overload
    async def __call__(self, payload: P, *, ctx: Context | None = None) -> R: ...
    async def __call__(self, payload: Any = None, *, ctx: Context | None = None) -> Any:
        """Call the function here and now: no broker, no retry. Sync ones run in a thread."""
        context = ctx or Context(run_id="local", task=self.id, payload=payload)
        return await self.perform(context, payload)

    @overload
    async def trigger(self: Task[None, R], **options: Unpack[TriggerOptions]) -> Run[R]: ...
    @overload
    async def trigger(self, payload: P, **options: Unpack[TriggerOptions]) -> Run[R]: ...
    async def trigger(self, payload: Any = None, **options: Unpack[TriggerOptions]) -> Run[R]:
        """Ask for a run; when this returns it is on the broker's disk.

        Raises:
            InvalidPayload: The payload is not of the task's type; nothing was sent.
            PublishError: The broker did not take it, or (`unknown`) may have; see `errors`.
        """
        _check_names("trigger", options, TriggerOptions)
        return await self.client.trigger(
            self.id, self.dump(payload), result=self.result_type, **options
        )

    async def trigger_many(
        self, payloads: Iterable[P], **options: Unpack[ChildOptions]
    ) -> list[Run[R]]:
        """Ask for a run for each payload, in their order, sharing round trips to the broker.

        Raises:
            InvalidPayload: One is not of the task's type; nothing was sent.
            BatchError: Some were not taken; its `results` tell of each.
        """
        _check_names("trigger_many", options, ChildOptions)
        dumped = [self.dump(payload) for payload in payloads]
        return await self.client.trigger_many(self.id, dumped, result=self.result_type, **options)

    @overload
    def call(self: Task[None, R], **options: Unpack[ChildOptions]) -> Call[R]: ...
    @overload
    def call(self, payload: P, **options: Unpack[ChildOptions]) -> Call[R]: ...
    def call(self, payload: Any = None, **options: Unpack[ChildOptions]) -> Call[R]:
        """Return a child run for `ctx.wait_for`, which triggers it and gives back its result.

        Its id follows from its parent's, so that it is triggered once however often the parent
        runs over the wait, but for faults.

        Raises:
            InvalidPayload: The payload is not of the task's type.
        """
        return Call(
            self.id, [self.dump(payload)], result=self.result_type, send=self._send(options)
        )

    def trigger_stream(
        self, payloads: Source[P], **options: Unpack[ChildOptions]
    ) -> AsyncIterator[Run[R]]:
        """Ask for a run for each payload while they come, and yield the runs in order.

        For more than fits in memory. It fails as `trigger_many`; the runs it yielded were taken.
        """
        _check_names("trigger_stream", options, ChildOptions)
        return self.client.trigger_stream(
            self.id,
            (self.dump(payload) async for payload in as_they_come(payloads)),
            result=self.result_type,
            **options,
        )

    def map(self, payloads: Iterable[P], **options: Unpack[ChildOptions]) -> Map[R]:
        """Return a child run for each payload, for `ctx.wait_for`: as `call`, many at once.

        The wait gives a list in the order of the payloads, with a `Failure` for a run that gave no
        result.
        """
        dumped = [self.dump(payload) for payload in payloads]
        return Map(self.id, dumped, result=self.result_type, send=self._send(options))

    def _send(self, options: ChildOptions) -> Sender:
        _check_names("a child", options, ChildOptions)

        async def send(payloads: Sequence[object], run_ids: Sequence[str]) -> None:
            await self.client.trigger_many(self.id, payloads, run_ids=run_ids, **options)

        return send

    @overload
    def trigger_sync(self: Task[None, R], **options: Unpack[TriggerOptions]) -> Run[R]: ...
    @overload
    def trigger_sync(self, payload: P, **options: Unpack[TriggerOptions]) -> Run[R]: ...
    def trigger_sync(self, payload: Any = None, **options: Unpack[TriggerOptions]) -> Run[R]:
        """Do what `trigger` does, from a thread without an event loop."""
        _check_names("trigger_sync", options, TriggerOptions)
        return self.client.trigger_sync(
            self.id, self.dump(payload), result=self.result_type, **options
        )

    def on_success(
        self, hook: Callable[[Context, R], Awaitable[None]]
    ) -> Callable[[Context, R], Awaitable[None]]:
        """Call `hook(context, result)` after each run that succeeds; it cannot change that."""
        self.success_hooks.append(check_async(hook, "a hook"))
        return hook

    def on_failure(
        self, hook: Callable[[Context, BaseException], Awaitable[None]]
    ) -> Callable[[Context, BaseException], Awaitable[None]]:
        """Call `hook(context, error)` when a run has no attempts left, before it is buried."""
        self.failure_hooks.append(check_async(hook, "a hook"))
        return hook

    def on_cancel(
        self, hook: Callable[[Context, str], Awaitable[None]]
    ) -> Callable[[Context, str], Awaitable[None]]:
        """Call `hook(context, reason)` when a run ends cancelled, begun or not."""
        self.cancel_hooks.append(check_async(hook, "a hook"))
        return hook

    @property
    def checkpoints(self) -> bool:
        """Whether its runs may have steps that are saved one by one."""
        return self.takes_context and self.options.checkpoint == "step"

    @property
    def queue(self) -> TaskQueue:
        """What the topology needs to know of it."""
        return TaskQueue(self.id, self.options.queue)

    def _schedule_plain(self, *, takes_tick: bool) -> dict[str, Any] | None:
        """Return what servers are told of its schedule, its payload checked now."""
        schedule = self.options.schedule
        if schedule is None:
            return None
        gets_tick = takes_tick and schedule.payload is None
        payload = None if gets_tick else self.dump(schedule.payload)
        return {**schedule.plain(), "payload": encode(payload), "sends_tick": gets_tick}

    def dump(self, payload: object) -> object:
        """Return a payload as plain values, validated.

        Raises:
            InvalidPayload: It is not of the task's type. The message holds no values.
        """
        try:
            return typed.dump(self.payload_type, typed.check(self.payload_type, payload))
        except InvalidPayload as error:
            raise InvalidPayload(f"payload of {self.id!r}: {error}") from error.__cause__

    def load(self, value: object) -> Any:
        """Return the payload from decoded plain values.

        Raises:
            InvalidPayload: As `dump`.
        """
        return typed.load(self.payload_type, value)

    async def perform(
        self, context: Context | None, payload: object, *, thread: InThread | None = None
    ) -> Any:
        """Call the function with what its signature asks for; no Context, if it takes none."""
        arguments: dict[str, Any] = {}
        if self._payload_name is not None:
            arguments[self._payload_name] = payload
        if self._context_name is not None:
            arguments[self._context_name] = context
        if self._in_loop:
            return await self.function(**arguments)
        return await call(partial(self.function, **arguments), thread=thread)


class TaskDecorator:
    """`@app.task` and `@app.task(...)`: declares a function as a task."""

    def __init__(self, register: Callable[[Task[Any, Any]], None], client: Client) -> None:
        self._register = register
        self._client = client
        self._options: TaskOptions = {}

    @overload
    def __call__(self, function: Callable[[], Awaitable[R]], /) -> Task[None, R]: ...
    @overload
    def __call__(self, function: Callable[[Context], Awaitable[R]], /) -> Task[None, R]: ...
    @overload
    def __call__(self, function: Callable[[P, Context], Awaitable[R]], /) -> Task[P, R]: ...
    # A function of a Context that returns an awaitable is taken by the second overload already.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[[P], Awaitable[R]], /
    ) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[[], R], /) -> Task[None, R]: ...
    @overload
    def __call__(self, function: Callable[[Context], R], /) -> Task[None, R]: ...
    @overload
    def __call__(self, function: Callable[[P, Context], R], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[[P], R], /) -> Task[P, R]: ...
    @overload
    def __call__(self, /, **options: Unpack[TaskOptions]) -> TaskDecorator: ...
    def __call__(
        self, function: Callable[..., Any] | None = None, /, **options: Unpack[TaskOptions]
    ) -> Any:
        """Declare `function`, or return a decorator with these options."""
        _check_names("task", options, TaskOptions)
        if function is None:
            decorator = TaskDecorator(self._register, self._client)
            decorator._options = {**self._options, **options}
            return decorator
        if not callable(function):
            raise InvalidOption(f"@app.task takes options by name only, not {function!r}")
        given = self._options
        task: Task[Any, Any] = Task(
            function,
            id=given.get("id", getattr(function, "__name__", "")),
            options=_checked(given),
            client=self._client,
        )
        self._register(task)
        return task


def _checked(given: TaskOptions) -> Options:
    concurrency = given.get("concurrency", DEFAULT_CONCURRENCY)
    if isinstance(concurrency, bool) or not isinstance(concurrency, int):
        raise InvalidOption(f"concurrency is a whole number, not {concurrency!r}")
    if not 1 <= concurrency <= 65_535:
        raise InvalidOption(f"concurrency is 1 to 65535, not {concurrency}")
    retry, queue = given.get("retry", Retry()), given.get("queue", QueueOptions())
    if not isinstance(retry, Retry):
        raise InvalidOption(f"retry is a Retry(...), not {retry!r}")
    if not isinstance(queue, QueueOptions):
        raise InvalidOption(f"queue is a Queue(...), not {queue!r}")
    timeout = given.get("timeout")
    if timeout is not None and seconds(timeout) == 0:
        raise InvalidOption("a timeout is more than 0; leave it out for none")
    schedule = given.get("schedule")
    if not isinstance(schedule, Schedule | None):
        raise InvalidOption(f"schedule is a Schedule(...), not {schedule!r:.80}")
    checkpoint = given.get("checkpoint", "step")
    if checkpoint not in get_args(Checkpoint):
        raise InvalidOption(f"checkpoint is 'step' or 'retry', not {checkpoint!r}")
    return Options(
        retry=retry,
        concurrency=concurrency,
        timeout=None if timeout is None else seconds(timeout),
        queue=queue,
        checkpoint=checkpoint,
        middleware=tuple(
            check_async(middleware, "a middleware") for middleware in given.get("middleware", ())
        ),
        schedule=schedule,
    )


def check_async(function: F, what: str) -> F:
    """Return a function that is awaited later, or raise `InvalidOption` now."""
    if not is_async(function):
        raise InvalidOption(f"{what} is an async function, not {function!r}")
    return function


def _check_names(where: str, given: Any, allowed: type) -> None:
    names = allowed.__annotations__
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}"
            raise InvalidOption(f"{where} has no option {name!r}; {hint}")


def _check_many(where: str, given: Any) -> None:
    _check_names(where, given, TriggerOptions)
    if given.pop("run_id", None) is not None:
        raise InvalidOption(f"{where}: each run has an id of its own; leave out run_id")
