"""`brokertask topology`: planned, made, checked, against a broker that may differ."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from brokertask.envelope import Message
from brokertask.topology import (
    Exchange,
    Names,
    Queue,
    QueueOptions,
    TaskQueue,
    Topology,
    topology,
)
from infra.rabbitmq.node import Node
from tests.contract.conftest import SECONDS, until_ready
from tests.flow.commandline import Place, place

pytestmark = pytest.mark.anyio

NAMES = Names("bt")
TASKS = """
from brokertask import App, Queue, Retry

app = App("shop")

@app.task(timeout=60)
async def charge(order: int) -> None: ...

@app.task(timeout=60, queue=Queue(max_length=100))
async def refund(order: int) -> None: ...
"""
PATIENT = """

@app.task(retry=Retry(max_attempts=5, min_delay="1d", max_delay="7d"))
async def remind(whom: str) -> None: ...
"""
BROKEN = """
from dataclasses import replace
from brokertask import topology

class Shop(App):
    def topology(self):
        whole = super().topology()
        own = topology.Queue("bt.own", {"x-queue-type": "quorum", "x-delivery-limit": 5})
        return replace(whole, queues=(*whole.queues, own))

app.__class__ = Shop
"""
WHOLE = topology(NAMES, [TaskQueue("charge"), TaskQueue("refund", QueueOptions(max_length=100))])


@pytest.fixture(params=["socket", "rabbitmq"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """A folder with an app, and an empty broker."""
    async with place(request, tmp_path) as shop:
        shop.write("tasks.py", TASKS)
        yield shop


async def declare(shop: Place, wanted: Topology) -> None:
    async with shop.transport() as transport:
        await transport.declare(wanted)


async def publish(shop: Place, exchange: str, key: str, count: int, queue: str) -> None:
    async with shop.transport() as transport:
        for _ in range(count):
            route = replace(NAMES.trigger_route(key), exchange=exchange)
            await transport.publish(route, Message(body=b"\xc0"), timeout=SECONDS)
        await until_ready(transport, count, queue)


async def test_plan_apply_plan(shop: Place) -> None:
    first = await shop.brokertask("topology", "plan", "--app", "tasks")
    assert first.code == 1
    lines = first.out.splitlines()
    assert "+ exchange bt.tasks" in lines
    assert "+ queue bt.in.refund" in lines
    count = len(WHOLE.exchanges) + len(WHOLE.queues)
    told = f"({len(WHOLE.exchanges)} exchanges, {len(WHOLE.queues)} queues), 0 different"
    assert lines[-1] == f"{count} to make {told}"

    made = await shop.brokertask("topology", "apply", "--app", "tasks")
    assert made.code == 0
    assert made.out.splitlines()[-1] == f"{count} made {told}"

    for words in (("plan",), ("apply",)):
        again = await shop.brokertask("topology", *words, "--app", "tasks")
        assert (again.code, again.out) == (0, "the broker has all of it; nothing to do\n")


async def test_plan_as_json(shop: Place) -> None:
    await declare(shop, Topology((Exchange(NAMES.tasks, "direct"),), (), ()))
    done = await shop.brokertask("topology", "plan", "--app", "tasks", "--json")
    told = done.json()
    assert (done.code, told["mismatches"]) == (1, [])
    assert {"kind": "exchange", "name": "bt.tasks"} not in told["missing"]
    assert {"kind": "queue", "name": "bt.q.charge"} in told["missing"]
    made = await shop.brokertask("topology", "apply", "--app", "tasks", "--json")
    assert made.json() == {"made": told["missing"], "mismatches": []}


async def test_what_differs_is_told_with_both_values_and_a_way_out(shop: Place) -> None:
    other = topology(NAMES, [TaskQueue("charge", QueueOptions(delivery_limit=7))])
    events = Exchange(NAMES.events, "fanout")
    kept = tuple(one for one in other.exchanges if one.name != NAMES.events)
    await declare(shop, replace(other, exchanges=(*kept, events)))

    done = await shop.brokertask("topology", "plan", "--app", "tasks")
    assert done.code == 6
    assert "≠ queue bt.q.charge: x-delivery-limit is 7 on the broker, 50 in the code" in done.out
    assert "fix: set it back to 7 in the code" in done.out
    assert "rabbitmqctl delete_queue bt.q.charge --if-empty" in done.out
    assert "≠ exchange bt.events: type is fanout on the broker, topic in the code" in done.out
    assert "why: the arguments of an exchange or queue are fixed" in done.out
    told = (await shop.brokertask("topology", "plan", "--app", "tasks", "--json")).json()
    queue = next(one for one in told["mismatches"] if one["kind"] == "queue")
    assert (queue["argument"], queue["found"], queue["wanted"]) == ("x-delivery-limit", "7", "50")

    made = await shop.brokertask("topology", "apply", "--app", "tasks")
    assert made.code == 6
    assert "+ queue bt.q.refund" in made.out
    assert "3 made (0 exchanges, 3 queues), 2 different" in made.out


async def test_a_missing_argument_is_not_set(shop: Place) -> None:
    dead = Queue(NAMES.dead_queue("charge"), {"x-queue-type": "quorum"})
    await declare(shop, Topology((), (dead,), ()))
    done = await shop.brokertask("topology", "plan", "--app", "tasks")
    assert "x-delivery-limit is not set on the broker, 1000000000 in the code" in done.out
    assert "redrive or discard what it holds" in done.out


async def test_check_finds_nothing_in_a_healthy_app(shop: Place) -> None:
    await declare(shop, WHOLE)
    done = await shop.brokertask("topology", "check", "--app", "tasks")
    assert (done.code, done.out) == (0, "0 errors, 0 warnings, 0 notes\n")


async def test_check_without_a_broker(tmp_path: Path) -> None:
    nowhere = Place(tmp_path, "amqp://127.0.0.1:1/")
    nowhere.write("tasks.py", TASKS + PATIENT + BROKEN)
    words = ("topology", "check", "--app", "tasks", "--offline")
    done = await nowhere.brokertask(*words, "--json")
    assert done.code == 1
    found = {(one["level"], one["where"]): one for one in done.json()}
    assert set(found) == {("error", "bt.own"), ("note", "remind")}
    assert "dropped after 5 lost deliveries" in found["error", "bt.own"]["what"]
    assert found["error", "bt.own"]["fix"] == "set the dead-letter exchange"
    done = await nowhere.brokertask(*words)
    assert done.out.endswith("\n1 error, 0 warnings, 1 note\n")
    nowhere.write("tasks.py", TASKS + PATIENT + PATIENT.replace("remind", "renew"))
    done = await nowhere.brokertask(*words)
    assert done.code == 0
    assert done.out.endswith("\n0 errors, 0 warnings, 2 notes\n")
    environment = {"BROKERTASK_CONNECT_TIMEOUT": "0.2"}
    done = await nowhere.brokertask("topology", "check", "--app", "tasks", **environment)
    assert done.code == 4


async def test_check_finds_what_is_missing(shop: Place) -> None:
    words = ("topology", "check", "--app", "tasks")
    done = await shop.brokertask(*words)
    count = len(WHOLE.exchanges) + len(WHOLE.queues)
    assert (done.code, done.out.splitlines()) == (
        1,
        [
            f"✗ topology: {count} queues and exchanges are missing, such as bt.control",
            "    fix: brokertask topology apply --app MODULE:APP",
            "1 error, 0 warnings, 0 notes",
        ],
    )
    kept = tuple(one for one in WHOLE.queues if one.name != NAMES.dead_queue("refund"))
    bound = tuple(one for one in WHOLE.bindings if one.queue != NAMES.dead_queue("refund"))
    await declare(shop, replace(WHOLE, queues=kept, bindings=bound))
    done = await shop.brokertask(*words, "--json")
    (found,) = done.json()
    assert (done.code, found["what"]) == (1, "bt.dead.refund is missing")
    done = await shop.brokertask(*words, "--offline")
    assert (done.code, done.out) == (0, "0 errors, 0 warnings, 0 notes\n")


async def test_check_needs_no_rights(amqp_url: str, rabbitmq_node: Node, tmp_path: Path) -> None:
    name, vhost = f"user-{uuid.uuid4().hex[:8]}", amqp_url.rpartition("/")[2]
    rabbitmq_node.api("PUT", f"/api/users/{name}", {"password": "secret", "tags": ""})
    nothing = dict.fromkeys(("configure", "write", "read"), "^$")
    rabbitmq_node.api("PUT", f"/api/permissions/{vhost}/{name}", nothing)
    shop = Place(tmp_path, amqp_url)
    shop.write("tasks.py", TASKS)
    await declare(shop, topology(NAMES, [TaskQueue("charge")]))
    powerless = Place(tmp_path, amqp_url.replace("guest:guest", f"{name}:secret"))
    done = await powerless.brokertask("topology", "check", "--app", "tasks", "--json")
    assert done.out, done.err
    (found,) = done.json()
    assert (done.code, found["what"]) == (
        1,
        "3 queues and exchanges are missing, such as bt.q.refund",
    )
    await declare(shop, WHOLE)
    done = await powerless.brokertask("topology", "check", "--app", "tasks")
    assert (done.code, done.out) == (0, "0 errors, 0 warnings, 0 notes\n")
    rabbitmq_node.api("DELETE", f"/api/users/{name}")


async def test_check_finds_what_waits_on_the_broker(shop: Place) -> None:
    bounded = topology(NAMES, [TaskQueue("charge", QueueOptions(max_length=9))])
    await declare(shop, bounded)
    await publish(shop, NAMES.tasks, "charge", 2, NAMES.intake("charge"))
    await declare(shop, WHOLE)
    await publish(shop, NAMES.tasks, "charge", 3, NAMES.queue("charge"))
    await publish(shop, NAMES.dead, "charge", 4, NAMES.dead_queue("charge"))
    await publish(shop, NAMES.dead, "gone", 1, NAMES.unrouted)
    done = await shop.brokertask("topology", "check", "--app", "tasks", "--json")
    assert done.code == 1
    assert [(one["level"], one["where"], one["what"]) for one in done.json()] == [
        ("error", "bt.unrouted", "1 message found no queue after a delay or a burial"),
        ("warning", "bt.q.charge", "3 messages and no worker"),
        ("warning", "bt.dead.charge", "4 dead runs"),
        (
            "error",
            "bt.in.charge",
            "2 runs that no worker takes: the task has no max_length now",
        ),
    ]
    text = await shop.brokertask("topology", "check", "--app", "tasks")
    assert "fix: brokertask dead list --task charge --group" in text.out


async def test_an_app_is_needed(shop: Place) -> None:
    done = await shop.brokertask("topology", "plan")
    assert done.code == 2
    assert "--app" in done.err
    await declare(shop, WHOLE)
    done = await shop.brokertask("topology", "check", BROKERTASK_APP="tasks:app")
    assert "Traceback" not in done.err
    assert done.code == 0
