"""Schedules: what a server makes of their ticks, on the embedded broker and a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokertask import App, InvalidPayload, Retry, Schedule, Settings, Tick, Unroutable, Worker
from brokertask.clock import VirtualClock
from brokertask.envelope import Message
from brokertask.server.service import Server
from brokertask.server.timetable import GRACE_MS, TURN, Plan, Turn, turn
from brokertask.transport.memory import MemoryBroker
from brokertask.values import pack
from tests.flow.deciding import eventually, until
from tests.flow.serving import serving

pytestmark = pytest.mark.anyio

MINUTE = 60_000
HOUR = 60 * MINUTE
MIDNIGHT = round(datetime(2026, 3, 2, tzinfo=UTC).timestamp() * 1000)


def planned(**options: Any) -> Plan:
    return Plan("report", "report", Schedule(**options), b"\xc0", sends_tick=False)


# --- which ticks are run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "late_ms", "run", "missed"),
    [
        # On time, and as late as a restart makes it.
        ({}, 0, [0], None),
        ({}, GRACE_MS, [0], None),
        # No server was there for an hour and more.
        ({}, GRACE_MS + 1, [], (0, 0)),
        ({}, 2 * HOUR, [2 * HOUR], (0, HOUR)),
        ({"catch_up": "last"}, 30 * MINUTE, [0], None),
        ({"catch_up": "last"}, 5 * HOUR + 30 * MINUTE, [5 * HOUR], (0, 4 * HOUR)),
        ({"catch_up": "last"}, 5 * HOUR + 30_000, [5 * HOUR], (0, 4 * HOUR)),
        ({"catch_up": "all"}, 2 * HOUR + 30 * MINUTE, [0, HOUR, 2 * HOUR], None),
        (
            {"catch_up": "all", "catch_up_window": "2h"},
            4 * HOUR + 30 * MINUTE,
            [3 * HOUR, 4 * HOUR],
            (0, 2 * HOUR),
        ),
        ({"catch_up": "all", "catch_up_window": 0}, 30_000, [0], None),
    ],
)
def test_what_is_caught_up(
    options: dict[str, Any], late_ms: int, run: list[int], missed: tuple[int, int] | None
) -> None:
    plan = planned(cron="0 * * * *", **options)
    found = turn(plan, MIDNIGHT, MIDNIGHT + late_ms)
    assert [tick - MIDNIGHT for tick in found.run] == run
    assert (found.missed and tuple(tick - MIDNIGHT for tick in found.missed)) == missed
    assert found.next_ms == MIDNIGHT + (late_ms // HOUR + 1) * HOUR


@given(
    st.sampled_from(["skip", "last", "all"]),
    st.sampled_from([0, 90, 7200]),
    st.lists(st.integers(0, 40 * HOUR), min_size=1, max_size=12),
)
def test_no_tick_is_decided_twice_or_left_out(
    catch_up: str, jitter: int, pauses: list[int]
) -> None:
    plan = planned(every="7m", catch_up=catch_up, catch_up_window="20h", jitter=jitter)
    tick = first = plan.next_ms(MIDNIGHT)
    now, decided = MIDNIGHT, []
    for pause in pauses:
        now += pause
        found = turn(plan, tick, now)
        assert all(now - one - plan.offset_ms >= 0 for one in found.run)
        if found.missed is not None:
            begin, end = found.missed
            decided += list(range(begin, end + 1, 7 * MINUTE))
        decided += found.run
        tick = found.next_ms
    assert decided == list(range(first, tick, 7 * MINUTE))


def test_many_ticks_are_decided_in_turns() -> None:
    plan = planned(every=60, catch_up="all")
    now = MIDNIGHT + (2 * TURN + 9) * MINUTE
    seen: list[int] = []
    sizes: list[int] = []
    tick = MIDNIGHT
    while (found := turn(plan, tick, now)) != Turn([], None, tick):
        seen, tick = seen + found.run, found.next_ms
        sizes.append(len(found.run))
    assert seen == list(range(MIDNIGHT, now + 1, MINUTE))
    assert sizes == [TURN, TURN, 10]


# --- a server at work -----------------------------------------------------------------------------


class Office:
    """An app with a task that is scheduled, and what it has done."""

    def __init__(self) -> None:
        self.app = App("office", settings=Settings(amqp_url="memory:"))
        self.ticks: list[datetime] = []
        self.previous: list[datetime | None] = []
        self.gate = asyncio.Event()
        self.gate.set()

        @self.app.task(retry=Retry(max_attempts=1))
        async def report(tick: Tick) -> None:
            self.ticks.append(tick.at)
            self.previous.append(tick.previous)
            await self.gate.wait()

        @self.app.task(retry=Retry(max_attempts=1))
        async def sweep(room: str) -> None:
            self.swept.append(room)

        self.swept: list[str] = []
        self.report, self.sweep = report, sweep


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(MIDNIGHT + 30 * MINUTE)


@pytest.fixture
def broker(clock: VirtualClock) -> Iterator[MemoryBroker]:
    broker = MemoryBroker(clock)
    yield broker
    broker.close()


@pytest.fixture
async def office(broker: MemoryBroker) -> AsyncIterator[Office]:
    office = Office()
    with office.app.on(broker):
        yield office
        await office.app.client.close()


@pytest.fixture
async def server(office: Office, tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(office.app, f"sqlite+aiosqlite:///{tmp_path}/server.db") as server:
        yield server


@pytest.fixture
async def worker(office: Office) -> AsyncIterator[Worker]:
    async with office.app.worker() as worker:
        yield worker
        await worker.stop(grace=0)


HOURLY = Schedule(cron="0 * * * *")


def hour(number: int) -> datetime:
    return datetime(2026, 3, 2, tzinfo=UTC) + timedelta(hours=number)


async def put(server: Server, name: str = "hourly", schedule: Schedule = HOURLY) -> None:
    assert await server.schedules.put(name, "report", schedule, sends_tick=True) == "done"


async def outcomes(server: Server, name: str = "hourly") -> list[str]:
    """Return what became of the ticks so far, first to last."""
    return [row["outcome"] for row in reversed(await server.schedules.history(name))]


async def decided(server: Server, count: int) -> list[str]:
    """Return what became of the ticks, once there are so many."""

    async def enough() -> bool:
        return len(await outcomes(server)) >= count

    await until(enough)
    return await outcomes(server)


async def ran(office: Office, count: int) -> None:
    """Return once the task has run so many times."""
    await eventually(lambda: len(office.ticks) == count)


async def next_is(server: Server, due_ms: int) -> None:
    """Return once the schedule is due next at an instant."""

    async def agreed() -> bool:
        return await server.schedules.next_fire_times("hourly", 1) == [due_ms]

    await until(agreed)


@pytest.mark.usefixtures("worker")
async def test_each_tick_is_run_when_it_is_due(
    office: Office, server: Server, clock: VirtualClock
) -> None:
    await put(server)
    clock.advance_to(MIDNIGHT + HOUR - 1)
    assert await outcomes(server) == []
    for number in (1, 2, 3):
        clock.advance_to(MIDNIGHT + number * HOUR)
        await decided(server, number)
        await ran(office, number)
    assert office.ticks == [hour(1), hour(2), hour(3)]
    assert office.previous == [None, hour(1), hour(2)]
    shown = await server.schedules.show("hourly")
    assert shown is not None
    assert shown.due_ms == MIDNIGHT + 4 * HOUR
    run_ids = {row["run_id"] for row in await server.schedules.history("hourly")}
    assert len(run_ids) == 3
    assert shown.run_id in run_ids


@pytest.mark.usefixtures("worker")
async def test_a_clock_that_jumps_ahead_and_back_misses_nothing_and_repeats_nothing(
    office: Office, server: Server, clock: VirtualClock
) -> None:
    await put(server)
    clock.advance_to(MIDNIGHT + 30 * HOUR)  # by mistake: its tick is run, those before are late
    assert await decided(server, 2) == ["missed", "triggered"]
    await eventually(lambda: len(office.ticks) == 1)
    clock._now_ms = MIDNIGHT + 45 * MINUTE
    server.schedules._sooner.set()
    for number in range(1, 5):
        await next_is(server, MIDNIGHT + number * HOUR)
        clock.advance_to(MIDNIGHT + number * HOUR)
        await ran(office, number + 1)
    assert office.ticks == [hour(30), hour(1), hour(2), hour(3), hour(4)]


@pytest.mark.usefixtures("worker")
async def test_overlap_skip_leaves_out_ticks_while_a_run_goes_on(
    office: Office, server: Server, clock: VirtualClock
) -> None:
    await put(server, schedule=Schedule(cron="0 * * * *", overlap="skip"))
    office.gate.clear()
    clock.advance_to(MIDNIGHT + HOUR)
    await eventually(lambda: office.ticks)
    clock.advance_to(MIDNIGHT + 2 * HOUR)
    assert await decided(server, 2) == ["triggered", "overlapped"]
    office.gate.set()
    number = 2
    async with asyncio.timeout(20):  # until its end is recorded
        while "triggered" not in (await decided(server, number))[1:]:
            number += 1
            clock.advance_to(MIDNIGHT + number * HOUR)
    await eventually(lambda: len(office.ticks) == 2)
    assert office.previous == [None, hour(1)]


@pytest.mark.usefixtures("worker")
async def test_a_paused_schedule_goes_on_with_the_next_tick(
    office: Office, server: Server, clock: VirtualClock
) -> None:
    schedules = server.schedules
    await put(server, schedule=Schedule(cron="0 * * * *", catch_up="all"))
    assert await schedules.pause("hourly") == "done"
    assert await schedules.pause("hourly") == "unchanged"
    clock.advance_to(MIDNIGHT + 5 * HOUR + 1)
    assert await schedules.next_fire_times("hourly", 2) == [MIDNIGHT + n * HOUR for n in (6, 7)]
    assert await schedules.resume("hourly") == "done"
    clock.advance_to(MIDNIGHT + 6 * HOUR)
    await eventually(lambda: office.ticks)
    assert office.ticks == [hour(6)]
    assert await outcomes(server) == ["triggered"]


@pytest.mark.usefixtures("worker")
async def test_jitter_is_waited_for_and_the_tick_is_still_the_nominal_one(
    office: Office, server: Server, clock: VirtualClock
) -> None:
    await put(server, schedule=Schedule(cron="0 * * * *", jitter="50m"))
    (due,) = await server.schedules.next_fire_times("hourly", 1) or []
    offset = due - MIDNIGHT - HOUR
    assert 0 < offset < 50 * MINUTE
    clock.advance_to(due - 1)
    assert await outcomes(server) == []
    clock.advance_to(due)
    await eventually(lambda: office.ticks)
    assert office.ticks == [hour(1)]


@pytest.mark.usefixtures("worker")
async def test_run_now_is_beside_the_ticks(
    office: Office, server: Server, clock: VirtualClock
) -> None:
    await put(server)
    run_id = await server.schedules.run_now("hourly")
    await eventually(lambda: office.ticks)
    assert run_id is not None
    assert await server.schedules.run_now("daily") is None
    clock.advance_to(MIDNIGHT + HOUR)
    await eventually(lambda: len(office.ticks) == 2)
    assert office.ticks[1] == hour(1)


@pytest.mark.usefixtures("worker")
async def test_a_payload_of_its_own(office: Office, server: Server, clock: VirtualClock) -> None:
    schedule = Schedule(cron="0 * * * *", payload="kitchen")
    await server.schedules.put("kitchen", "sweep", schedule, sends_tick=False)
    clock.advance_to(MIDNIGHT + HOUR)
    await eventually(lambda: office.swept)
    assert office.swept == ["kitchen"]


@pytest.mark.usefixtures("worker")
async def test_a_name_is_a_deduplication_key(server: Server, clock: VirtualClock) -> None:
    schedules = server.schedules
    await put(server)
    clock.advance_to(MIDNIGHT + HOUR)
    await decided(server, 1)
    assert await schedules.put("hourly", "report", HOURLY, sends_tick=True) == "unchanged"
    await put(server, schedule=Schedule(cron="15 * * * *"))
    assert [each.name for each in await schedules.listed()] == ["hourly"]
    assert await schedules.next_fire_times("hourly", 1) == [MIDNIGHT + HOUR + 15 * MINUTE]
    assert await outcomes(server) == ["triggered"]
    assert await schedules.delete("hourly") == "done"
    assert await schedules.delete("hourly") == "unknown"
    assert await schedules.history("hourly") == []
    with pytest.raises(Unroutable, match="no queue"):
        await schedules.put("other", "unheard-of", HOURLY, sends_tick=False)


# --- declared in code -----------------------------------------------------------------------------


async def declare(server: Server, app: App, task: str, at_ms: int) -> None:
    async with server.resources.store.begin() as connection:
        given = app.tasks[task].schedule_plain
        await server.schedules.declare(connection, task, given, at_ms)


@pytest.mark.usefixtures("worker")
async def test_what_the_code_says_last_is_right(
    office: Office, server: Server, clock: VirtualClock
) -> None:
    old, new, none = App("office"), App("office"), App("office")

    @old.task(id="report", schedule=Schedule(cron="0 * * * *"))
    async def report_hourly(tick: Tick) -> None: ...

    @new.task(id="report", schedule=Schedule(cron="30 * * * *", overlap="skip"))
    async def report_at_half(tick: Tick) -> None: ...

    @none.task(id="report")
    async def report_never(tick: Tick) -> None: ...

    schedules = server.schedules
    await declare(server, old, "report", 1)
    assert await schedules.next_fire_times("report", 1) == [MIDNIGHT + HOUR]
    assert await schedules.pause("report") == "done"
    await declare(server, new, "report", 3)
    assert await schedules.next_fire_times("report", 1) == [MIDNIGHT + HOUR + 30 * MINUTE]
    await declare(server, old, "report", 2)  # late: it was said before
    shown = await schedules.show("report")
    assert shown is not None
    assert shown.spec["cron"] == "30 * * * *"
    assert shown.paused
    assert shown.declared
    assert await schedules.put("report", "report", HOURLY, sends_tick=True) == "declared"
    assert await schedules.delete("report") == "declared"
    await schedules.resume("report")
    clock.advance_to(MIDNIGHT + HOUR + 30 * MINUTE)
    await eventually(lambda: office.ticks)
    await declare(server, none, "report", 4)
    assert await schedules.show("report") is None


async def test_a_worker_tells_the_servers_of_the_schedules_in_its_code(
    broker: MemoryBroker, server: Server, clock: VirtualClock
) -> None:
    seen: list[Tick] = []
    app, without = (App("office", settings=Settings(amqp_url="memory:")) for _ in range(2))

    @app.task(schedule=Schedule(cron="0 * * * *"))
    async def tidy(tick: Tick) -> None:
        seen.append(tick)

    @without.task(id="tidy")
    async def tidy_when_asked(tick: Tick) -> None: ...

    async def known() -> bool:
        return await server.schedules.show("tidy") is not None

    async def unknown() -> bool:
        return not await known()

    with app.on(broker), without.on(broker):
        async with app.worker():
            await until(known)
            clock.advance_to(MIDNIGHT + HOUR)
            await eventually(lambda: seen)
        assert seen == [Tick("tidy", hour(1))]
        async with without.worker():
            await until(unknown)


async def test_a_manifest_that_cannot_be_read_is_in_nobodys_way(
    office: Office, server: Server
) -> None:
    route = server.resources.names.server_route("manifest")
    head = {"worker": "w", "at_ms": 1}
    spec = {**HOURLY.plain(), "payload": b"\xc0", "sends_tick": False}
    broken: tuple[Any, ...] = (
        7,
        {1: None},
        {"report": {}},
        {"report": {**spec, "cron": "* * *"}},
        {"report": {**spec, "payload": 1}},
        {"no task!": spec},
        {"sweep": spec},
    )
    for schedules in broken:
        body = pack({**head, "schedules": schedules})
        await server.resources.publish(route, Message(body=body, type="manifest"))

    async def known() -> bool:
        return await server.schedules.show("sweep") is not None

    await until(known)
    assert [each.name for each in await server.schedules.listed()] == ["sweep"]


@pytest.mark.usefixtures("worker")
async def test_what_was_made_at_run_time_is_not_replaced_by_code(server: Server) -> None:
    app = App("office")

    @app.task(schedule=Schedule(every=60))
    async def report(tick: Tick) -> None: ...

    await server.schedules.put("report", "report", HOURLY, sends_tick=True)
    await declare(server, app, "report", 1)
    shown = await server.schedules.show("report")
    assert shown is not None
    assert (shown.declared, shown.spec["cron"]) == (False, "0 * * * *")


def test_the_payload_of_a_schedule_is_checked_where_it_is_declared() -> None:
    app = App("office")
    with pytest.raises(InvalidPayload, match="payload of 'sweep'"):

        @app.task(schedule=Schedule(every=60))
        async def sweep(room: str) -> None: ...

    @app.task(schedule=Schedule(every=60, payload="kitchen"))
    async def clean(room: str) -> None: ...

    @app.task(schedule=Schedule(every=60))
    async def nothing() -> None: ...

    assert clean.schedule_plain is not None
    assert clean.schedule_plain["sends_tick"] is False
    assert nothing.schedule_plain is not None
    assert nothing.schedule_plain["payload"] == b"\xc0"
