"""The publisher's side: triggering runs, and hearing what became of them.

A client belongs to no event loop: it keeps one session (connection, reply queue) for each loop it
is used from, and one background thread with a loop of its own for callers that have none.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final

from pydantic import TypeAdapter

from brokertask.batch import Source, parts, send_each
from brokertask.claim import Claim
from brokertask.claims import Claims
from brokertask.durations import Duration
from brokertask.envelope import Envelope, Message
from brokertask.errors import (
    AccessDenied,
    BatchError,
    BrokertaskError,
    EnvelopeError,
    PayloadTooLarge,
    PublishError,
    TopologyMismatch,
    Unroutable,
)
from brokertask.events import Event
from brokertask.identity import checked_id, uuid7
from brokertask.portal import portal
from brokertask.request import Request
from brokertask.run import Run, Session, from_thread, private_queue
from brokertask.settings import Settings
from brokertask.telemetry import Telemetry
from brokertask.topology import Binding, Route, Topology
from brokertask.transport.base import Transport
from brokertask.values import encode

log = logging.getLogger("brokertask.client")

MAX_UNHEARD: Final = 10_000
JOINED_FAN_OUT: Final = 50
"""Larger fan-outs get traces of their own: trace viewers are slow beyond some thousand spans."""


class Client:
    """Triggers runs of any task, by id: a service needs none of the task's code.

    Safe to use from several event loops and threads, and after a fork.

    Attributes:
        claims: The app's way to its payload store.
    """

    def __init__(
        self,
        *,
        app_id: str,
        settings: Settings,
        telemetry: Telemetry,
        now_ms: Callable[[], int],
        connect: Callable[[], Transport],
        topology: Callable[[], Topology],
        claims: Claims,
    ) -> None:
        self.claims = claims
        self._app_id = app_id
        self._settings = settings
        self._telemetry = telemetry
        self._now_ms = now_ms
        self._connect = connect
        self._topology = topology
        self._sessions: dict[int, asyncio.Task[Session]] = {}
        portal.invite(self)

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

        Costs one confirmed publish, about a millisecond; and before it, for a payload that leaves
        as a claim, a put into the payload store.

        Args:
            task: The task's id.
            payload: Anything msgpack can carry; `Task.trigger` also checks its type.
            result: How to read the result; by default as plain values.
            delay: Start no sooner than after this long.
            expires: Do not start later than after this long.
            tags: Labels carried along.
            run_id: The run's id; a new UUIDv7 by default.

        Raises:
            PublishError: The run was not taken, or (`unknown`) perhaps was; `run_id` is set.
            PayloadError: The payload cannot be sent; nothing was.
        """
        body = self.encode(payload)
        request = self._request(task, delay=delay, expires=expires, tags=tags)
        run_id = checked_id(run_id) if run_id is not None else uuid7(self._now_ms())
        session = await self._session()
        await self._find_queue(session, request, run_id)
        claim = await self.claims.put(body)
        run: Run[Any] = Run(run_id, task, session, result or _ANYTHING)
        envelope, route = self._addressed(session, request, run_id, body, claim, detach=False)
        with self._telemetry.send(route, trace=envelope.trace):
            await self._publish(session, envelope, route)
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

        Nothing is sent unless every payload can be. Keeps each payload in msgpack until all are
        sent, and a `Run` for each; `trigger_stream` keeps neither.

        Raises:
            BatchError: Some were not taken; its `results` tell of each.
            PayloadError: A payload cannot be sent; nothing was.
        """
        request = self._request(task, delay=delay, expires=expires, tags=tags)
        bodies = [self.encode(payload) for payload in payloads]
        detach = len(bodies) > JOINED_FAN_OUT
        return await self._send(request, bodies, result or _ANYTHING, detach=detach)

    async def trigger_stream(
        self,
        task: str,
        payloads: Source[object],
        *,
        result: TypeAdapter[Any] | None = None,
        delay: Duration = 0,
        expires: Duration | None = None,
        tags: Sequence[str] = (),
    ) -> AsyncIterator[Run[Any]]:
        """Ask for a run for each payload while they come, and yield the runs in order.

        Reads up to 1,000 payloads, sends them as `trigger_many` does, and yields their runs before
        it reads on: in constant memory, and no faster than its reader or the broker. Each run has a
        trace of its own.

        Raises:
            BatchError: Of the last 1,000 at most, some were not taken; its `results` tell of each.
                The ones before were, and none after them is sent.
            PayloadError: A payload cannot be sent; nothing was of those since the last run yielded.
        """
        request = self._request(task, delay=delay, expires=expires, tags=tags)
        async for part in parts(payloads):
            bodies = [self.encode(payload) for payload in part]
            for run in await self._send(request, bodies, result or _ANYTHING, detach=True):
                yield run

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
        return from_thread(
            lambda: self.trigger(
                task,
                payload,
                result=result,
                delay=delay,
                expires=expires,
                tags=tags,
                run_id=run_id,
            ),
            name="trigger_sync",
            instead="await trigger(...)",
        )

    @asynccontextmanager
    async def events(self, key: str = "#") -> AsyncIterator[AsyncIterator[Event]]:
        """Hear the events of all runs whose `<event>.<task>` matches a topic pattern.

        From the moment the block is entered until it is left. Needs a broker user who may declare
        a queue; what happens while the connection is lost is kept for ten minutes.
        """
        session = await self._session()
        heard: asyncio.Queue[Event | None] = asyncio.Queue()

        def hear(message: Message) -> None:
            if heard.qsize() < MAX_UNHEARD:
                with suppress(EnvelopeError):
                    heard.put_nowait(Event.read(message))
            elif heard.qsize() == MAX_UNHEARD:
                log.error("events come faster than they are read; the newest are dropped")

        async def each() -> AsyncIterator[Event]:
            while (event := await heard.get()) is not None:
                yield event

        names = self._settings.names
        queue = private_queue(names.reply(secrets.token_hex(8)))
        binding = Binding(names.events, queue.name, key)
        listener = await session.transport.listen(queue, (binding,), hear)
        try:
            yield each()
        finally:
            heard.put_nowait(None)
            await listener.close()

    async def open(self) -> None:
        """Connect now rather than at the first trigger."""
        await self._session()

    async def close(self) -> None:
        """Disconnect this event loop's session, deleting its reply queue."""
        opening = self._sessions.pop(id(asyncio.get_running_loop()), None)
        if opening is not None:
            with suppress(BrokertaskError):
                await (await opening).close()

    @contextmanager
    def afresh(self) -> Iterator[None]:
        """Begin with no session inside the block: it uses another broker, as tests do."""
        before, self._sessions = self._sessions, {}
        try:
            yield
        finally:
            self._sessions = before

    def forget(self) -> None:
        """Begin anew, as a forked child has to: the sessions are its parent's."""
        # They must never be collected here. A socket closed by the collector would leave the epoll
        # that both processes share, and the parent would hear no more.
        _OF_THE_PARENT.append(self._sessions)
        self._sessions = {}

    def encode(self, payload: object) -> bytes:
        """Return a payload in msgpack, within the size limit if it does not leave as a claim."""
        body = encode(payload)
        limit = self._settings.max_payload_bytes
        if len(body) > limit and not self.claims.takes(len(body)):
            raise PayloadTooLarge(
                f"the payload is {len(body)} bytes, the limit is {limit}: set "
                "BROKERTASK_PAYLOAD_STORE, send a reference to where it is stored, or raise "
                "BROKERTASK_MAX_PAYLOAD_BYTES everywhere"
            )
        return body

    def _request(
        self, task: str, *, delay: Duration, expires: Duration | None, tags: Sequence[str]
    ) -> Request:
        return Request.of(task, app_id=self._app_id, delay=delay, expires=expires, tags=tags)

    async def _send(
        self, request: Request, bodies: Sequence[bytes], result: TypeAdapter[Any], *, detach: bool
    ) -> list[Run[Any]]:
        """Publish a run for each body, some at a time, or raise `BatchError`."""
        session, task = await self._session(), request.task
        if bodies:
            await self._find_queue(session, request, None)
        claims = await self.claims.put_all(bodies)

        async def send(content: tuple[bytes, Claim | None]) -> Run[Any]:
            run_id = uuid7(self._now_ms())
            run: Run[Any] = Run(run_id, task, session, result)
            envelope, route = self._addressed(session, request, run_id, *content, detach=detach)
            await self._publish(session, envelope, route)
            return run

        with self._telemetry.send(self._settings.names.trigger_route(task), count=len(bodies)):
            results = await send_each(list(zip(bodies, claims, strict=True)), send)
        runs = [run for run in results if isinstance(run, Run)]
        if len(runs) < len(results):
            raise BatchError(results)
        return runs

    def _addressed(
        self,
        session: Session,
        request: Request,
        run_id: str,
        body: bytes,
        claim: Claim | None,
        *,
        detach: bool,
    ) -> tuple[Envelope, Route]:
        """Return the message of a run with its trace and reply address, and where to publish it."""
        parent = request.parent.run_id if request.parent else None
        return request.addressed(
            self._settings.names,
            run_id=run_id,
            body=body,
            claim=claim,
            trace=self._telemetry.trigger(request.task, run_id, parent_run=parent, detach=detach),
            reply_to=session.reply_key,
            now_ms=self._now_ms(),
        )

    async def _find_queue(self, session: Session, request: Request, run_id: str | None) -> None:
        """Refuse a delayed run that no queue is for: after the delay, nobody would be told."""
        task = request.task
        if request.delay_ms is None or task in session.found:
            return
        queue = self._settings.names.queue(task)
        with suppress(AccessDenied):  # RabbitMQ 4.3 and later let only some users look.
            if await session.transport.depth(queue) is None:
                raise Unroutable(
                    f"no queue on this broker is for task {task!r}: no worker has declared it. "
                    "Start one, run `brokertask topology apply`, or mend the task's id",
                    run_id=run_id,
                )
        session.found.add(task)

    async def _publish(self, session: Session, envelope: Envelope, route: Route) -> None:
        try:
            await session.transport.publish(
                route, envelope.message(), timeout=self._settings.publish_timeout
            )
        except PublishError as error:
            error.run_id = envelope.run_id
            self._telemetry.publish_failed(type(error).__name__)
            raise
        self._telemetry.triggered(envelope.task)

    async def _session(self) -> Session:
        loop = asyncio.get_running_loop()
        opening = self._sessions.get(id(loop))
        if opening is None or opening.get_loop() is not loop:
            for key, task in list(self._sessions.items()):
                if task.get_loop().is_closed():
                    del self._sessions[key]
            # In a context of its own: it outlives the run or request that happens to be the first.
            opening = loop.create_task(
                self._open(), name="brokertask client", context=contextvars.Context()
            )
            self._sessions[id(loop)] = opening
        try:
            return await asyncio.shield(opening)
        except BaseException:
            # Whatever it failed with, the next caller tries anew. A caller that was cancelled
            # leaves it to the others.
            failed = opening.done() and (opening.cancelled() or opening.exception() is not None)
            if failed and self._sessions.get(id(loop)) is opening:
                del self._sessions[id(loop)]
            raise

    async def _declare(self, transport: Transport) -> None:
        try:
            await transport.declare(self._topology())
        except TopologyMismatch as error:
            # Triggering works all the same; it is the worker that must not start like this.
            log.error("%s", error)

    async def _open(self) -> Session:
        self.claims.open()
        session = Session(self._connect(), self.claims)
        try:
            await session.transport.open(timeout=self._settings.connect_timeout)
            if self._settings.declare:
                await self._declare(session.transport)
            await session.listen(self._settings)
        except BaseException:
            await session.close()
            raise
        return session


_ANYTHING: Final[TypeAdapter[Any]] = TypeAdapter(Any)
_OF_THE_PARENT: Final[list[object]] = []
