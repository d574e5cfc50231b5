"""`brokertask doctor`: what it says of healthy and of broken surroundings."""

from __future__ import annotations

import http.server
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from brokertask.cli.checks import collector, skew
from brokertask.envelope import Message
from brokertask.topology import Exchange, Names, Queue, TaskQueue, Topology, topology
from infra.rabbitmq.node import Node
from tests.contract.conftest import SECONDS, until_ready
from tests.flow.commandline import Done, Place, place
from tests.flow.otlp import OtlpReceiver

pytestmark = pytest.mark.anyio

NAMES = Names("bt")
TASKS = """
from brokertask import App

app = App("shop")

@app.task(timeout=60)
async def charge(order: int) -> None: ...
"""
WHOLE = topology(NAMES, [TaskQueue("charge")])
EVERYTHING = ("configure", "write", "read")


@pytest.fixture(params=["socket", "rabbitmq"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """A folder with an app, and a broker that has its topology."""
    async with place(request, tmp_path) as shop:
        shop.write("tasks.py", TASKS)
        async with shop.transport() as transport:
            await transport.declare(WHOLE)
        yield shop


@pytest.fixture
def rabbit(amqp_url: str, tmp_path: Path) -> Place:
    """A folder with an app, and a RabbitMQ that knows nothing of it."""
    shop = Place(tmp_path, amqp_url)
    shop.write("tasks.py", TASKS)
    return shop


async def examined(shop: Place, *words: str, **environment: str) -> tuple[Done, dict[str, Any]]:
    done = await shop.brokertask("doctor", "--json", *words, **environment)
    assert done.out, done.err
    return done, {check["name"]: check for check in done.json()}


async def test_all_is_well(shop: Place) -> None:
    with OtlpReceiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        done = await shop.brokertask("doctor", "--app", "tasks", **environment)
    assert done.code == 0, done.out
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[-1] == "0 failed, 0 to look at"
    assert [line.split()[:2] for line in lines[:8]] == [
        ["✔", name]
        for name in (
            *("settings", "broker", "topology", "publishing", "results", "delays", "clock"),
            "queues",
        )
    ]
    assert "guest:guest" not in done.out
    assert "takes spans" in done.out


async def test_the_broker_names_itself_and_no_probe_is_left(rabbit: Place) -> None:
    async with rabbit.transport() as transport:
        await transport.declare(WHOLE)
    done, checks = await examined(rabbit)
    assert done.code == 0
    assert checks["broker"]["detail"].startswith("RabbitMQ 3.")
    assert ":***@" in checks["settings"]["detail"]
    assert "(BROKERTASK_AMQP_URL)" in checks["settings"]["detail"]
    assert checks["traces"]["status"] == "warning"
    async with rabbit.transport() as transport:
        for queue in (NAMES.unrouted, NAMES.rung(10)):
            depth = await transport.depth(queue)
            assert depth is not None
            assert depth.ready == 0


async def test_no_broker(tmp_path: Path) -> None:
    nowhere = Place(tmp_path, "amqp://guest:secret@127.0.0.1:1/")
    done, checks = await examined(nowhere, BROKERTASK_CONNECT_TIMEOUT="0.2")
    assert done.code == 1
    assert list(checks) == ["settings", "broker", "traces"]
    assert checks["broker"]["status"] == "failed"
    assert "secret" not in done.out + done.err


async def test_settings_that_are_not_understood(tmp_path: Path) -> None:
    done = await Place(tmp_path, "http://127.0.0.1/").brokertask("doctor")
    assert done.code == 2
    assert "BROKERTASK_AMQP_URL" in done.err


@pytest.mark.parametrize(
    ("declare", "code", "status"), [("true", 0, "warning"), ("false", 1, "failed")]
)
async def test_a_topology_that_is_missing(
    rabbit: Place, declare: str, code: int, status: str
) -> None:
    done, checks = await examined(rabbit, "--app", "tasks", BROKERTASK_DECLARE=declare)
    assert checks["topology"]["status"] == status
    assert checks["topology"]["detail"].startswith(
        f"{len(WHOLE.exchanges) + len(WHOLE.queues)} missing, such as bt."
    )
    assert checks["topology"]["fix"].startswith("brokertask topology apply")
    assert done.code == code
    assert list(checks) == ["settings", "broker", "topology", "traces"]


async def test_a_topology_that_differs(rabbit: Place) -> None:
    async with rabbit.transport() as transport:
        kept = tuple(one for one in WHOLE.exchanges if one.name != NAMES.events)
        events = Exchange(NAMES.events, "fanout")
        await transport.declare(replace(WHOLE, exchanges=(*kept, events)))
    done, checks = await examined(rabbit, "--app", "tasks")
    assert done.code == 1
    assert checks["topology"]["detail"] == (
        "1 different, such as bt.events: type is fanout, not topic"
    )


@contextmanager
def user(node: Node, url: str, **permissions: str) -> Iterator[str]:
    """Make a user with some permissions on a virtual host; yield the URL for it."""
    name, vhost = f"user-{uuid.uuid4().hex[:8]}", url.rpartition("/")[2]
    node.api("PUT", f"/api/users/{name}", {"password": "secret", "tags": ""})
    granted = dict.fromkeys(EVERYTHING, "^$") | permissions
    node.api("PUT", f"/api/permissions/{vhost}/{name}", granted)
    yield url.replace("guest:guest", f"{name}:secret")
    node.api("DELETE", f"/api/users/{name}")


async def test_a_user_that_may_do_nothing(rabbit: Place, rabbitmq_node: Node) -> None:
    async with rabbit.transport() as transport:
        await transport.declare(WHOLE)
    with user(rabbitmq_node, rabbit.url) as url:
        done, checks = await examined(Place(rabbit.folder, url), BROKERTASK_DECLARE="true")
    assert done.code == 1
    told = {name: check["status"] for name, check in checks.items()}
    assert told | {"clock": "ok"} == {
        "settings": "ok",
        "broker": "ok",
        "topology": "failed",
        "publishing": "failed",
        "results": "warning",
        "delays": "warning",
        "queues": "ok",
        "traces": "warning",
        "clock": "ok",
    }
    assert "bt.tasks" in checks["publishing"]["fix"]
    assert "secret" not in done.out


async def test_a_publisher_needs_no_more_than_its_exchange(
    rabbit: Place, rabbitmq_node: Node
) -> None:
    async with rabbit.transport() as transport:
        await transport.declare(WHOLE)
    with user(rabbitmq_node, rabbit.url, write="^bt\\.tasks$") as url:
        environment = {"BROKERTASK_DECLARE": "false", "BROKERTASK_RESULTS": "false"}
        done, checks = await examined(Place(rabbit.folder, url), **environment)
    assert done.code == 0, done.out
    assert checks["publishing"] == {
        "name": "publishing",
        "status": "ok",
        "detail": "may write to bt.tasks",
        "fix": "",
    }
    assert checks["topology"]["status"] == "warning"


async def test_what_waits_is_told(shop: Place) -> None:
    async with shop.transport() as transport:
        for exchange, key, queue in (
            (NAMES.dead, "gone", NAMES.unrouted),
            (NAMES.dead, "charge", NAMES.dead_queue("charge")),
        ):
            route = replace(NAMES.trigger_route(key), exchange=exchange)
            await transport.publish(route, Message(body=b""), timeout=SECONDS)
            await until_ready(transport, 1, queue)
    done = await shop.brokertask("doctor", "--app", "tasks")
    assert done.code == 1
    assert "✗ queues      bt.unrouted: 1 message found no queue" in done.out
    assert "! queues      bt.dead.charge: 1 dead run" in done.out
    assert "→ brokertask dead list --task charge --group" in done.out


async def test_a_delay_that_leads_nowhere(shop: Place) -> None:
    rung = next(one for one in WHOLE.bindings if one.queue == NAMES.rung(10))
    async with shop.transport() as transport:
        await transport.declare(Topology((), (), (), (rung,)))
    done, checks = await examined(shop)
    assert done.code == 1
    assert checks["delays"]["status"] == "failed"
    assert "bt.delay.10" in checks["delays"]["detail"]


async def test_a_delay_that_never_ends(shop: Place) -> None:
    stalled = Queue("stalled", {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000})
    rung = next(one for one in WHOLE.bindings if one.queue == NAMES.rung(10))
    async with shop.transport() as transport:
        await transport.declare(
            Topology((), (stalled,), (replace(rung, queue="stalled"),), (rung,))
        )
    _, checks = await examined(shop)
    assert checks["delays"]["status"] == "failed"
    assert "did not come back in 5.0 s" in checks["delays"]["detail"]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A collector that takes nothing, in the year 2001."""

    def do_POST(self) -> None:
        code = 200 if self.headers.get("x-key") == "a b" else 401
        self.send_response_only(code)
        self.send_header("Date", "Mon, 01 Jan 2001 00:00:00 GMT")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://user:secret@127.0.0.1:{server.server_port}/v1/traces"
        server.shutdown()
        thread.join()


def test_a_collector_that_refuses(refusing: str) -> None:
    url = refusing.replace("user:secret@", "")
    (check,) = collector({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": url})
    assert check.status == "failed"
    assert "Unauthorized" in check.detail


def test_a_collector_of_another_time(refusing: str) -> None:
    url = refusing.replace("user:secret@", "")
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "x-key=a%20b"}
    good, clock = collector({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": url, **headers})
    assert good.status == "ok"
    assert (clock.name, clock.status) == ("clock", "warning")
    assert "ahead of the collector's" in clock.detail


@pytest.mark.parametrize(
    ("environment", "status", "part"),
    [
        ({}, "warning", "no endpoint"),
        ({"OTEL_SDK_DISABLED": "true"}, "ok", "switched off"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, "failed", ":1/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "nonsense"}, "failed", "nonsense/v1/traces"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            },
            "failed",
            "grpc",
        ),
    ],
)
def test_collectors(environment: dict[str, str], status: str, part: str) -> None:
    (check,) = collector(environment)
    assert (check.status, part in check.detail) == (status, True)


@pytest.mark.parametrize(
    ("said_ms", "word"),
    [
        (100_000, "within"),
        (101_000, "within"),
        (98_000, "within"),
        (96_000, "ahead of"),
        (105_000, "behind"),
        (None, ""),
    ],
)
def test_clocks_are_compared_to_the_second(said_ms: int | None, word: str) -> None:
    assert [word in check.detail for check in skew("x", said_ms, 100.2, 100.4)] == (
        [True] if word else []
    )
