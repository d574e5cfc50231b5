"""What is of RabbitMQ alone: TLS, the event loops of workers and tests, and its two data planes."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from brokertask.envelope import Message
from brokertask.settings import DataPlane
from brokertask.transport.rabbitmq import RabbitTransport
from brokertask.transport.rabbitmq.tap import Tap
from tests.contract.conftest import SECONDS, TRIGGER, consume, ready, small

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize(
        "anyio_backend",
        [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
        ids=["asyncio", "uvloop"],
    ),
]
each_data_plane = pytest.mark.parametrize("data_plane", ["direct", "aio-pika"])
SIZES = (0, 100, 131_064, 131_065, 1_048_576)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 with its key, signed by itself."""
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    name = ["-addext", "subjectAltName=IP:127.0.0.1"]
    made = subprocess.run(
        [*command.split(), *name, "-keyout", str(file), "-out", f"{file}.crt"],
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr.decode()
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


@asynccontextmanager
async def behind_tls(url: str, certificate: Path) -> AsyncIterator[str]:
    """Stand in front of the broker of `url`, and speak TLS; yields the URL to use."""
    broker = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    pumps = set[asyncio.Task[Any]]()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, onwards = await asyncio.open_connection(broker.hostname, broker.port)
        for each in (pump(reader, onwards), pump(answers, writer)):
            pumps.add(asyncio.ensure_future(each))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    login = broker.netloc.rpartition("@")[0]
    query = f"cafile={certificate}"
    yield broker._replace(scheme="amqps", netloc=f"{login}@127.0.0.1:{port}", query=query).geturl()
    server.close()
    await asyncio.gather(*pumps, return_exceptions=True)


async def round_trip(transport: RabbitTransport) -> None:
    """Send messages of all sizes at once, and take them."""
    await transport.open(timeout=SECONDS)
    await transport.declare(small())
    bodies = [bytes([number]) * size for number, size in enumerate(SIZES)]
    await asyncio.gather(
        *(transport.publish(TRIGGER, Message(body=body), timeout=SECONDS) for body in bodies)
    )
    work = await consume(transport, prefetch=3)
    for _ in bodies:
        delivery = await work.next()
        bodies.remove(delivery.message.body)
        await delivery.ack()
        if not bodies:
            break
    await transport.close()


@each_data_plane
async def test_messages_of_any_size_over_tls(
    amqp_url: str, certificate: Path, data_plane: DataPlane
) -> None:
    async with behind_tls(amqp_url, certificate) as url:
        await round_trip(RabbitTransport(url, data_plane=data_plane))


@each_data_plane
async def test_messages_of_any_size(amqp_url: str, data_plane: DataPlane) -> None:
    await round_trip(RabbitTransport(amqp_url, data_plane=data_plane))


def counting(counts: list[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(name)
        return method(*args, **kwargs)

    return counted


async def test_many_acks_and_publishes_share_few_writes(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would aio-pika not let the tap in any more, nothing would fail but this."""
    counts: list[str] = []
    monkeypatch.setattr(Tap, "write", counting(counts, "frames", Tap.write))
    monkeypatch.setattr(Tap, "flush", counting(counts, "write", Tap.flush))
    transport = RabbitTransport(amqp_url)
    await transport.open(timeout=SECONDS)
    await transport.declare(small())
    await asyncio.gather(
        *(transport.publish(TRIGGER, Message(body=b"x"), timeout=SECONDS) for _ in range(500))
    )
    assert counts.count("frames") >= 500
    assert counts.count("write") < 50
    work = await consume(transport, prefetch=500)
    held = await work.take(500)
    counts.clear()
    for delivery in held:
        await delivery.ack()
    other = RabbitTransport(amqp_url)
    await transport.close()
    # One range for all of them.
    assert counts.count("frames") <= 3
    await other.open(timeout=SECONDS)
    assert await ready(other) == 0
    await other.close()
