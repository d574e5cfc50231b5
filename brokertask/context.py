"""What a task may know of its run and ask of it: steps, sleeps, progress."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping
from concurrent.futures import CancelledError
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeVar, TypeVarTuple, overload

from brokertask.durations import Duration, seconds
from brokertask.errors import ConfigurationError, InvalidOption
from brokertask.functions import adapter
from brokertask.memory import Metadata
from brokertask.retry import Retry
from brokertask.run import Run, from_thread
from brokertask.steps import Steps
from brokertask.values import LAST_INSTANT_MS
from brokertask.waitable import Failure, First, Happening, Map, OtherRun, TimedOut, Token, Waitable
from brokertask.waiting import Waits

log = logging.getLogger("brokertask.task")
T = TypeVar("T")
A = TypeVarTuple("A")


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds `run_id`, `task`, `attempt`, `trace_id` and `worker` to each record, as attributes."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the message as it is, with the run's fields among its extras."""
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return msg, kwargs


class RunMetadata(MutableMapping[str, Any]):
    """A run's notes about itself: plain values by name, remembered like its steps."""

    def __init__(self, steps: Steps, changed: Callable[[], None]) -> None:
        self._steps = steps
        self._changed = changed

    def __getitem__(self, name: str) -> Any:
        return deepcopy(self._steps.memory.metadata[name])

    def __setitem__(self, name: str, value: Any) -> None:
        self._put(lambda notes: {**notes, name: value})

    def __delitem__(self, name: str) -> None:
        if name not in self._steps.memory.metadata:
            raise KeyError(name)
        self._put(lambda notes: {other: notes[other] for other in notes if other != name})

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps.memory.metadata)

    def __len__(self) -> int:
        return len(self._steps.memory.metadata)

    def _put(self, change: Callable[[Metadata], Metadata]) -> None:
        self._steps.put_metadata(change)
        self._changed()


@dataclass(slots=True, kw_only=True)
class Context:
    """The run a task executes in; ask for it with a parameter of this type."""

    run_id: str
    """The run's id: the same in every attempt, so a key against doing things twice."""
    task: str
    attempt: int = 1
    """Which attempt this is, 1-based."""
    max_attempts: int = 1
    payload: Any = None
    """The validated payload."""
    tags: tuple[str, ...] = ()
    triggered_at: datetime | None = None
    deadline: datetime | None = None
    """When this attempt is cancelled; None without a timeout. It begins anew after a long sleep."""
    parent: str | None = None
    """The id of the run that triggered this one, if one did."""
    root: str | None = None
    """The id of the first run of the tree, if this is not it."""
    worker: str = "local"
    trace_id: str | None = None
    state: Any = None
    """What the app's lifespan yielded: pools, clients, models."""
    cancelled: str | None = None
    """Why this attempt was cancelled: `timeout`, `drain`, `sleep` or `wait` (it goes on later),
    `lost` (another worker has the run), `cancelled` (the run ends here); threads should look."""
    progressed: tuple[float, float | None] | None = None
    """What `progress` was told last."""
    steps: Steps = field(default_factory=Steps, repr=False)
    changed: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def log(self) -> RunLogger:
        """A logger whose records tell of the run."""
        fields = {
            "run_id": self.run_id,
            "task": self.task,
            "attempt": self.attempt,
            "trace_id": self.trace_id,
            "worker": self.worker,
        }
        return RunLogger(log, fields)

    @property
    def metadata(self) -> RunMetadata:
        """Notes of the run about itself, remembered by it and told in its events.

        A mapping of names to plain values. Set items, do not change values in place.
        """
        return RunMetadata(self.steps, lambda: self.changed())

    @property
    def waits(self) -> Waits:
        """What `wait_for` asks."""
        return Waits(self.steps, self.run_id)

    @overload
    def step(
        self,
        name: str,
        function: Callable[[*A], Awaitable[T]],
        /,
        *args: *A,
        retry: Retry | None = None,
        timeout: Duration | None = None,
    ) -> Coroutine[Any, Any, T]: ...
    @overload
    def step(
        self,
        name: str,
        function: Callable[[*A], T],
        /,
        *args: *A,
        retry: Retry | None = None,
        timeout: Duration | None = None,
    ) -> Coroutine[Any, Any, T]: ...
    def step(
        self,
        name: str,
        function: Callable[[*A], Any],
        /,
        *args: *A,
        retry: Retry | None = None,
        timeout: Duration | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Call `function(*args)` once in the life of the run, and give back its result.

        A later attempt, a resumed or redriven run gets the remembered result, in microseconds.
        The result is in msgpack: it comes back as what the function's annotation says (pydantic
        models, dataclasses, aware datetimes in UTC), or is plain. A sync function runs in a
        thread. In gather and TaskGroup, steps run side by side.

        A name used again is numbered in the order of the calls: `fetch`, `fetch#2`. Two asyncio
        tasks need different names.

        Args:
            name: What to remember it by; 1 to 128 characters.
            function: What to call; async or not.
            *args: Its arguments. They are not remembered.
            retry: Tries within this attempt; one by default.
            timeout: Seconds, or "1m", that one try may take.

        Cost: with `checkpoint="step"` a confirmed publish, a delivery and an ack, 2 to 3 ms.

        Raises:
            StepMismatch: The run has finished other steps than the code asks for; it is buried.
            MemoryFull: The result does not fit into what the run may remember; it is buried.
            UnsupportedType: The result would not come back as what it is.
            TimeoutError: The last try took longer than `timeout`.
        """
        if not callable(function):
            raise InvalidOption(
                f"step {name!r}: {function!r} is no function; pass it and its arguments, as in "
                "ctx.step('charge', charge, order)"
            )
        if not (retry is None or isinstance(retry, Retry)):
            raise InvalidOption(f"step {name!r}: retry is a Retry(...), not {retry!r}")
        limit = None if timeout is None else seconds(timeout)
        return self.steps.step(name, function, args, retry=retry, timeout=limit)

    @overload
    def step_sync(
        self,
        name: str,
        function: Callable[[*A], Awaitable[T]],
        /,
        *args: *A,
        retry: Retry | None = None,
        timeout: Duration | None = None,
    ) -> T: ...
    @overload
    def step_sync(
        self,
        name: str,
        function: Callable[[*A], T],
        /,
        *args: *A,
        retry: Retry | None = None,
        timeout: Duration | None = None,
    ) -> T: ...
    def step_sync(
        self,
        name: str,
        function: Callable[[*A], Any],
        /,
        *args: *A,
        retry: Retry | None = None,
        timeout: Duration | None = None,
    ) -> Any:
        """Do what `step` does, in a task that is a sync function."""
        step = self.step(name, function, *args, retry=retry, timeout=timeout)
        return self._from_thread(step, "step_sync", "await ctx.step(...)")

    def sleep(self, duration: Duration, *, name: str | None = None) -> Coroutine[Any, Any, None]:
        """Sleep for so long, once in the life of the run.

        Up to 5 s the run keeps its slot. From then on it leaves it: its code is cancelled (with
        `ctx.cancelled == "sleep"`), and when the time has come, on whichever worker, the function
        runs again from the top, past the steps it has finished. Steps beside it end first.

        Sleeps in several asyncio tasks that have no step before them need a `name` each.
        """
        milliseconds = round(seconds(duration) * 1000)
        return self.steps.sleep(lambda now_ms: now_ms + milliseconds, name=name)

    def sleep_until(self, when: datetime, *, name: str | None = None) -> Coroutine[Any, Any, None]:
        """Sleep until an instant, as `sleep` does; at once if it has passed.

        Raises:
            InvalidOption: A datetime without a time zone.
        """
        if not isinstance(when, datetime) or when.tzinfo is None:
            raise InvalidOption(
                f"sleep_until: {when!r} is no datetime with a time zone; use datetime.now(UTC) + …"
            )
        due_ms = min(LAST_INSTANT_MS, round(when.astimezone(UTC).timestamp() * 1000))
        return self.steps.sleep(lambda _: due_ms, name=name)

    def sleep_sync(self, duration: Duration, *, name: str | None = None) -> None:
        """Do what `sleep` does, in a task that is a sync function."""
        self._from_thread(self.sleep(duration, name=name), "sleep_sync", "await ctx.sleep(...)")

    @overload
    def wait_for(
        self, waitable: Map[T], /, *, timeout: Duration | None = None, name: str | None = None
    ) -> Coroutine[Any, Any, list[T | Failure]]: ...
    @overload
    def wait_for(  # pyright: ignore[reportOverlappingOverload]
        self, waitable: Waitable[T] | Run[T], /, *, timeout: None = None, name: str | None = None
    ) -> Coroutine[Any, Any, T]: ...
    @overload
    def wait_for(  # pyright: ignore[reportOverlappingOverload]
        self, waitable: Waitable[T] | Run[T], /, *, timeout: Duration, name: str | None = None
    ) -> Coroutine[Any, Any, T | TimedOut]: ...
    @overload
    def wait_for(
        self,
        *waitables: Waitable[T] | Run[T],
        first: Literal[True],
        timeout: None = None,
        name: str | None = None,
    ) -> Coroutine[Any, Any, First[T]]: ...
    @overload
    def wait_for(
        self,
        *waitables: Waitable[T] | Run[T],
        first: Literal[True],
        timeout: Duration,
        name: str | None = None,
    ) -> Coroutine[Any, Any, First[T] | TimedOut]: ...
    @overload
    def wait_for(
        self,
        *waitables: Waitable[T] | Run[T],
        timeout: None = None,
        name: str | None = None,
    ) -> Coroutine[Any, Any, list[T]]: ...
    @overload
    def wait_for(
        self,
        *waitables: Waitable[T] | Run[T],
        timeout: Duration,
        name: str | None = None,
    ) -> Coroutine[Any, Any, list[T | TimedOut]]: ...
    def wait_for(
        self,
        *waitables: Any,
        first: bool = False,
        timeout: Duration | None = None,
        name: str | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Wait for children, other runs, tokens or events: in a server, and in no worker.

        The run leaves its slot, as for a long sleep, with `ctx.cancelled == "wait"`, and goes on
        from the top, past what it has finished, when all have come, or with `first` one of them.
        What came is remembered. Waits in asyncio.gather go on one by one.

        Args:
            *waitables: `task.call(...)`, `task.map(...)`, `ctx.token(...)`, `ctx.event(...)`, a
                `Run`. For one its value is returned, for several a list.
            first: Return the `First` that came; the others go on.
            timeout: Seconds, or "7d"; then `TimedOut` stands for what has not come.
            name: Needed in several asyncio tasks that have no step before them.

        Raises:
            ChildFailed: A run gave no result. In the list of a map it is a `Failure`.
            NoServer: No server was ever started on this broker.
        """
        limit = None if timeout is None else seconds(timeout)
        wanted = [OtherRun(one) if isinstance(one, Run) else one for one in waitables]
        for one in wanted:
            if not isinstance(one, Waitable):
                raise InvalidOption(f"wait_for takes task.call(...) and the like, not {one!r:.80}")
        waiting = self.waits.wait_for(wanted, first=first, timeout=limit, name=name)
        return waiting if first or len(wanted) > 1 else _only(waiting)

    def wait_for_sync(self, *waitables: Any, **options: Any) -> Any:
        """Do what `wait_for` does, in a task that is a sync function."""
        wait = self.wait_for(*waitables, **options)
        return self._from_thread(wait, "wait_for_sync", "await ctx.wait_for(...)")

    @overload
    def token(self, name: str, *, timeout: Duration | None = None) -> Token[Any]: ...
    @overload
    def token(self, name: str, kind: type[T], *, timeout: Duration | None = None) -> Token[T]: ...
    def token(self, name: str, kind: Any = Any, *, timeout: Duration | None = None) -> Token[Any]:
        """Return the token of this name: what somebody else completes, once, with a value.

        By its id in the API and on the command line, or by a POST to its callback. It may be
        completed before the run waits for it. It is the same whenever the run asks for the name.

        Args:
            name: Its name in the run; 1 to 120 characters.
            kind: The type of the value; by default it is plain.
            timeout: Counted from when it is first asked for; then its value is `TimedOut`.
        """
        limit = None if timeout is None else seconds(timeout)
        return self.waits.token(name, timeout=limit, kind=adapter(kind, f"token {name!r}"))

    def event(
        self,
        key: str,
        *,
        where: Mapping[str, Any] | None = None,
        timeout: Duration | None = None,
    ) -> Happening:
        """Return what waits for an event: a map that anybody publishes to `bt.events`.

        The first that this run has not had yet counts, from a minute before its trigger on.

        Args:
            key: The routing key, as it is: `order.paid`.
            where: What the map has to hold, in maps inside it, too: `{"order": {"number": 7}}`.
            timeout: Counted from when the wait begins; then its value is `TimedOut`.
        """
        limit = None if timeout is None else seconds(timeout)
        return self.waits.event(key, where or {}, timeout=limit)

    def once_key(self, name: str) -> str:
        """Return 32 hex digits that are the same for `name` whenever this run repeats.

        For providers that take an idempotency key: a step that is interrupted between the charge
        and its checkpoint asks again with the same key.
        """
        return hashlib.sha256(f"{self.task}\n{self.run_id}\n{name}".encode()).hexdigest()[:32]

    def progress(self, done: float, total: float | None = None) -> None:
        """Tell how far the run is, to whoever listens to its events; at most twice a second."""
        self.progressed = (done, total)
        self.changed()

    def _from_thread(self, work: Coroutine[Any, Any, T], name: str, instead: str) -> T:
        try:
            serve = partial(self.steps.serve, work)
            return from_thread(serve, name=name, instead=instead, loop=self.steps.loop)
        except ConfigurationError:
            work.close()
            raise
        except CancelledError:
            # As in a coroutine, and unlike this one, no `except Exception` must stop it.
            raise asyncio.CancelledError(self.cancelled) from None


async def _only(waiting: Coroutine[Any, Any, list[Any]]) -> Any:
    (value,) = await waiting
    return value
