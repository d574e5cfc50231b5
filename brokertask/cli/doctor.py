"""`brokertask doctor`: can a process with these settings do its work with this broker?"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Final, Protocol, TypeAlias, runtime_checkable

import typer

from brokertask.app import App
from brokertask.cli import console
from brokertask.cli.broker import AnyApp, app_or_stand_in, limits_of
from brokertask.cli.checks import Check, collector, from_finding, skew
from brokertask.cli.console import Exit, printable
from brokertask.deadletter import death_ms
from brokertask.drift import observe, plan
from brokertask.durations import readable
from brokertask.envelope import Message
from brokertask.errors import AccessDenied, BrokertaskError, Unroutable
from brokertask.payloads import open_store
from brokertask.settings import mask
from brokertask.topology import SHORTEST_RUNG_MS, Binding, Queue, Route
from brokertask.transport.base import Transport

Examine: TypeAlias = Callable[[App, Transport], Awaitable[list[Check]]]

MARKS: Final = {"ok": "[green]✔[/]", "warning": "[yellow]![/]", "failed": "[red]✗[/]"}
NOBODY: Final = "-doctor-"
"""A routing key that no task can have: what is published with it comes back."""
PROBE: Final = b"brokertask doctor"
"""What is left in a payload store by looking whether it works."""
QUESTIONS: Final = 3
PROBE_TIMEOUT: Final = 5.0
CHECK_TIMEOUT: Final = 60.0


@runtime_checkable
class _Named(Protocol):
    @property
    def server(self) -> str: ...


def doctor(spec: AnyApp = None, as_json: console.Json = False) -> None:
    """Check settings, broker, permissions, topology, delays, queues, payload store, traces, clocks.

    With --app, also what its tasks need. Exit code 1: something has failed.
    """
    app = app_or_stand_in(spec)
    checks = console.run(lambda: _examine(app, as_json=as_json))
    failed = sum(check.status == "failed" for check in checks)
    warnings = sum(check.status == "warning" for check in checks)
    if as_json:
        console.show_json([asdict(check) for check in checks])
    else:
        console.out.print(f"{failed} failed, {warnings} to look at")
    raise typer.Exit(Exit.FAILED if failed else Exit.OK)


async def _examine(app: App, *, as_json: bool) -> list[Check]:
    checks = []
    async for check in _checks(app):
        checks.append(check)
        if not as_json:
            console.out.print(f"{MARKS[check.status]} {check.name:<12}{printable(check.detail)}")
            if check.fix:
                console.out.print(f"{'':<14}→ {printable(check.fix)}")
    return checks


async def _checks(app: App) -> AsyncIterator[Check]:
    yield _settings(app)
    async for check in _broker_checks(app):
        yield check
    for check in await _bounded("payloads", _payloads(app)):
        yield check
    for check in await asyncio.to_thread(collector, os.environ):
        yield check


async def _broker_checks(app: App) -> AsyncIterator[Check]:
    """Examine the broker; what needs the shared topology only if that is there."""
    transport = app.connect()
    try:
        reached = await _broker(app, transport)
        yield reached
        if reached.status != "failed":
            for check in await _bounded("topology", _topology(app, transport)):
                yield check
            for name, examine in _IN_PLACE.items():
                if not await _applied(app, transport):
                    return
                for check in await _bounded(name, examine(app, transport)):
                    yield check
    finally:
        await transport.close()


async def _bounded(name: str, examining: Awaitable[list[Check]]) -> list[Check]:
    """Return what an examination found; one that fails or hangs is a finding, too."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT):
            return await examining
    except TimeoutError:
        return [Check(name, "failed", f"no answer within {readable(CHECK_TIMEOUT)}")]
    except BrokertaskError as error:
        return [Check(name, "failed", str(error))]


def _settings(app: App) -> Check:
    settings = app.settings
    url = settings.broker_url()
    if settings.amqp_url is None:
        origin = "the default" if url.startswith("amqp") else "a `brokertask dev` in this folder"
    elif os.environ.get("BROKERTASK_AMQP_URL") == settings.amqp_url:
        origin = "BROKERTASK_AMQP_URL"
    else:
        origin = "set in code"
    return Check("settings", "ok", f"{mask(url)} ({origin}), namespace {settings.namespace}")


async def _broker(app: App, transport: Transport) -> Check:
    settings = app.settings
    try:
        await transport.open(timeout=settings.connect_timeout)
        took = []
        for _ in range(QUESTIONS):
            started = time.perf_counter()
            await transport.depth(settings.names.unrouted)
            took.append(time.perf_counter() - started)
    except BrokertaskError as error:
        return Check("broker", "failed", str(error))
    server = transport.server if isinstance(transport, _Named) else "embedded, for development"
    tls = "on" if settings.broker_url().startswith("amqps:") else "off"
    return Check("broker", "ok", f"{server}, TLS {tls}, answers in {readable(min(took))}")


async def _topology(app: App, transport: Transport) -> list[Check]:
    name, topology = "topology", app.topology()
    try:
        found = await plan(transport, topology)
    except AccessDenied as error:
        if app.settings.declare:
            fix = "give it the right, or have another apply it and set BROKERTASK_DECLARE=false"
            return [Check(name, "failed", str(error), fix)]
        return [Check(name, "warning", "cannot be compared: this user may not configure")]
    if found.mismatches:
        first = found.mismatches[0]
        told = (
            f"{len(found.mismatches)} different, such as {first.name}: {first.argument} is "
            f"{first.found}, not {first.wanted}"
        )
        return [Check(name, "failed", told, "brokertask topology plan says how to mend it")]
    if found.missing:
        told = f"{len(found.missing)} missing, such as {found.missing[0].name}"
        if app.settings.declare:
            return [Check(name, "warning", told, "brokertask topology apply, or start a worker")]
        return [Check(name, "failed", told, "brokertask topology apply")]
    count = len(topology.exchanges) + len(topology.queues)
    return [Check(name, "ok", f"{count} exchanges and queues, 0 differences")]


async def _applied(app: App, transport: Transport) -> bool:
    """Whether the shared topology is there; without it, nothing else can be tried."""
    try:
        return await transport.depth(app.settings.names.unrouted) is not None
    except BrokertaskError:
        return True


async def _publishing(app: App, transport: Transport) -> list[Check]:
    """Publish what nobody takes: it comes back, and nothing is stored."""
    name, exchange = "publishing", app.settings.names.tasks
    route = Route(exchange, NOBODY)
    try:
        await transport.publish(route, Message(body=b""), timeout=PROBE_TIMEOUT)
    except Unroutable:
        return [Check(name, "ok", f"may write to {exchange}")]
    except AccessDenied as error:
        fix = f"rabbitmqctl set_permissions … with {exchange} in its write pattern"
        return [Check(name, "failed", str(error), fix)]
    return [Check(name, "warning", f"{exchange} takes what has no task: something is bound to it")]


async def _results(app: App, transport: Transport) -> list[Check]:
    name, names = "results", app.settings.names
    if not app.settings.results:
        return [Check(name, "ok", "not asked for (BROKERTASK_RESULTS=false)")]
    queue = _own_queue(names.reply(f"doctor-{secrets.token_hex(8)}"))
    binding = Binding(names.events, queue.name, queue.name)
    try:
        listener = await transport.listen(queue, (binding,), lambda _: None)
    except AccessDenied as error:
        fix = f"give it configure, write and read on {names.namespace}.reply.*; or do without"
        return [Check(name, "warning", f"Run.result() will not work: {error}", fix)]
    await listener.close()
    return [Check(name, "ok", "may make a reply queue")]


async def _delays(app: App, transport: Transport) -> list[Check]:
    """Send a message over the shortest delay; its death tells the broker's time."""
    name, names = "delays", app.settings.names
    queue = _own_queue(names.reply(f"doctor-{secrets.token_hex(8)}"))
    arrived: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def receive(message: Message) -> None:
        if not arrived.done():
            arrived.set_result(message)

    try:
        binding = Binding(names.resume, queue.name, queue.name)
        listener = await transport.listen(queue, (binding,), receive)
    except AccessDenied:
        return [Check(name, "warning", "cannot be tried: this user may not bind a queue")]
    route = Route(names.delay, queue.name, (names.rung(SHORTEST_RUNG_MS),))
    sent = time.time()
    try:
        await transport.publish(route, Message(body=b""), timeout=PROBE_TIMEOUT)
        async with asyncio.timeout(PROBE_TIMEOUT):
            message = await arrived
    except Unroutable:
        told = f"{names.rung(SHORTEST_RUNG_MS)} is not bound to {names.delay}"
        return [Check(name, "failed", told, "brokertask topology apply")]
    except TimeoutError:
        told = f"a message with the shortest delay did not come back in {readable(PROBE_TIMEOUT)}"
        fix = f"has queue {names.rung(SHORTEST_RUNG_MS)} a leader? rabbitmqctl list_queues"
        return [Check(name, "failed", told, fix)]
    finally:
        await listener.close()
    took = time.time() - sent
    told = f"{SHORTEST_RUNG_MS} ms took {readable(took)}"
    return [Check(name, "ok", told), *skew("the broker", death_ms(message), sent, sent + took)]


async def _queues(app: App, transport: Transport) -> list[Check]:
    found = await observe(transport, app.settings.names, limits_of(app))
    told = "nothing unrouted"
    if app.tasks:
        told += ", nothing dead, nothing that waits without a worker"
    return [from_finding("queues", one) for one in found] or [Check("queues", "ok", told)]


_IN_PLACE: Final[dict[str, Examine]] = {
    "publishing": _publishing,
    "results": _results,
    "delays": _delays,
    "queues": _queues,
}


async def _payloads(app: App) -> list[Check]:
    """Put a few bytes into the payload store, the same each time, and get them back."""
    name, url = "payloads", app.settings.payload_store
    if url is None:
        return []
    store, started = open_store(url), time.perf_counter()
    await store.get(await store.put(PROBE))
    took = readable(time.perf_counter() - started)
    return [Check(name, "ok", f"{url} takes and gives content, in {took}")]


def _own_queue(name: str) -> Queue:
    # It expires by itself if this process dies before it can delete it.
    return Queue(name, {"x-queue-type": "classic", "x-expires": 60_000})
