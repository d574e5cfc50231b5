"""A triggered run as its caller sees it, and the session that hears what becomes of it."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from pydantic import TypeAdapter

from brokertask.admission import ADMITTED
from brokertask.claims import Claims
from brokertask.durations import Duration, readable, seconds
from brokertask.envelope import Message
from brokertask.errors import (
    AccessDenied,
    BrokertaskError,
    ConfigurationError,
    EnvelopeError,
    InvalidPayload,
    PayloadUnavailable,
    PublishUnknown,
    ResultTimeout,
    ResultUnavailable,
    RunCancelled,
    RunError,
    RunExpired,
    RunFailed,
)
from brokertask.events import CANCELLED, COMPLETED, ENDS, EXPIRED, Event
from brokertask.portal import portal
from brokertask.settings import Settings
from brokertask.topology import Binding, Queue, Route
from brokertask.transport.base import Consumer, Transport
from brokertask.typed import load
from brokertask.values import MSGPACK, decode

log = logging.getLogger("brokertask.client")
R = TypeVar("R")
T = TypeVar("T")

REPLY_QUEUE_EXPIRES_MS: Final = 600_000
"""A caller that lost its connection has this long to come back for its results."""


ASK_AGAIN: Final = 60.0
"""Seconds after which a server is asked once more for a run that was not triggered here."""


@dataclass(frozen=True, slots=True)
class RunningIn:
    """The run whose task is executing here: parent of what it triggers."""

    run_id: str
    task: str
    attempt: int
    root: str
    loop: asyncio.AbstractEventLoop
    """The worker's, where tasks in threads may send what needs a loop."""


running_in: ContextVar[RunningIn | None] = ContextVar("brokertask_running_in", default=None)


class Run(Generic[R]):
    """A triggered run: its id, and its result once there is one.

    Hold on to it if you want the result: what nobody holds is not kept.
    """

    def __init__(
        self,
        run_id: str,
        task: str,
        session: Session,
        result: TypeAdapter[R],
        *,
        asks: bool = False,
    ) -> None:
        self.run_id = run_id
        self._asks = asks
        self.task = task
        self._session = session
        self._type = result
        self._hearing = session.hearing(run_id, anew=asks)

    @property
    def result_type(self) -> TypeAdapter[R]:
        """How its result is read."""
        return self._type

    def __repr__(self) -> str:
        return f"<Run {self.run_id} of {self.task}>"

    async def result(self, *, timeout: Duration | None = None) -> R:
        """Return what the task returned, waiting for it up to `timeout` (for ever by default).

        Raises:
            RunFailed: The run is in the dead-letter queue; `reason` and `error` say why.
            RunExpired: It was not started in time.
            RunCancelled: It was cancelled.
            ResultTimeout: Nothing was heard in time, and the run goes on; or the payload store was
                too slow. Ask again.
            ResultUnavailable: This client does not listen for results, expects another type, or
                cannot fetch it from the payload store.
        """
        if (why := self._session.deaf) is not None:
            raise ResultUnavailable(why, run_id=self.run_id, task=self.task)
        limit = None if timeout is None else seconds(timeout)
        if asyncio.get_running_loop() is not self._session.loop:
            there = asyncio.run_coroutine_threadsafe(self.result(timeout=limit), self._session.loop)
            return await asyncio.wrap_future(there)
        try:
            async with asyncio.timeout(limit):
                await self._until_ended()
                return self._typed(await self._fetched(self._hearing.heard[-1]))
        except TimeoutError:
            rest = "its payload store is slow" if self._hearing.ended.is_set() else "it goes on"
            raise ResultTimeout(
                f"no result of run {self.run_id} of {self.task!r} within {readable(limit or 0)}; "
                f"{rest}",
                run_id=self.run_id,
                task=self.task,
            ) from None

    def result_sync(self, *, timeout: Duration | None = None) -> R:
        """Return the result to a thread, whichever thread or event loop triggered the run."""
        _refuse_event_loop("result_sync", "await run.result(...)")
        waiting = asyncio.run_coroutine_threadsafe(self.result(timeout=timeout), self._session.loop)
        return waiting.result()

    def watch(self, watcher: Callable[[Event], None]) -> None:
        """Call `watcher` in the event loop for each event of this run that its worker tells.

        At once for those that were heard already: a quick run may be over before its trigger is.
        """
        self._hearing.watch(watcher)

    async def _until_ended(self) -> None:
        ended = self._hearing.ended
        while self._asks and not ended.is_set():
            await self._session.ask_for(self.run_id, self.task)
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN):
                    await ended.wait()
        await ended.wait()

    async def _fetched(self, event: Event) -> bytes:
        """Return the result in msgpack that the last event of the run tells of."""
        if event.event != COMPLETED:
            raise self._failure(event)
        if event.claim is None:
            return event.result or b"\xc0"
        try:
            return await self._session.claims.get(event.claim)
        except PayloadUnavailable as error:
            raise ResultUnavailable(
                f"run {self.run_id} of {self.task!r} completed, but its result cannot be fetched: "
                f"{error}",
                run_id=self.run_id,
                task=self.task,
            ) from error

    def _failure(self, event: Event) -> RunError:
        if event.event == EXPIRED:
            return RunExpired(
                f"run {self.run_id} of {self.task!r} was not started before it expired",
                run_id=self.run_id,
                task=self.task,
            )
        if event.event == CANCELLED:
            why = f": {event.reason}" if event.reason else ""
            return RunCancelled(
                f"run {self.run_id} of {self.task!r} was cancelled{why}",
                run_id=self.run_id,
                task=self.task,
                reason=event.reason or "",
            )
        error = event.error
        return RunFailed(
            f"run {self.run_id} of {self.task!r} is in the dead-letter queue ({event.reason})"
            + (f": {error.type}: {error.message}" if error else ""),
            run_id=self.run_id,
            task=self.task,
            reason=event.reason or "unknown",
            error={"type": error.type, "message": error.message} if error else {},
        )

    def _typed(self, result: bytes) -> R:
        try:
            value: R = load(self._type, decode(result, MSGPACK))
        except (InvalidPayload, EnvelopeError) as error:
            raise ResultUnavailable(
                f"run {self.run_id} of {self.task!r} completed, but its result is of another "
                f"type here: {error}",
                run_id=self.run_id,
                task=self.task,
            ) from None
        return value


class Hearing:
    """What was heard of a run; shared by every `Run` of its id."""

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self._watchers: list[Callable[[Event], None]] = []
        self.ended = asyncio.Event()

    def hear(self, event: Event) -> None:
        """Take in an event, unless it is of a double, after the end."""
        if self.ended.is_set():
            return
        self.heard.append(event)
        if event.event in ENDS:
            self.ended.set()
        for watcher in self._watchers:
            _tell(watcher, event)

    def watch(self, watcher: Callable[[Event], None]) -> None:
        """Tell a watcher what was heard, and from now on what will be."""
        for event in self.heard:
            _tell(watcher, event)
        self._watchers.append(watcher)


def _tell(watcher: Callable[[Event], None], event: Event) -> None:
    try:
        watcher(event)
    except Exception:
        log.exception("a watcher of run %s failed", event.run_id)


class Session:
    """What a client has in one event loop: a transport, and the runs it waits for."""

    def __init__(self, transport: Transport, claims: Claims) -> None:
        self.transport = transport
        self.claims = claims
        self.loop = asyncio.get_running_loop()
        self.reply_key: str | None = None
        self.deaf: str | None = "this client does not listen for results"
        self.found: set[str] = set()
        """Tasks whose queue is known to exist."""
        self._listener: Consumer | None = None
        self._settings: Settings | None = None
        self._answers: dict[str, asyncio.Future[Message]] = {}
        self._hearings: weakref.WeakValueDictionary[str, Hearing] = weakref.WeakValueDictionary()

    async def listen(self, settings: Settings) -> None:
        """Make the reply queue, unless results are not wanted or not allowed."""
        if not settings.results:
            self.deaf = "results are switched off (BROKERTASK_RESULTS=false)"
            return
        self._settings = settings
        name = settings.names.reply(secrets.token_hex(8))
        queue = private_queue(name)
        try:
            self._listener = await self.transport.listen(
                queue, (Binding(settings.names.events, name, name),), self._hear
            )
        except (AccessDenied, ConfigurationError) as error:
            self.deaf = f"this client cannot make a reply queue: {error}"
            log.info("%s; triggering works, Run.result() does not", self.deaf)
            return
        self.deaf, self.reply_key = None, name

    def hearing(self, run_id: str, *, anew: bool = False) -> Hearing:
        """Return what will be heard of a run, for as long as somebody holds it.

        Anew: what ended may have been redriven since.
        """
        hearing = self._hearings.setdefault(run_id, Hearing())
        if anew and hearing.ended.is_set():
            hearing = self._hearings[run_id] = Hearing()
        return hearing

    async def close(self) -> None:
        """Delete the reply queue and disconnect."""
        if self._listener is not None:
            with suppress(BrokertaskError):
                await self._listener.close()
        await self.transport.close()

    async def ask(self, route: Route, message: Message, *, timeout: float) -> Message:
        """Publish a question, and return the answer that is addressed to it.

        Raises:
            PublishError: It was not taken.
            PublishUnknown: There was no answer within `timeout` seconds of that.
        """
        question = f"ask-{secrets.token_hex(8)}"
        answer: asyncio.Future[Message] = self.loop.create_future()
        self._answers[question] = answer
        message = replace(message, correlation_id=question, reply_to=self.reply_key)
        try:
            await self.transport.publish(route, message, timeout=timeout)
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise PublishUnknown(
                f"no server has answered within {readable(timeout)}; the question waits for one: "
                "start `brokertask server`, and ask again",
                run_id=message.message_id,
            ) from None
        finally:
            del self._answers[question]

    async def ask_for(self, run_id: str, task: str) -> None:
        """Ask the servers for the end of a run, now or when it comes; it is heard like any other.

        Raises:
            PublishError: They cannot be asked.
        """
        assert self._settings is not None
        message = Message(body=b"", message_id=run_id, type=task, reply_to=self.reply_key)
        route, timeout = self._settings.names.server_route("ask"), self._settings.publish_timeout
        await self.transport.publish(route, message, timeout=timeout)

    def _hear(self, message: Message) -> None:
        if message.type == ADMITTED:
            answer = self._answers.get(message.correlation_id or "")
            # One that nobody waits for any longer comes too late.
            if answer is not None and not answer.done():
                answer.set_result(message)
            return
        try:
            event = Event.read(message)
        except EnvelopeError as error:
            log.warning("a reply that is no event: %s", error)
            return
        hearing = self._hearings.get(event.run_id)
        if hearing is not None:
            hearing.hear(event)


def from_thread(
    work: Callable[[], Coroutine[Any, Any, T]],
    *,
    name: str,
    instead: str,
    loop: asyncio.AbstractEventLoop | None = None,
) -> T:
    """Run a coroutine function for a thread: on `loop`, or its worker's if a task runs in it.

    Any other thread is served by the portal, whose connection all of them share.
    """
    _refuse_event_loop(name, instead)
    inside = running_in.get()
    if loop is None and inside is not None:
        loop = inside.loop
    if loop is not None:
        return asyncio.run_coroutine_threadsafe(work(), loop).result()
    return portal.call(work)


def _refuse_event_loop(name: str, instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigurationError(f"{name} would block the event loop; use {instead}")


# A forked child has no worker's loop to send anything to.
os.register_at_fork(after_in_child=lambda: running_in.set(None))


def private_queue(name: str) -> Queue:
    """Return a queue for one process; it outlives a lost connection, but not a lost owner."""
    return Queue(name, {"x-expires": REPLY_QUEUE_EXPIRES_MS, "x-queue-type": "classic"})
