"""The publisher's side: triggering runs, and hearing what became of them.

A client belongs to no event loop: it keeps one session (connection, reply queue) for each loop it
is used from, and one background thread with a loop of its own for callers that have none.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Final, Unpack

from pydantic import TypeAdapter

from brokertask.admission import DEFAULT_TTL, Admission, Answer, Debounce, Singleton
from brokertask.batch import Source, parts, send_each
from brokertask.claim import Claim
from brokertask.claims import Claims
from brokertask.durations import Duration
from brokertask.envelope import Envelope, Message
from brokertask.errors import (
    BatchError,
    ConfigurationError,
    EnvelopeError,
    IdempotencyConflict,
    PayloadTooLarge,
    PublishError,
)
from brokertask.events import Event
from brokertask.identity import checked_id, uuid7
from brokertask.lookup import find_queue, find_server
from brokertask.orders import Orders
from brokertask.request import Request
from brokertask.run import Run, Session, from_thread, private_queue
from brokertask.sessions import Sessions
from brokertask.settings import Settings
from brokertask.telemetry import Telemetry
from brokertask.topology import Binding, Route, Topology
from brokertask.transport.base import Transport
from brokertask.trigger import TriggerOptions
from brokertask.values import encode

log = logging.getLogger("brokertask.client")

MAX_UNHEARD: Final = 10_000
JOINED_FAN_OUT: Final = 50
"""Larger fan-outs get traces of their own: trace viewers are slow beyond some thousand spans."""


class Client(Orders):
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
        self._sessions = Sessions(settings, claims, connect=connect, topology=topology)
        self._session = self._sessions.get

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
        idempotency_key: str | None = None,
        idempotency_ttl: Duration = DEFAULT_TTL,
        debounce: Debounce | None = None,
        singleton: Singleton | None = None,
    ) -> Run[Any]:
        """Ask for a run of `task`; when this returns, it is on the broker's disk.

        Costs one confirmed publish, about a millisecond; and before it, for a payload that leaves
        as a claim, a put into the payload store. With one of the last three arguments: two
        publishes and a commit of the server, whose answer may lead to another run.

        Args:
            task: The task's id.
            payload: Anything msgpack can carry; `Task.trigger` also checks its type.
            result: How to read the result; by default as plain values.
            delay: Start no sooner than after this long.
            expires: Do not start later than after this long.
            tags: Labels carried along.
            run_id: The run's id; a new UUIDv7 by default.
            idempotency_key: Of triggers with the same key only the first makes a run.
            idempotency_ttl: How long the key is remembered after that.
            debounce: One run for triggers that come in quick succession.
            singleton: No run while another one of this key is unfinished.

        Raises:
            PublishError: The run was not taken, or (`unknown`) perhaps was; `run_id` is set.
            PayloadError: The payload cannot be sent; nothing was.
            IdempotencyConflict: Another payload came with this key before.
            NoServer: A server has to decide, and there has never been one.
        """
        asked = Admission.of(idempotency_key, idempotency_ttl, debounce, singleton)
        body = self.encode(payload)
        request = self._request(task, delay=delay, expires=expires, tags=tags)
        run_id = checked_id(run_id) if run_id is not None else uuid7(self._now_ms())
        session = await self._session()
        if asked is not None:
            await self.find_server()
        if asked is not None or request.delay_ms is not None:
            await find_queue(session, self._settings.names, task, run_id=run_id)
        claim = await self.claims.put(body)
        run: Run[Any] = Run(run_id, task, session, result or _ANYTHING)
        envelope, route = self._addressed(session, request, run_id, body, claim, detach=False)
        if asked is not None:
            identity = await self._admitted(session, envelope, asked)
            kind = run.result_type
            return run if identity == run.run_id else Run(identity, task, session, kind, asks=True)
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
        run_ids: Sequence[str] | None = None,
    ) -> list[Run[Any]]:
        """Ask for a run for each payload, in order, sharing round trips to the broker.

        Nothing is sent unless every payload can be. Keeps each payload in msgpack until all are
        sent, and a `Run` for each; `trigger_stream` keeps neither. With `run_ids` each run gets the
        id in its place.

        Raises:
            BatchError: Some were not taken; its `results` tell of each.
            PayloadError: A payload cannot be sent; nothing was.
        """
        request = self._request(task, delay=delay, expires=expires, tags=tags)
        bodies = [self.encode(payload) for payload in payloads]
        ids = [checked_id(run_id) for run_id in run_ids] if run_ids is not None else None
        detach = len(bodies) > JOINED_FAN_OUT
        return await self._send(request, bodies, result or _ANYTHING, ids=ids, detach=detach)

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
        **options: Unpack[TriggerOptions],
    ) -> Run[Any]:
        """Do what `trigger` does, from a thread without an event loop.

        All threads of the process share one background thread and its connection.
        """
        return from_thread(
            lambda: self.trigger(task, payload, result=result, **options),
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

    async def run(
        self, run_id: str, task: str, *, result: TypeAdapter[Any] | None = None
    ) -> Run[Any]:
        """Return a run that was triggered elsewhere or before, to get its result from a server.

        A server knows of the runs that have ended since it was first started, for as long as it
        keeps them; `result` asks it again until it knows.

        Args:
            run_id: The run's id.
            task: Its task's id.
            result: How to read the result, such as `task.result_type`; by default as plain values.

        Raises:
            NoServer: There has never been one.
        """
        await self.find_server()
        return Run(checked_id(run_id), task, await self._session(), result or _ANYTHING, asks=True)

    async def find_server(self) -> None:
        """Return if there is, or was, a server on this broker: its queues keep what comes.

        Cost: a round trip to the broker, until one has been found.

        Raises:
            NoServer: There has never been one.
        """
        await find_server(await self._session(), self._settings.names)

    async def open(self) -> None:
        """Connect now rather than at the first trigger."""
        await self._session()

    async def close(self) -> None:
        """Disconnect this event loop's session, deleting its reply queue."""
        await self._sessions.close()

    def afresh(self) -> AbstractContextManager[None]:
        """Begin with no session inside the block: it uses another broker, as tests do."""
        return self._sessions.afresh()

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
        self,
        request: Request,
        bodies: Sequence[bytes],
        result: TypeAdapter[Any],
        *,
        ids: Sequence[str] | None = None,
        detach: bool,
    ) -> list[Run[Any]]:
        """Publish a run for each body, some at a time, or raise `BatchError`."""
        session, task = await self._session(), request.task
        if bodies and request.delay_ms is not None:
            await find_queue(session, self._settings.names, task, run_id=None)
        claims = await self.claims.put_all(bodies)

        async def send(content: tuple[bytes, Claim | None, str | None]) -> Run[Any]:
            body, claim, given = content
            run_id = given or uuid7(self._now_ms())
            run: Run[Any] = Run(run_id, task, session, result)
            envelope, route = self._addressed(session, request, run_id, body, claim, detach=detach)
            await self._publish(session, envelope, route)
            return run

        given: Sequence[str | None] = ids if ids is not None else [None] * len(bodies)
        contents = list(zip(bodies, claims, given, strict=True))
        with self._telemetry.send(self._settings.names.trigger_route(task), count=len(bodies)):
            results = await send_each(contents, send)
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

    async def _admitted(self, session: Session, envelope: Envelope, asked: Admission) -> str:
        """Let a server decide on a trigger, and return the id of the run that stands for it."""
        if session.deaf is not None:
            raise ConfigurationError(f"no server could answer to this trigger: {session.deaf}")
        route, message = self._settings.names.server_route("admit"), envelope.message()
        message = replace(message, headers={**message.headers, **asked.headers()})
        with self._telemetry.send(route, trace=envelope.trace):
            try:
                told = await session.ask(route, message, timeout=self._settings.publish_timeout)
            except PublishError as error:
                self._telemetry.publish_failed(type(error).__name__)
                raise
        answer = Answer.read(told)
        if answer.refused is not None:
            raise IdempotencyConflict(answer.refused, run_id=answer.run_id)
        self._telemetry.triggered(envelope.task)
        return answer.run_id

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


_ANYTHING: Final[TypeAdapter[Any]] = TypeAdapter(Any)
