"""The publisher's side: triggering runs, and hearing what became of them.

A client belongs to no event loop: it keeps one session (connection, reply queue) for each loop it
is used from, and one background thread with a loop of its own for callers that have none.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypedDict, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import TypeAdapter

from brokertask.clock import Clock
from brokertask.durations import Duration, readable, seconds
from brokertask.envelope import MSGPACK, Envelope, Message, decode, encode
from brokertask.errors import (
    AccessDenied,
    BatchError,
    BrokertaskError,
    ConfigurationError,
    EnvelopeError,
    InvalidOption,
    PayloadTooLarge,
    PublishError,
    ResultTimeout,
    ResultUnavailable,
    RunExpired,
    RunFailed,
)
from brokertask.events import COMPLETED, EXPIRED, FAILED, RETRYING, Event
from brokertask.settings import Settings
from brokertask.telemetry import Telemetry
from brokertask.topology import (
    IN_PLACE_MS,
    Binding,
    Queue,
    Route,
    Topology,
    check_task_id,
)
from brokertask.transport.base import Consumer, Transport

log = logging.getLogger("brokertask.client")
R = TypeVar("R")
T = TypeVar("T")

IN_FLIGHT: Final = 256
"""Publishes of one `trigger_many` that wait for their confirm at a time."""
JOINED_FAN_OUT: Final = 50
"""Larger fan-outs get traces of their own: trace viewers are slow beyond some thousand spans."""
JOINED_DELAY: Final = 300.0
"""Runs that begin later than this get a trace of their own, linked to the one that asked."""
MAX_TAGS: Final = 32
MAX_TAG: Final = 128
REPLY_QUEUE_EXPIRES_MS: Final = 600_000
"""A caller that lost its connection has this long to come back for its results."""


class TriggerOptions(TypedDict, total=False):
    """What `trigger` takes beside the payload."""

    delay: Duration
    """Start no sooner than after this long."""
    expires: Duration
    """Do not start later than after this long; the run then ends as expired."""
    tags: Sequence[str]
    """Up to 32 short labels, carried along and shown."""
    run_id: str
    """The run's id, to repeat a trigger whose answer is unknown. Default: a new UUIDv7."""


@dataclass(frozen=True, slots=True)
class RunningIn:
    """The run whose task is executing here: parent of what it triggers."""

    run_id: str
    root: str


running_in: ContextVar[RunningIn | None] = ContextVar("brokertask_running_in", default=None)


class Run(Generic[R]):
    """A triggered run: its id, and its result once there is one.

    Hold on to it if you want the result: what nobody holds is not kept.
    """

    def __init__(self, run_id: str, task: str, session: _Session, result: TypeAdapter[R]) -> None:
        self.run_id = run_id
        self.task = task
        self._session = session
        self._type = result
        self._ended = asyncio.Event()
        self._event: Event | None = None
        self._watchers: list[Callable[[Event], None]] = []

    def __repr__(self) -> str:
        return f"<Run {self.run_id} of {self.task}>"

    async def result(self, *, timeout: Duration | None = None) -> R:
        """Return what the task returned, waiting for it up to `timeout` (for ever by default).

        Raises:
            RunFailed: The run is in the dead-letter queue; `reason` and `error` say why.
            RunExpired: It was not started in time.
            ResultTimeout: Nothing was heard in time. The run goes on; ask again.
            ResultUnavailable: This client does not listen for results.
        """
        if (why := self._session.deaf) is not None:
            raise ResultUnavailable(why, run_id=self.run_id, task=self.task)
        limit = None if timeout is None else seconds(timeout)
        try:
            async with asyncio.timeout(limit):
                await self._ended.wait()
        except TimeoutError:
            raise ResultTimeout(
                f"no result of run {self.run_id} of {self.task!r} within {readable(limit or 0)}; "
                "it goes on",
                run_id=self.run_id,
                task=self.task,
            ) from None
        assert self._event is not None, "an ended run has its last event"
        return self._read(self._event)

    def result_sync(self, *, timeout: Duration | None = None) -> R:
        """Return the result to a plain thread; for runs made by `trigger_sync`."""
        return self._session.call(lambda: self.result(timeout=timeout))

    def watch(self, watcher: Callable[[Event], None]) -> None:
        """Call `watcher` in the event loop for each event of this run that its worker tells."""
        self._watchers.append(watcher)

    def hear(self, event: Event) -> None:
        """Take in an event of this run; the session calls it."""
        for watcher in self._watchers:
            watcher(event)
        if event.event in (COMPLETED, FAILED, EXPIRED):
            self._event = event
            self._ended.set()

    def _read(self, event: Event) -> R:
        if event.event == COMPLETED:
            return self._type.validate_python(decode(event.result or b"\xc0", MSGPACK))
        if event.event == EXPIRED:
            raise RunExpired(
                f"run {self.run_id} of {self.task!r} was not started before it expired",
                run_id=self.run_id,
                task=self.task,
            )
        error = event.error
        raise RunFailed(
            f"run {self.run_id} of {self.task!r} is in the dead-letter queue ({event.reason})"
            + (f": {error.type}: {error.message}" if error else ""),
            run_id=self.run_id,
            task=self.task,
            reason=event.reason or "unknown",
            error={"type": error.type, "message": error.message} if error else {},
        )


class Client:
    """Triggers runs of any task, by id: a service needs none of the task's code.

    Safe to use from several event loops and threads, and after a fork.
    """

    def __init__(
        self,
        *,
        app_id: str,
        settings: Settings,
        telemetry: Telemetry,
        clock: Clock,
        connect: Callable[[], Transport],
        topology: Callable[[], Topology],
    ) -> None:
        self._app_id = app_id
        self._settings = settings
        self._telemetry = telemetry
        self._clock = clock
        self._connect = connect
        self._topology = topology
        self._sessions: dict[int, asyncio.Task[_Session]] = {}
        _clients.add(self)

    async def trigger(
        self,
        task: str,
        payload: object = None,
        *,
        result: TypeAdapter[Any] | None = None,
        delay: Duration = 0,
        expires: Duration | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
    ) -> Run[Any]:
        """Ask for a run of `task`; when this returns, it is on the broker's disk.

        Costs one confirmed publish, about a millisecond.

        Args:
            task: The task's id.
            payload: Anything msgpack can carry; `Task.trigger` also checks its type.
            result: How to read the result; by default as plain values.
            delay, expires, tags, run_id: See `TriggerOptions`.

        Raises:
            PublishError: The run was not taken, or (`unknown`) perhaps was; `run_id` is set.
            PayloadError: The payload cannot be sent; nothing was.
        """
        envelope = self._envelope(
            task, self.encode(payload), delay=delay, expires=expires, tags=tags, run_id=run_id
        )
        session = await self._session()
        run: Run[Any] = Run(envelope.run_id, task, session, result or _ANYTHING)
        await self._publish(session, run, envelope, detach=seconds(delay) >= JOINED_DELAY)
        return run

    async def trigger_many(
        self,
        task: str,
        payloads: Iterable[object],
        *,
        result: TypeAdapter[Any] | None = None,
        delay: Duration = 0,
        expires: Duration | None = None,
        tags: Sequence[str] = (),
    ) -> list[Run[Any]]:
        """Ask for a run for each payload, in order, sharing round trips to the broker.

        Nothing is sent unless every payload can be.

        Raises:
            BatchError: Some were not taken; its `results` tell of each.
            PayloadError: A payload cannot be sent; nothing was.
        """
        bodies = [self.encode(payload) for payload in payloads]
        envelopes = [
            self._envelope(task, body, delay=delay, expires=expires, tags=tags) for body in bodies
        ]
        session = await self._session()
        detach = len(envelopes) > JOINED_FAN_OUT or seconds(delay) >= JOINED_DELAY
        results: list[Run[Any] | PublishError] = [
            Run(envelope.run_id, task, session, result or _ANYTHING) for envelope in envelopes
        ]
        waiting = iter(enumerate(envelopes))

        async def work() -> None:
            for index, envelope in waiting:
                run = results[index]
                assert isinstance(run, Run)
                try:
                    await self._publish(session, run, envelope, detach=detach)
                except PublishError as error:
                    results[index] = error

        async with asyncio.TaskGroup() as group:
            for _ in range(min(IN_FLIGHT, len(envelopes))):
                group.create_task(work())
        runs = [run for run in results if isinstance(run, Run)]
        if len(runs) < len(results):
            raise BatchError(results)
        return runs

    def trigger_sync(
        self,
        task: str,
        payload: object = None,
        *,
        result: TypeAdapter[Any] | None = None,
        delay: Duration = 0,
        expires: Duration | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
    ) -> Run[Any]:
        """Do what `trigger` does, from a thread without an event loop.

        All threads of the process share one background thread and its connection.
        """
        _refuse_event_loop("trigger_sync", "await trigger(...)")
        return portal.call(
            lambda: self.trigger(
                task,
                payload,
                result=result,
                delay=delay,
                expires=expires,
                tags=tags,
                run_id=run_id,
            )
        )

    async def open(self) -> None:
        """Connect now rather than at the first trigger."""
        await self._session()

    async def close(self) -> None:
        """Disconnect this event loop's session, deleting its reply queue."""
        opening = self._sessions.pop(id(asyncio.get_running_loop()), None)
        if opening is not None:
            with suppress(BrokertaskError):
                await (await opening).close()

    def forget(self) -> None:
        """Drop every session without closing it: after a fork they belong to the parent."""
        self._sessions = {}

    def encode(self, payload: object) -> bytes:
        """Return a payload in msgpack, within the size limit."""
        body = encode(payload)
        limit = self._settings.max_payload_bytes
        if len(body) > limit:
            raise PayloadTooLarge(
                f"the payload is {len(body)} bytes, the limit is {limit}: send a reference to "
                "where it is stored, or raise BROKERTASK_MAX_PAYLOAD_BYTES everywhere"
            )
        return body

    def _envelope(
        self,
        task: str,
        body: bytes,
        *,
        delay: Duration,
        expires: Duration | None,
        tags: Sequence[str],
        run_id: str | None = None,
    ) -> Envelope:
        check_task_id(task)
        now = self._clock.now_ms()
        delay_ms = round(seconds(delay) * 1000)
        parent = running_in.get()
        identity = _checked_id(run_id) if run_id is not None else uuid7(now)
        return Envelope(
            run_id=identity,
            task=task,
            payload=body,
            triggered_ms=now,
            sent_ms=now,
            due_ms=now + delay_ms if delay_ms > IN_PLACE_MS else None,
            expires_ms=None if expires is None else now + round(seconds(expires) * 1000),
            tags=_checked_tags(tags),
            parent=parent.run_id if parent else None,
            root=parent.root if parent else None,
            app_id=self._app_id,
        )

    async def _publish(
        self, session: _Session, run: Run[Any], envelope: Envelope, *, detach: bool
    ) -> None:
        trace = self._telemetry.trigger(
            envelope.task, envelope.run_id, parent_run=envelope.parent, detach=detach
        )
        route, left = self._route(envelope)
        message = replace(envelope, trace=trace, left_ms=left, reply_to=session.reply_key).message()
        session.expect(run)
        try:
            with self._telemetry.send(route, trace=trace):
                await session.transport.publish(
                    route, message, timeout=self._settings.publish_timeout
                )
        except PublishError as error:
            error.run_id = envelope.run_id
            self._telemetry.publish_failed(type(error).__name__)
            raise
        self._telemetry.triggered(envelope.task)

    def _route(self, envelope: Envelope) -> tuple[Route, int]:
        names = self._settings.names
        if envelope.due_ms is None or envelope.sent_ms is None:
            return names.trigger_route(envelope.task), 0
        return names.delay_route(envelope.task, envelope.due_ms - envelope.sent_ms)

    async def _session(self) -> _Session:
        loop = asyncio.get_running_loop()
        opening = self._sessions.get(id(loop))
        if opening is None or opening.get_loop() is not loop:
            opening = loop.create_task(self._open(), name="brokertask client")
            self._sessions[id(loop)] = opening
        try:
            return await asyncio.shield(opening)
        except BrokertaskError:
            if self._sessions.get(id(loop)) is opening:
                del self._sessions[id(loop)]
            raise

    async def _open(self) -> _Session:
        session = _Session(self._connect())
        try:
            await session.transport.open(timeout=self._settings.connect_timeout)
            if self._settings.declare:
                await session.transport.declare(self._topology())
            await session.listen(self._settings)
        except BaseException:
            await session.close()
            raise
        return session


class _Session:
    """What a client has in one event loop: a transport, and the runs it waits for."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.reply_key: str | None = None
        self.deaf: str | None = "this client does not listen for results"
        self._listener: Consumer | None = None
        self._runs: weakref.WeakValueDictionary[str, Run[Any]] = weakref.WeakValueDictionary()

    async def listen(self, settings: Settings) -> None:
        """Make the reply queue, unless results are not wanted or not allowed."""
        if not settings.results:
            self.deaf = "results are switched off (BROKERTASK_RESULTS=false)"
            return
        name = settings.names.reply(secrets.token_hex(8))
        # It outlives a lost connection, and itself expires when the caller never comes back.
        queue = Queue(name, {"x-expires": REPLY_QUEUE_EXPIRES_MS, "x-queue-type": "classic"})
        try:
            self._listener = await self.transport.listen(
                queue, (Binding(settings.names.events, name, name),), self._hear
            )
        except (AccessDenied, ConfigurationError) as error:
            self.deaf = f"this client cannot make a reply queue: {error}"
            log.info("%s; triggering works, Run.result() does not", self.deaf)
            return
        self.deaf, self.reply_key = None, name

    def expect(self, run: Run[Any]) -> None:
        """Remember a run for as long as somebody holds it."""
        self._runs[run.run_id] = run

    def call(self, coroutine: Callable[[], Awaitable[T]]) -> T:
        """Call from another thread into the loop of this session, which is the portal's."""
        _refuse_event_loop("result_sync", "await run.result(...)")
        return portal.call(coroutine)

    async def close(self) -> None:
        """Delete the reply queue and disconnect."""
        if self._listener is not None:
            with suppress(BrokertaskError):
                await self._listener.close()
        await self.transport.close()

    def _hear(self, message: Message) -> None:
        try:
            event = Event.read(message)
        except EnvelopeError as error:
            log.warning("a reply that is no event: %s", error)
            return
        run = self._runs.get(event.run_id)
        if run is not None:
            run.hear(event)


class _Portal:
    """The background thread of the process, with an event loop for callers that have none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._stop: Callable[[], object] = lambda: None

    def call(self, coroutine: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function on the thread's loop and return its result."""
        with self._lock:
            if self._portal is None:
                starting = start_blocking_portal("asyncio", name="brokertask portal")
                self._portal = starting.__enter__()
                self._stop = lambda: starting.__exit__(None, None, None)
            running = self._portal
        return running.call(coroutine)

    def close(self) -> None:
        """Close the sessions used from plain threads, and the thread."""
        if self._portal is not None:
            for client in list(_clients):
                with suppress(Exception):
                    self._portal.call(client.close)
            self._stop()
            self._portal = None

    def after_fork(self) -> None:
        """The child has no such thread and must not touch the parent's connections."""
        self._lock = threading.Lock()
        self._portal = None
        for client in list(_clients):
            client.forget()


portal: Final = _Portal()
_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_ANYTHING: Final[TypeAdapter[Any]] = TypeAdapter(Any)
os.register_at_fork(after_in_child=portal.after_fork)
atexit.register(portal.close)


def uuid7(now_ms: int) -> str:
    """Return a new UUID version 7: sortable by time, unique without coordination.

    Source: RFC 9562, section 5.7.
    """
    rest = secrets.randbits(74)
    value = (now_ms & (1 << 48) - 1) << 80 | 7 << 76 | (rest >> 62) << 64 | 2 << 62
    text = f"{value | rest & (1 << 62) - 1:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _checked_id(run_id: str) -> str:
    if not (0 < len(run_id) <= MAX_TAG and run_id.isprintable()):
        raise InvalidOption(f"a run id is 1 to {MAX_TAG} printable characters, not {run_id[:40]!r}")
    return run_id


def _checked_tags(tags: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise InvalidOption(f"tags are a list of texts, not one text: [{tags[:40]!r}]")
    if len(tags) > MAX_TAGS or any(not 0 < len(tag) <= MAX_TAG for tag in tags):
        raise InvalidOption(f"at most {MAX_TAGS} tags of 1 to {MAX_TAG} characters")
    return tuple(tags)


def _refuse_event_loop(name: str, instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigurationError(f"{name} would block the event loop it is called in; use {instead}")
