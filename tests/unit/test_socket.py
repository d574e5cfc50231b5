"""The socket of `brokertask dev`: who may use it, restarts of the server, and hostile bytes."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from pathlib import Path

import msgpack
import pytest

from brokertask.envelope import Message
from brokertask.errors import (
    BrokerBlocked,
    BrokertaskError,
    BrokerUnavailable,
    ConfigurationError,
    PayloadTooLarge,
    PublishUnknown,
    TopologyMismatch,
)
from brokertask.topology import (
    Binding,
    Names,
    Queue,
    QueueOptions,
    TaskQueue,
    Topology,
    topology,
)
from brokertask.transport.base import Delivery, Depth
from brokertask.transport.memory import MemoryBroker
from brokertask.transport.socket import SocketTransport, serve
from brokertask.transport.socket.frames import MAX_FRAME, pack, unpack_error

pytestmark = pytest.mark.anyio

NAMES = Names()
WORK = NAMES.queue("a")
TRIGGER = NAMES.trigger_route("a")
WHOLE = topology(NAMES, [TaskQueue("a")])
RUN = Message(body=b"1", message_id="r-1")
SECONDS = 10.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "dev.sock"


def mode(path: Path) -> str | None:
    return stat.filemode(path.stat().st_mode) if path.exists() else None


async def test_only_this_user_can_open_it(path: Path) -> None:
    async with await serve(MemoryBroker(), path):
        assert mode(path) == "srw-------"
        assert mode(path.parent) == "drwx------"
    assert mode(path) is None


async def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        await serve(MemoryBroker(), tmp_path / "dev.sock")


async def test_a_live_socket_is_refused_and_stays(path: Path) -> None:
    async with await serve(MemoryBroker(), path):
        with pytest.raises(ConfigurationError, match="already listens"):
            await serve(MemoryBroker(), path)
        client = SocketTransport(path)
        await client.open(timeout=SECONDS)
        await client.close()


async def test_a_stale_socket_is_replaced(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with await serve(MemoryBroker(), path):
        client = SocketTransport(path)
        await client.open(timeout=SECONDS)
        await client.close()


async def test_a_file_is_not_overwritten(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    os.mknod(path, 0o600)
    with pytest.raises(ConfigurationError, match="no socket"):
        await serve(MemoryBroker(), path)
    assert mode(path) == "-rw-------"


async def test_a_path_too_long_for_a_socket_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen"):
        await serve(MemoryBroker(), tmp_path / ("x" * 120))


async def test_without_a_server_there_is_no_connection(path: Path) -> None:
    client = SocketTransport(path)
    with pytest.raises(BrokerUnavailable, match="brokertask dev"):
        await client.open(timeout=0.05)
    with pytest.raises(BrokerUnavailable):
        await client.publish(TRIGGER, RUN, timeout=0.05)
    await client.close()
    async with asyncio.timeout(SECONDS / 2):
        with pytest.raises(BrokerUnavailable):
            await client.publish(TRIGGER, RUN, timeout=SECONDS)


async def test_a_client_survives_a_restart_of_the_server(path: Path) -> None:
    received: asyncio.Queue[Delivery] = asyncio.Queue()
    heard: asyncio.Queue[Message] = asyncio.Queue()
    reply = NAMES.reply("c1")
    client = SocketTransport(path)
    async with await serve(MemoryBroker(), path):
        await client.open(timeout=SECONDS)
        await client.declare(WHOLE)
        await client.consume(WORK, received.put_nowait, prefetch=1)
        await client.listen(Queue(reply), (Binding(NAMES.events, reply, reply),), heard.put_nowait)
        await client.publish(TRIGGER, RUN, timeout=SECONDS)
        async with asyncio.timeout(SECONDS):
            first = await received.get()
        assert first.live
    assert not first.live
    assert not client.connected
    async with await serve(MemoryBroker(), path):
        await client.publish(TRIGGER, RUN, timeout=SECONDS)
        event = NAMES.event_route("run.completed", "a", reply_to=reply)
        await client.publish(event, RUN, timeout=SECONDS)
        async with asyncio.timeout(SECONDS):
            again = await received.get()
            assert (await heard.get()).message_id == "r-1"
        assert client.connected
        assert again.live
        await first.ack()
        await again.ack()
        await client.close()


async def test_a_restarted_server_is_told_what_still_holds(path: Path) -> None:
    broker = MemoryBroker()
    client = SocketTransport(path)
    other = Names("other")
    async with await serve(MemoryBroker(), path):
        await client.open(timeout=SECONDS)
        await client.declare(WHOLE)
        await client.declare(topology(other, [TaskQueue("b")]))
        with pytest.raises(TopologyMismatch):
            await client.declare(topology(NAMES, [TaskQueue("a", QueueOptions(delivery_limit=7))]))
        paused = await client.consume(WORK, lambda _: None, prefetch=1)
        await paused.limit(0)
        await client.delete(NAMES.dead_queue("a"))
    await paused.limit(3)
    await paused.limit(0)
    async with await serve(broker, path):
        await client.publish(TRIGGER, RUN, timeout=SECONDS)
        assert await client.depth(WORK) == Depth(ready=1, consumers=0)
        assert await client.depth(other.queue("b")) == Depth(ready=0, consumers=0)
        assert await client.depth(NAMES.dead_queue("a")) is None
        await paused.limit(1)
        assert await client.depth(WORK) == Depth(ready=0, consumers=1)
        await client.close()


async def test_a_dead_client_gives_back_what_it_held(path: Path) -> None:
    broker = MemoryBroker()
    received: asyncio.Queue[Delivery] = asyncio.Queue()
    async with await serve(broker, path):
        dying, other = SocketTransport(path), SocketTransport(path)
        for client in (dying, other):
            await client.open(timeout=SECONDS)
            await client.declare(WHOLE)
        await dying.consume(WORK, received.put_nowait, prefetch=1)
        await other.publish(TRIGGER, RUN, timeout=SECONDS)
        async with asyncio.timeout(SECONDS):
            await received.get()
            await dying.close()
            await other.consume(WORK, received.put_nowait, prefetch=1)
            assert (await received.get()).lost == 1
        await other.close()


async def test_a_publish_cut_off_is_unknown(path: Path) -> None:
    broker = MemoryBroker()
    client = SocketTransport(path)
    async with await serve(broker, path):
        await client.open(timeout=SECONDS)
        await client.declare(WHOLE)
        broker.block()
        waiting = asyncio.create_task(client.publish(TRIGGER, RUN, timeout=SECONDS))
        await asyncio.sleep(0)
        # The answer to a later question: the server has read the publish before it.
        assert await client.depth(WORK) == Depth(ready=0, consumers=0)
        assert not waiting.done()
    with pytest.raises(PublishUnknown):
        await waiting
    await client.close()


async def test_errors_keep_class_text_and_doubt(path: Path) -> None:
    broker = MemoryBroker()
    client = SocketTransport(path)
    async with await serve(broker, path):
        await client.open(timeout=SECONDS)
        await client.declare(WHOLE)
        broker.block()
        with pytest.raises(BrokerBlocked, match="alarm") as caught:
            await client.publish(TRIGGER, RUN, timeout=0.02)
        assert caught.value.unknown is False
        assert await client.depth(WORK) is not None
        await client.close()


async def test_an_unknown_error_class_is_never_looked_up() -> None:
    for name in ("SystemExit", "BrokertaskError", "os.system", "__import__"):
        assert type(unpack_error([name, "text", False])) is BrokertaskError


def _frame(value: object) -> bytes:
    data = msgpack.packb(value) or b""
    return struct.pack(">I", len(data)) + data


@pytest.mark.parametrize(
    "hostile",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", MAX_FRAME + 1),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        _frame([1, "__init__", []]),
        _frame([1, "run", []]),
        _frame([1, "depth", []]),
        _frame([1, "close", [99]]),
        _frame([1, ["publish"], []]),
        _frame([1, "publish", [5, 5, 5, 5]]),
        _frame([1, "publish", [["e", "k", []], [b""], 1, True]]),
        _frame([1, "stop", [[]]]),
        _frame({"a": 1}),
        _frame([1, "declare", [{"exchanges": 5}]]),
        _frame(None),
    ],
    ids=lambda hostile: repr(hostile[:24]),
)
async def test_nonsense_ends_only_its_own_connection(path: Path, hostile: bytes) -> None:
    async with await serve(MemoryBroker(), path):
        client = SocketTransport(path)
        await client.open(timeout=SECONDS)
        await client.declare(WHOLE)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(hostile)
        async with asyncio.timeout(SECONDS):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        await client.publish(TRIGGER, RUN, timeout=SECONDS)
        assert client.connected
        await client.close()


async def test_an_oversized_message_is_refused_before_it_is_sent(path: Path) -> None:
    async with await serve(MemoryBroker(), path):
        client = SocketTransport(path)
        await client.open(timeout=SECONDS)
        with pytest.raises(PayloadTooLarge):
            await client.publish(TRIGGER, Message(body=bytes(MAX_FRAME)), timeout=SECONDS)
        await client.declare(Topology((), (Queue("q"),), ()))
        assert client.connected
        await client.close()


async def test_the_umask_is_put_back(path: Path) -> None:
    before = os.umask(0o022)
    try:
        async with await serve(MemoryBroker(), path):
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_frame_says_how_long_it_is() -> None:
    assert pack([1]) == b"\x00\x00\x00\x02\x91\x01"
