"""Runs that wait: for children, tokens, events and other runs; on the embedded broker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import select

from brokertask import (
    Abort,
    App,
    ChildFailed,
    Context,
    Failure,
    InvalidPayload,
    NoServer,
    Rejected,
    Retry,
    Run,
    RunFailed,
    Settings,
    TimedOut,
    Worker,
)
from brokertask.deadletters import Selection
from brokertask.envelope import Message
from brokertask.server import parking, tokens
from brokertask.server.service import Server
from brokertask.server.store.schema import parked
from brokertask.topology import Route
from brokertask.transport.base import Delivery
from brokertask.values import JSON, MSGPACK, pack
from tests.flow.serving import serving

pytestmark = pytest.mark.anyio

SECONDS = 20.0
ONCE = Retry(max_attempts=1)


class Decision(BaseModel):
    approved: bool
    by: str = "nobody"


@pytest.fixture
def app() -> App:
    app = App("waits", settings=Settings(amqp_url="memory:"))

    @app.task(retry=ONCE)
    async def double(number: int) -> int:
        if number == 13:
            raise Abort("unlucky")
        return number * 2

    return app


@pytest.fixture
async def server(app: App, tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(app, f"sqlite+aiosqlite:///{tmp_path}/server.db") as server:
        yield server
    await app.client.close()


@asynccontextmanager
async def working(app: App) -> AsyncIterator[Worker]:
    async with app.worker() as worker:
        yield worker
        await worker.stop(grace=0)


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (the broker and the worker tell nobody)
            await asyncio.sleep(0.01)


async def open_tokens(server: Server, count: int = 1) -> list[dict[str, Any]]:
    """Return the tokens that runs wait for, once there are so many."""
    async with asyncio.timeout(SECONDS):
        while True:
            async with server.resources.store.begin() as connection:
                found = await tokens.listed(connection)
            if len(found) >= count:
                return found
            await asyncio.sleep(0.01)


async def publish(server: Server, key: str, value: dict[str, Any]) -> None:
    await server.resources.publish(Route("bt.events", key), Message(body=pack(value)))


async def test_children_give_their_results_to_their_parent(app: App, server: Server) -> None:
    double = app.tasks["double"]
    stretches: list[str | None] = []

    @app.task(concurrency=1)
    async def parent(number: int, ctx: Context) -> list[Any]:
        stretches.append(ctx.cancelled)
        one = await ctx.wait_for(double.call(number))
        two = await ctx.wait_for(double.call(number + 1), double.call(number + 2))
        many = await ctx.wait_for(double.map(range(20)))
        return [one, two, sum(each for each in many if not isinstance(each, Failure))]

    async with working(app):
        run = await parent.trigger(1)
        # More payloads than slots, one of which is unlucky: 13.
        assert await run.result(timeout=SECONDS) == [2, [4, 6], 380 - 26]
    assert len(stretches) == 4


async def test_a_parent_of_its_own_task_needs_no_second_slot(app: App, server: Server) -> None:
    @app.task(concurrency=1)
    async def count_down(number: int, ctx: Context) -> int:
        if number == 0:
            return 0
        below: int = await ctx.wait_for(app.tasks["count_down"].call(number - 1))
        return below + 1

    async with working(app):
        assert await (await count_down.trigger(5)).result(timeout=SECONDS) == 5


async def test_a_child_is_a_child(app: App, server: Server) -> None:
    @app.task
    async def tell(ctx: Context) -> list[str | None]:
        return [ctx.run_id, ctx.parent, ctx.root, *ctx.tags]

    @app.task
    async def parent(ctx: Context) -> list[str | None]:
        return await ctx.wait_for(tell.call(tags=["a"], delay="20ms"))

    async with working(app):
        run = await parent.trigger()
        child, *rest = await run.result(timeout=SECONDS)
    assert child != run.run_id
    assert rest == [run.run_id, run.run_id, "a"]


async def test_a_failed_child_of_a_map_is_a_value(app: App, server: Server) -> None:
    found: list[Any] = []

    @app.task
    async def parent(ctx: Context) -> int:
        found.extend(await ctx.wait_for(app.tasks["double"].map([1, 13, 2])))
        return len([each for each in found if each])

    async with working(app):
        assert await (await parent.trigger()).result(timeout=SECONDS) == 2
    assert (found[0], found[2]) == (2, 4)
    assert isinstance(found[1], Failure)
    assert (found[1].task, found[1].reason) == ("double", "aborted")
    assert found[1].error == {"type": "Abort", "message": "unlucky"}


async def test_a_failed_call_raises_and_no_retry_helps(app: App, server: Server) -> None:
    attempts: list[int] = []

    @app.task(retry=Retry(max_attempts=5, min_delay=0.01, max_delay=0.01))
    async def parent(ctx: Context) -> int:
        attempts.append(ctx.attempt)
        with pytest.raises(ChildFailed) as failed:
            await ctx.wait_for(app.tasks["double"].call(1), app.tasks["double"].call(13))
        error = failed.value
        assert (error.task, error.reason) == ("double", "aborted")
        assert error.error["message"] == "unlucky"
        raise error

    async with working(app):
        with pytest.raises(RunFailed) as failed:
            await (await parent.trigger()).result(timeout=SECONDS)
    assert failed.value.reason == "never_retried"
    assert set(attempts) == {1}


async def test_who_catches_a_failed_child_goes_on_and_remembers(app: App, server: Server) -> None:
    @app.task
    async def parent(ctx: Context) -> str:
        said = None
        try:
            await ctx.wait_for(app.tasks["double"].call(13))
        except ChildFailed as error:
            said = error.reason
        rest: int = await ctx.wait_for(app.tasks["double"].call(2))
        return f"{said} {rest}"

    async with working(app):
        assert await (await parent.trigger()).result(timeout=SECONDS) == "aborted 4"


async def test_a_token_is_completed_while_the_run_waits(app: App, server: Server) -> None:
    @app.task
    async def ask(ctx: Context) -> Decision | None:
        decision = await ctx.wait_for(ctx.token("approval", Decision, timeout="7d"))
        return decision if isinstance(decision, Decision) else None

    async with working(app) as worker:
        run = await ask.trigger()
        (token,) = await open_tokens(server)
        assert (token["name"], token["run_id"]) == ("approval", run.run_id)
        await eventually(lambda: worker.busy == 0)
        answers = [
            await server.waits.complete(token["id"], {"approved": True, "by": "Ada"}, by="ada"),
            await server.waits.complete(token["id"], {"approved": True, "by": "Ada"}, by="ada"),
            await server.waits.complete(token["id"], {"approved": False}, by="bob"),
        ]
        assert answers == ["done", "repeated", "late"]
        assert await run.result(timeout=SECONDS) == Decision(approved=True, by="Ada")


async def test_a_token_may_be_completed_before_anybody_waits(app: App, server: Server) -> None:
    """The secret is proof enough: the server has not heard of the token yet."""
    handed: list[str] = []
    go_on = asyncio.Event()

    @app.task
    async def ask(ctx: Context) -> Any:
        token = ctx.token("approval")
        assert ctx.token("approval").id == token.id
        handed.append(token.callback)
        await go_on.wait()
        return await ctx.wait_for(token)

    async with working(app):
        run = await ask.trigger()
        await eventually(lambda: handed)
        assert await server.waits.call_back(handed[0].rpartition("/")[2], 7) == "done"
        go_on.set()
        assert await run.result(timeout=SECONDS) == 7
    assert len(set(handed)) == 1


async def test_rejected_and_late_are_values(app: App, server: Server) -> None:
    @app.task
    async def ask(ctx: Context) -> list[str]:
        rejected = await ctx.wait_for(ctx.token("first"))
        late = await ctx.wait_for(ctx.token("second", timeout="30ms"))
        assert not rejected
        assert not late
        return [repr(rejected), repr(late)]

    async with working(app):
        run = await ask.trigger()
        (token,) = await open_tokens(server)
        assert await server.waits.reject(token["id"], "too dear", by="ada") == "done"
        assert await run.result(timeout=SECONDS) == [repr(Rejected("too dear")), repr(TimedOut())]
        async with server.resources.store.begin() as connection:
            (second,) = [
                one
                for one in await tokens.listed(connection, open_only=False)
                if one["name"] == "second"
            ]
        assert await server.waits.complete(second["id"], 1, by="ada") == "late"


async def test_a_token_gets_more_time(app: App, server: Server) -> None:
    @app.task
    async def ask(ctx: Context) -> str:
        return repr(await ctx.wait_for(ctx.token("approval", timeout="1d")))

    async with working(app):
        run = await ask.trigger()
        (token,) = await open_tokens(server)
        assert await server.waits.extend(token["id"], token["due_ms"] + 1) == "done"
        assert await server.waits.extend(token["id"], app.clock.now_ms() + 50) == "done"
        assert await run.result(timeout=SECONDS) == "TimedOut()"
        assert await server.waits.extend(token["id"], None) == "late"
        assert await server.waits.extend("token_of_nobody", None) == "unknown"


async def test_a_token_of_another_type_is_an_error_of_the_task(app: App, server: Server) -> None:
    @app.task(retry=ONCE)
    async def ask(ctx: Context) -> str:
        try:
            await ctx.wait_for(ctx.token("approval", Decision))
        except InvalidPayload as error:
            return str(error)
        return ""

    async with working(app):
        run = await ask.trigger()
        (token,) = await open_tokens(server)
        await server.waits.complete(token["id"], {"approved": "perhaps"}, by="ada")
        assert "token 'approval'" in await run.result(timeout=SECONDS)


async def test_events_are_heard_once_each_by_those_they_are_for(app: App, server: Server) -> None:
    @app.task
    async def ship(number: int, ctx: Context) -> list[Any]:
        heard = []
        for _ in range(2):
            event = ctx.event("order.paid", where={"order": {"number": number}})
            heard.append(await ctx.wait_for(event))
        return [event and event["amount"] for event in heard]

    async with working(app) as worker:
        runs = [await ship.trigger(number) for number in (1, 2)]
        # One comes before anybody waits, others while they do.
        for amount in (10, 20):
            await publish(server, "order.paid", {"order": {"number": 1}, "amount": amount})
            await publish(server, "order.paid", {"order": {"number": 2}, "amount": amount + 1})
            await publish(server, "order.lost", {"order": {"number": 1}, "amount": 0})
            await eventually(lambda: worker.busy == 0)
        results = [await run.result(timeout=SECONDS) for run in runs]
    assert results == [[10, 20], [11, 21]]


async def test_an_event_in_json_counts_and_what_is_no_map_does_not(
    app: App, server: Server
) -> None:
    @app.task
    async def ship(ctx: Context) -> Any:
        return await ctx.wait_for(ctx.event("paid"))

    async with working(app):
        run = await ship.trigger()
        route = Route("bt.events", "paid")
        for body, kind in ((b"[1]", JSON), (b"\xc1", MSGPACK), (b'{"by": "x"}', JSON)):
            await server.resources.publish(route, Message(body=body, content_type=kind))
        assert await run.result(timeout=SECONDS) == {"by": "x"}


async def test_the_first_of_several(app: App, server: Server) -> None:
    @app.task
    async def race(ctx: Context) -> list[Any]:
        first = await ctx.wait_for(ctx.token("never"), app.tasks["double"].call(4), first=True)
        late = await ctx.wait_for(ctx.token("never"), first=True, timeout="30ms")
        return [first.index, first.value, isinstance(late, TimedOut)]

    async with working(app):
        assert await (await race.trigger()).result(timeout=SECONDS) == [1, 8, True]


async def test_what_has_not_come_in_time_is_missing_and_the_rest_is_there(
    app: App, server: Server
) -> None:
    @app.task
    async def parent(ctx: Context) -> list[str]:
        double = app.tasks["double"]
        one = await ctx.wait_for(ctx.token("never"), double.call(4), timeout="1s")
        two = await ctx.wait_for(double.map([1, 2], delay="1h"), timeout="30ms")
        return [repr(one), *(each.reason for each in two if isinstance(each, Failure))]

    async with working(app):
        result = await (await parent.trigger()).result(timeout=SECONDS)
    assert result == ["[TimedOut(), 8]", "timed_out", "timed_out"]


async def test_waits_side_by_side(app: App, server: Server) -> None:
    stretches: list[int] = []

    @app.task
    async def parent(ctx: Context) -> list[Any]:
        stretches.append(1)
        double = app.tasks["double"]
        waits = (ctx.wait_for(double.call(number)) for number in range(3))
        return await asyncio.gather(*waits)

    async with working(app):
        assert await (await parent.trigger()).result(timeout=SECONDS) == [0, 2, 4]
    assert 2 <= len(stretches) <= 4


async def test_branches_that_wait_without_a_name_are_told_so(app: App, server: Server) -> None:
    @app.task(retry=ONCE)
    async def parent(ctx: Context) -> None:
        async def branch(number: int, name: str | None) -> None:
            await ctx.wait_for(app.tasks["double"].call(number), name=name)

        await asyncio.gather(*(branch(number, f"branch {number}") for number in range(2)))
        await asyncio.gather(*(branch(number, None) for number in range(2)))

    async with working(app):
        with pytest.raises(RunFailed, match=r"ctx\.wait_for\(\.\.\., name=\.\.\.\)"):
            await (await parent.trigger()).result(timeout=SECONDS)


async def test_a_sleep_beside_a_wait_ends_in_its_time(app: App, server: Server) -> None:
    @app.task
    async def parent(ctx: Context) -> str:
        nap = asyncio.create_task(ctx.sleep("40ms", name="nap"))
        wait = asyncio.create_task(_value(ctx.wait_for(ctx.token("never"), name="decision")))
        done, _ = await asyncio.wait({nap, wait}, return_when=asyncio.FIRST_COMPLETED)
        return "slept" if nap in done else "decided"

    async with working(app):
        assert await (await parent.trigger()).result(timeout=SECONDS) == "slept"


async def _value(waiting: Any) -> Any:
    return await waiting


async def test_steps_before_and_behind_a_wait_are_done_once(app: App, server: Server) -> None:
    did: list[str] = []

    @app.task
    async def parent(ctx: Context) -> int:
        await ctx.step("before", did.append, "before")
        number: int = await ctx.wait_for(app.tasks["double"].call(1))
        await ctx.step("behind", did.append, "behind")
        more: int = await ctx.wait_for(app.tasks["double"].call(number))
        return more

    async with working(app):
        assert await (await parent.trigger()).result(timeout=SECONDS) == 4
    assert did == ["before", "behind"]


async def test_a_plain_function_waits_too(app: App, server: Server) -> None:
    @app.task
    def parent(ctx: Context) -> int:
        found: int = ctx.wait_for_sync(app.tasks["double"].call(21))
        return found

    async with working(app):
        assert await (await parent.trigger()).result(timeout=SECONDS) == 42


async def test_a_run_that_a_step_has_triggered(app: App, server: Server) -> None:
    double = app.tasks["double"]

    @app.task
    async def parent(ctx: Context) -> int:
        async def fan_out() -> str:
            return (await double.trigger(3)).run_id

        run_id = await ctx.step("fan out", fan_out)
        run: Run[Any] = await app.client.run(run_id, "double", result=double.result_type)
        found: int = await ctx.wait_for(run)
        return found

    async with working(app):
        assert await (await parent.trigger()).result(timeout=SECONDS) == 6


async def test_a_run_that_is_triggered_outside_of_a_step_is_found_out(
    app: App, server: Server
) -> None:
    @app.task
    async def parent(ctx: Context) -> None:
        await ctx.wait_for(await app.tasks["double"].trigger(3))

    async with working(app):
        with pytest.raises(RunFailed, match=r"task\.call") as failed:
            await (await parent.trigger()).result(timeout=SECONDS)
    assert failed.value.reason == "step_mismatch"


async def test_without_a_server_a_wait_says_so_and_has_triggered_nothing(app: App) -> None:
    @app.task(retry=ONCE)
    async def parent(ctx: Context) -> str:
        try:
            await ctx.wait_for(app.tasks["double"].call(1))
        except NoServer as error:
            return str(error)
        return ""

    async with working(app):
        assert "brokertask server" in await (await parent.trigger()).result(timeout=SECONDS)
        transport = app.connect()
        await transport.open(timeout=1)
        depth = await transport.depth("bt.q.double")
        assert depth is not None
        assert depth.ready == 0
    await app.client.close()


async def test_the_result_of_a_run_for_who_has_not_triggered_it(app: App, server: Server) -> None:
    @app.task(retry=ONCE)
    async def slow(number: int, ctx: Context) -> int:
        found = await ctx.wait_for(ctx.token("go", int))
        return number + (found or 0)

    async with working(app):
        done = await app.tasks["double"].trigger(4)
        await done.result(timeout=SECONDS)
        run = await slow.trigger(1)
        other = App("another", settings=app.settings)
        with other.on(app._embedded):  # type: ignore[arg-type]
            before = await other.client.run(done.run_id, "double")
            assert await before.result(timeout=SECONDS) == 8
            later = await other.client.run(run.run_id, "slow")
            waiting = asyncio.create_task(later.result(timeout=SECONDS))
            (token,) = await open_tokens(server)
            await server.waits.complete(token["id"], 41, by="ada")
            assert await waiting == 42
            dead = await app.tasks["double"].trigger(13)
            with pytest.raises(RunFailed, match="unlucky"):
                await (await other.client.run(dead.run_id, "double")).result(timeout=SECONDS)
            await other.client.close()


async def test_a_result_too_large_for_the_memory_is_a_failure(server: Server, app: App) -> None:
    limit = app.settings.max_memory_bytes

    @app.task
    async def large(size: int) -> bytes:
        return b"x" * size

    @app.task
    async def parent(ctx: Context) -> list[str]:
        found = await ctx.wait_for(large.map([limit // 2, limit // 2, 10]))
        return [each.reason if isinstance(each, Failure) else str(len(each)) for each in found]

    async with working(app):
        run = await parent.trigger()
        assert await run.result(timeout=SECONDS) == [str(limit // 2), "too_large", "10"]


async def test_a_wait_that_is_parked_twice_goes_on_once(app: App, tmp_path: Path) -> None:
    """What a crash between confirm and ack leaves: the same message, and one of a fork."""
    bodies: list[int] = []
    url = f"sqlite+aiosqlite:///{tmp_path}/server.db"

    @app.task
    async def parent(ctx: Context) -> int:
        bodies.append(1)
        found = await ctx.wait_for(ctx.token("go", int))
        return found or 0

    async with serving(app, url):
        pass  # Its queues are there from now on.
    transport = app.connect()
    await transport.open(timeout=1)
    took: list[Delivery] = []
    async with app, working(app):
        run = await parent.trigger()
        consumer = await transport.consume("bt.server.waits", took.append, prefetch=1)
        await eventually(lambda: took)
        message = took[0].message
        fork = {**message.headers, "bt-seq": int(str(message.headers["bt-seq"])) + 5}
        await took[0].requeue()
        await consumer.close()
        await transport.publish(Route("bt.server", "wait"), message, timeout=SECONDS)
        async with serving(app, url) as server:
            (token,) = await open_tokens(server)
            await server.waits.complete(token["id"], 5, by="ada")
            assert await run.result(timeout=SECONDS) == 5
            # A fork that comes to the wait when the run has gone on behind it.
            again = replace(message, headers=fork)
            await server.resources.publish(Route("bt.server", "wait"), again)
            # One that comes behind it is waiting, so it was looked at.
            await parent.trigger()
            await open_tokens(server)
            async with server.resources.store.read() as connection:
                mine = parked.c.run_id == run.run_id
                states = await connection.scalars(select(parked.c.state).where(mine))
                assert states.all() == ["resumed"]
    assert len(bodies) == 3
    await transport.close()


async def test_of_two_servers_one_sends_each_run_on(
    app: App, server: Server, tmp_path: Path
) -> None:
    stretches: Counter[int] = Counter()

    @app.task(concurrency=50)
    async def parent(number: int, ctx: Context) -> int:
        stretches[number] += 1
        double = app.tasks["double"]
        found = await ctx.wait_for(*(double.call(20 + number + place) for place in range(3)))
        return sum(found)

    async with serving(app, f"sqlite+aiosqlite:///{tmp_path}/server.db"), working(app):
        runs = await parent.trigger_many(range(40))
        results = [await run.result(timeout=SECONDS) for run in runs]
    assert results == [sum(2 * (20 + number + place) for place in range(3)) for number in range(40)]
    assert set(stretches.values()) == {2}


async def test_what_is_kept_of_a_run_goes_with_it_but_never_its_message(
    app: App, server: Server
) -> None:
    @app.task
    async def ask(ctx: Context) -> Any:
        await ctx.wait_for(app.tasks["double"].call(1))
        return await ctx.wait_for(ctx.token("approval"))

    async with working(app):
        run = await ask.trigger()
        (token,) = await open_tokens(server)
        async with server.resources.store.begin() as connection:
            await parking.forget(connection, [run.run_id], before_ms=app.clock.now_ms() + 1)
            assert len(await tokens.of_run(connection, run.run_id)) == 2
        await server.waits.complete(token["id"], 1, by="ada")
        assert await run.result(timeout=SECONDS) == 1
        async with server.resources.store.begin() as connection:
            await parking.forget(connection, [run.run_id], before_ms=app.clock.now_ms() + 1)
            assert await tokens.of_run(connection, run.run_id) == []
            assert await tokens.listed(connection, open_only=False) == []


async def test_a_redriven_parent_asks_again_for_what_failed(app: App, server: Server) -> None:
    mended: list[int] = []
    did: list[int] = []

    @app.task(retry=ONCE)
    async def fragile(number: int) -> int:
        did.append(number)
        if number == 2 and not mended:
            raise ValueError("not yet")
        return number

    @app.task(retry=ONCE)
    async def parent(ctx: Context) -> list[int]:
        return await ctx.wait_for(fragile.call(1), fragile.call(2))

    async with working(app):
        run = await parent.trigger()
        with pytest.raises(RunFailed, match="not yet"):
            await run.result(timeout=SECONDS)
        mended.append(1)
        transport = app.connect()
        await transport.open(timeout=1)
        for task in ("fragile", "parent"):
            async with Selection.open(transport, app.settings, [task]) as dead:
                (letter,) = dead.letters
                assert [one.status async for one in dead.redrive()] == ["redriven"]
            async with asyncio.timeout(SECONDS):
                # The server still tells of the failure until it has heard of the later end.
                while await _failed(ended := await app.client.run(letter.run_id, task)):
                    pass
        assert await ended.result(timeout=SECONDS) == [1, 2]
        await transport.close()
    assert sorted(did) == [1, 2, 2]


async def _failed(run: Run[Any]) -> bool:
    """Whether a run has failed, as far as the server knows."""
    try:
        await run.result(timeout=SECONDS)
    except RunFailed:
        return True
    return False
