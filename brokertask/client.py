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
from brokertask.claims import Claims
from brokertask.durations import Duration, seconds
from brokertask.envelope import Envelope, Message
from brokertask.errors import (
    AccessDenied,
    BatchError,
    ConfigurationError,
    EnvelopeError,
    IdempotencyConflict,
    NoServer,
    PayloadTooLarge,
    PublishError,
    Unroutable,
)
from brokertask.events import Event
from brokertask.identity import checked_id, checked_tags, uuid7
from brokertask.orders import Orders
from brokertask.run import Run, Session, from_thread, private_queue, running_in
from brokertask.sessions import Sessions
from brokertask.settings import Settings
from brokertask.telemetry import Telemetry
from brokertask.topology import IN_PLACE_MS, Binding, Route, Topology, check_task_id
from brokertask.transport.base import Transport
from brokertask.trigger import TriggerOptions
from brokertask.values import encode

log = logging.getLogger("brokertask.client")

MAX_UNHEARD: Final = 10_000
IN_FLIGHT: Final = 256
"""Publishes of one `trigger_many` that wait for their confirm at a time."""
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
        envelope = self._envelope(
            task, self.encode(payload), delay=delay, expires=expires, tags=tags, run_id=run_id
        )
        session = await self._session()
        if asked is not None:
            await self.find_server()
        if asked is not None or envelope.due_ms is not None:
            await self._find_queue(session, envelope)
        envelope = envelope.claimed(await self.claims.put(envelope.payload))
        run: Run[Any] = Run(envelope.run_id, task, session, result or _ANYTHING)
        envelope, route = self._addressed(session, envelope, detach=False)
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

        Nothing is sent unless every payload can be. With `run_ids` each run gets the id in its
        place.

        Raises:
            BatchError: Some were not taken; its `results` tell of each.
            PayloadError: A payload cannot be sent; nothing was.
        """
        bodies = [self.encode(payload) for payload in payloads]
        ids: Sequence[str | None] = run_ids or [None] * len(bodies)
        envelopes = [
            self._envelope(task, body, delay=delay, expires=expires, tags=tags, run_id=run_id)
            for body, run_id in zip(bodies, ids, strict=True)
        ]
        session = await self._session()
        if envelopes and envelopes[0].due_ms is not None:
            await self._find_queue(session, envelopes[0])
        claims = await self.claims.put_all(bodies)
        envelopes = [each.claimed(claim) for each, claim in zip(envelopes, claims, strict=True)]
        detach = len(envelopes) > JOINED_FAN_OUT
        results: list[Run[Any] | PublishError] = [
            Run(envelope.run_id, task, session, result or _ANYTHING) for envelope in envelopes
        ]
        waiting = iter(enumerate(envelopes))

        async def work() -> None:
            for index, envelope in waiting:
                run = results[index]
                assert isinstance(run, Run)
                addressed, route = self._addressed(session, envelope, detach=detach)
                try:
                    await self._publish(session, addressed, route)
                except PublishError as error:
                    results[index] = error

        with self._telemetry.send(self._settings.names.trigger_route(task), count=len(envelopes)):
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
        session, names = await self._session(), self._settings.names
        queue = f"{names.server}.waits"
        if queue in session.found:
            return
        with suppress(AccessDenied):  # RabbitMQ 4.3 and later let only some users look.
            if await session.transport.depth(queue) is None:
                raise NoServer(
                    "this needs a server, and none was ever started on this broker: start "
                    "`brokertask server`"
                )
        session.found.add(queue)

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
        now = self._now_ms()
        delay_ms = round(seconds(delay) * 1000)
        parent = running_in.get()
        identity = checked_id(run_id) if run_id is not None else uuid7(now)
        return Envelope(
            run_id=identity,
            task=task,
            payload=body,
            triggered_ms=now,
            sent_ms=now,
            due_ms=now + delay_ms if delay_ms > IN_PLACE_MS else None,
            expires_ms=None if expires is None else now + round(seconds(expires) * 1000),
            tags=checked_tags(tags),
            parent=parent.run_id if parent else None,
            root=parent.root if parent else None,
            app_id=self._app_id,
        )

    def _addressed(
        self, session: Session, envelope: Envelope, *, detach: bool
    ) -> tuple[Envelope, Route]:
        """Return the envelope with its trace and reply address, and where to publish it."""
        names = self._settings.names
        trace = self._telemetry.trigger(
            envelope.task, envelope.run_id, parent_run=envelope.parent, detach=detach
        )
        route, left = names.trigger_route(envelope.task), 0
        if envelope.due_ms is not None and envelope.sent_ms is not None:
            route, left = names.delay_route(envelope.task, envelope.due_ms - envelope.sent_ms)
        return replace(envelope, trace=trace, left_ms=left, reply_to=session.reply_key), route

    async def _find_queue(self, session: Session, envelope: Envelope) -> None:
        """Refuse a run of later that no queue is for: nobody would be told then."""
        task = envelope.task
        if task in session.found:
            return
        queue = self._settings.names.queue(task)
        with suppress(AccessDenied):  # RabbitMQ 4.3 and later let only some users look.
            if await session.transport.depth(queue) is None:
                raise Unroutable(
                    f"no queue on this broker is for task {task!r}: no worker has declared it. "
                    "Start one, run `brokertask topology apply`, or mend the task's id",
                    run_id=envelope.run_id,
                )
        session.found.add(task)

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
