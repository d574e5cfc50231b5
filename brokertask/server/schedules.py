"""The part of a server that triggers what is scheduled, and what people do to schedules."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Row, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.envelope import Envelope, Message
from brokertask.errors import AccessDenied, EnvelopeError, InvalidOption, Unroutable
from brokertask.identity import uuid7
from brokertask.manifest import Manifest
from brokertask.schedule import Schedule
from brokertask.server import catalog, timetable
from brokertask.server.admission import send
from brokertask.server.batches import Batches
from brokertask.server.resources import Resources
from brokertask.server.store.schema import schedules, ticks
from brokertask.server.store.upsert import put_new
from brokertask.server.timetable import Plan
from brokertask.topology import check_task_id
from brokertask.values import pack

log = logging.getLogger("brokertask.server")

BATCH: Final = 20
POLL: Final = 1.0
"""Seconds after which a server looks for schedules that another one has taken in."""
FORGET_EVERY_MS: Final = 3_600_000
LATER_MS: Final = 300_000
"""A schedule that this server does not understand is looked at again after this long."""
MAX_NAME: Final = 100
SHOWN_TICKS: Final = 20

Answer: TypeAlias = Literal["done", "unchanged", "declared", "unknown"]
"""`declared`: it is written in the code of a worker, and is changed there."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A schedule as people see it. Instants are ms since the epoch."""

    name: str
    task: str
    spec: Mapping[str, Any]
    declared: bool
    """It is written in the code of a worker; otherwise it was made at run time."""
    paused: bool
    due_ms: int | None
    """When it is due next; None while it is paused."""
    run_id: str | None
    """Its latest run."""
    run_ms: int | None


class Schedules:
    """Triggers what is due; one of several servers' parts that may do so at once."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._sooner = asyncio.Event()

    async def run(self) -> None:
        """Take in what workers' code says, and watch the time, until cancelled."""
        queue = f"{self._resources.names.server}.manifests"
        async with (
            Batches(self._resources.transport, queue, BATCH) as batches,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._watch())
            async for deliveries in batches:
                for delivery in deliveries:
                    await self._read(delivery.message)
                    await delivery.ack()
                self._sooner.set()

    async def _watch(self) -> None:
        resources, clock = self._resources, self._resources.clock
        forget_ms = 0
        while True:
            self._sooner.clear()
            now_ms = clock.now_ms()
            async with resources.store.begin() as connection:
                rows = await timetable.due(connection, now_ms)
                runs = [run for row in rows for run in await self._decide(connection, row, now_ms)]
                await send(resources, connection, runs, now_ms=now_ms)
                if now_ms >= forget_ms:
                    await timetable.forget_ticks(connection, now_ms=now_ms)
                    forget_ms = now_ms + FORGET_EVERY_MS
                next_ms = await timetable.next_due(connection)
            if rows:
                resources.outbox.poke()
            else:
                await resources.wait_until(next_ms, self._sooner, poll=POLL)

    async def declare(
        self, connection: AsyncConnection, task: str, given: Mapping[str, Any] | None, at_ms: int
    ) -> None:
        """Take in what a worker's code says of a task: its schedule, or that it has none.

        Of several workers, the one that started last is right.

        Args:
            connection: A transaction.
            task: The task's id, and the schedule's name.
            given: As `Task.schedule_plain`.
            at_ms: When the worker said so.
        """
        held = await self._row(connection, task)
        if held is not None and not held.declared:
            if given is not None:
                log.error("schedule %r was made at run time; that in the code is not used", task)
            return
        if held is not None and held.changed_ms > at_ms:
            return
        if given is None:
            await self._delete(connection, task)
            return
        try:
            payload, sends_tick = given["payload"], bool(given["sends_tick"])
            plan = Plan(check_task_id(task), task, Schedule.read(given), payload, sends_tick)
            if not isinstance(payload, bytes):
                raise InvalidOption("its payload is no bytes")
        except (InvalidOption, KeyError) as error:
            log.error("the schedule of %s is not understood here: %s", task, error)
            return
        await self._put(connection, held, plan, declared=True, at_ms=at_ms)

    async def put(self, name: str, task: str, schedule: Schedule, *, sends_tick: bool) -> Answer:
        """Make a schedule at run time, or change the one of that name.

        Raises:
            InvalidOption: The name or the task's id is none.
            InvalidPayload: The payload cannot be sent.
            Unroutable: No worker has declared the task.
        """
        await self._find_queue(check_task_id(task))
        if not (name.isprintable() and 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME):
            raise InvalidOption(f"a schedule's name is printable text of 1 to {MAX_NAME} bytes")
        plan = Plan(name, task, schedule, pack(schedule.payload), sends_tick)
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            held = await self._row(connection, name)
            if held is not None and held.declared:
                return "declared"
            changed = await self._put(connection, held, plan, declared=False, at_ms=now_ms)
        self._sooner.set()
        return "done" if changed else "unchanged"

    async def delete(self, name: str) -> Answer:
        """Delete a schedule that was made at run time; its runs go on."""
        async with self._resources.store.begin() as connection:
            held = await self._row(connection, name)
            if held is None:
                return "unknown"
            if held.declared:
                return "declared"
            await self._delete(connection, name)
        return "done"

    async def pause(self, name: str) -> Answer:
        """Let no tick of a schedule run from now on, until it is resumed."""
        return await self._set(name, paused=True)

    async def resume(self, name: str) -> Answer:
        """Let a schedule go on with its next tick; those of the pause are not run."""
        return await self._set(name, paused=False)

    async def run_now(self, name: str) -> str | None:
        """Trigger a run of a schedule beside its ticks, and return its id; None: unknown."""
        resources, now_ms = self._resources, self._resources.clock.now_ms()
        async with resources.store.begin() as connection:
            held = await self._row(connection, name)
            if held is None:
                return None
            run_id = uuid7(now_ms)
            run = Plan.read(held).run(run_id, now_ms, held.run_ms, now_ms)
            await send(resources, connection, [run], now_ms=now_ms)
            latest = {"run_id": run_id, "run_ms": now_ms}
            mine = schedules.c.name == name
            await connection.execute(update(schedules).where(mine).values(latest))
        resources.outbox.poke()
        return run_id

    async def listed(self, *, after: str = "", limit: int = 100) -> list[Shown]:
        """Return schedules by name, those later in the alphabet than `after`."""
        rows = select(schedules).where(schedules.c.name > after)
        async with self._resources.store.read() as connection:
            found = await connection.execute(rows.order_by(schedules.c.name).limit(limit))
            return [_shown(row) for row in found]

    async def show(self, name: str) -> Shown | None:
        """Return a schedule, or None."""
        async with self._resources.store.read() as connection:
            held = await self._row(connection, name, lock=False)
        return None if held is None else _shown(held)

    async def history(self, name: str) -> list[Mapping[str, Any]]:
        """Return what became of the latest ticks of a schedule, latest first."""
        rows = select(ticks).where(ticks.c.schedule == name)
        async with self._resources.store.read() as connection:
            found = await connection.execute(
                rows.order_by(ticks.c.tick_ms.desc()).limit(SHOWN_TICKS)
            )
            return [dict(row._mapping) for row in found]

    async def next_fire_times(self, name: str, count: int = 5) -> list[int] | None:
        """Return when a schedule is due next, in ms since the epoch; None: unknown.

        Also of a paused one, as if it were resumed now.

        Raises:
            InvalidOption: This server does not understand it.
        """
        async with self._resources.store.read() as connection:
            held = await self._row(connection, name, lock=False)
        if held is None:
            return None
        plan, now_ms = Plan.read(held), self._resources.clock.now_ms()
        begin = now_ms - plan.offset_ms if held.paused else held.tick_ms - 1
        return [tick + plan.offset_ms for tick in islice(plan.schedule.ticks.after(begin), count)]

    async def _read(self, message: Message) -> None:
        """Take in one worker's manifest; one that cannot be read says nothing."""
        try:
            manifest = Manifest.read(message)
        except EnvelopeError as error:
            log.error("what a worker says of its schedules is not understood here: %s", error)
            return
        async with self._resources.store.begin() as connection:
            # All servers in the same order, as each holds the rows that it has looked at.
            for task, given in sorted(manifest.schedules.items()):
                await self.declare(connection, task, given, manifest.at_ms)
            await catalog.declare(connection, manifest)

    async def _find_queue(self, task: str) -> None:
        queue = self._resources.names.queue(task)
        with suppress(AccessDenied):  # RabbitMQ 4.3 and later let only some users look.
            if await self._resources.transport.depth(queue) is None:
                raise Unroutable(f"no queue on this broker is for task {task!r}: start a worker")

    async def _decide(
        self, connection: AsyncConnection, row: Row[Any], now_ms: int
    ) -> list[Envelope]:
        """Decide on the due ticks of a schedule, and return what is to be published."""
        try:
            plan = Plan.read(row)
        except InvalidOption as error:
            log.error("schedule %r is not understood here: %s", row.name, error)
            await timetable.put_off(connection, row.name, until_ms=now_ms + LATER_MS)
            return []
        return await timetable.decide(connection, plan, row, now_ms=now_ms)

    async def _put(
        self,
        connection: AsyncConnection,
        held: Row[Any] | None,
        plan: Plan,
        *,
        declared: bool,
        at_ms: int,
    ) -> bool:
        """Write a schedule, and return whether it is another one now; its past is kept."""
        now_ms = self._resources.clock.now_ms()
        columns, mine = plan.columns(), schedules.c.name == plan.name
        values = {
            **columns,
            **plan.due(plan.next_ms(now_ms)),
            "checked_ms": now_ms,
            "changed_ms": at_ms,
        }
        if held is None:
            row = {"name": plan.name, "declared": declared, "paused": False, "created_ms": now_ms}
            if await put_new(connection, schedules, {**values, **row}):
                return True
            held = await self._row(connection, plan.name)
        same = all(getattr(held, name) == columns[name] for name in columns)
        if same:
            values = {"changed_ms": at_ms}
        await connection.execute(update(schedules).where(mine).values(values))
        return not same

    async def _set(self, name: str, *, paused: bool) -> Answer:
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            held = await self._row(connection, name)
            if held is None:
                return "unknown"
            if held.paused == paused:
                return "unchanged"
            values: dict[str, Any] = {"paused": paused}
            if not paused:
                plan = Plan.read(held)
                next_ms = plan.next_ms(now_ms - plan.offset_ms)
                values |= {**plan.due(next_ms), "checked_ms": now_ms}
            mine = schedules.c.name == name
            await connection.execute(update(schedules).where(mine).values(values))
        self._sooner.set()
        return "done"

    async def _row(
        self, connection: AsyncConnection, name: str, *, lock: bool = True
    ) -> Row[Any] | None:
        found = select(schedules).where(schedules.c.name == name)
        return (await connection.execute(found.with_for_update() if lock else found)).one_or_none()

    async def _delete(self, connection: AsyncConnection, name: str) -> None:
        await connection.execute(delete(schedules).where(schedules.c.name == name))
        await connection.execute(delete(ticks).where(ticks.c.schedule == name))


def _shown(row: Row[Any]) -> Shown:
    return Shown(
        name=row.name,
        task=row.task,
        declared=row.declared,
        paused=row.paused,
        spec=timetable.spec_of(row),
        due_ms=None if row.paused else row.due_ms,
        run_id=row.run_id,
        run_ms=row.run_ms,
    )
