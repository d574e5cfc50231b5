"""A stream: all that it holds, in order, each once, for everybody who follows it."""

from __future__ import annotations

import pytest

from brokertask.envelope import Message
from brokertask.errors import ConfigurationError
from brokertask.topology import Route
from brokertask.transport.base import OFFSET, Transport
from tests.contract.conftest import NAMES, SECONDS, Connect, Cut, Inbox, send_when_routed, small

pytestmark = pytest.mark.anyio

LOG = NAMES.control
ROUTE = NAMES.control_route()


async def write(transport: Transport, *numbers: int) -> None:
    for number in numbers:
        message = Message(body=b"%d" % number, type="note", headers={"bt-seq": number})
        await transport.publish(ROUTE, message, timeout=SECONDS)


def numbers(messages: list[Message]) -> list[int]:
    return [int(message.body) for message in messages]


async def test_who_follows_gets_what_was_before_and_what_comes(connect: Connect) -> None:
    writing, reading = await connect(), await connect()
    await writing.declare(small())
    await write(writing, *range(20))
    inbox = Inbox[Message]()
    await reading.follow(LOG, inbox)
    assert numbers(await inbox.take(20)) == list(range(20))
    await write(writing, *range(20, 40))
    heard = await inbox.take(20)
    assert numbers(heard) == list(range(20, 40))
    assert heard[0].type == "note"
    assert heard[0].headers["bt-seq"] == 20
    assert len(inbox) == 0


async def test_what_is_read_stays_for_others(connect: Connect) -> None:
    first, second = await connect(), await connect()
    await first.declare(small())
    inboxes = [Inbox[Message](), Inbox[Message]()]
    await first.follow(LOG, inboxes[0])
    await write(first, *range(10))
    assert numbers(await inboxes[0].take(10)) == list(range(10))
    await second.follow(LOG, inboxes[1])
    assert numbers(await inboxes[1].take(10)) == list(range(10))


async def test_a_lost_connection_leaves_no_gap_and_repeats_nothing(
    connect: Connect, cut: Cut
) -> None:
    transport = await connect()
    await transport.declare(small())
    inbox = Inbox[Message]()
    await transport.follow(LOG, inbox)
    await write(transport, *range(10))
    assert numbers(await inbox.take(10)) == list(range(10))
    await cut()
    await write(await connect(), *range(10, 30))
    assert numbers(await inbox.take(20)) == list(range(10, 30))
    assert len(inbox) == 0


async def test_more_than_is_sent_ahead(transport: Transport) -> None:
    await transport.declare(small())
    await write(transport, *range(1_200))
    inbox = Inbox[Message]()
    await transport.follow(LOG, inbox)
    assert numbers(await inbox.take(1_200)) == list(range(1_200))


async def test_it_can_begin_behind_an_offset(transport: Transport) -> None:
    await transport.declare(small())
    await write(transport, *range(10))
    inbox = Inbox[Message]()
    await transport.follow(LOG, inbox)
    offset = (await inbox.take(5))[-1].headers[OFFSET]
    assert isinstance(offset, int)
    later = Inbox[Message]()
    await transport.follow(LOG, later, after=offset)
    assert numbers(await later.take(5)) == [5, 6, 7, 8, 9]


async def test_a_closed_follower_hears_nothing_more(transport: Transport) -> None:
    await transport.declare(small())
    inboxes = [Inbox[Message](), Inbox[Message]()]
    followers = [await transport.follow(LOG, inbox) for inbox in inboxes]
    await write(transport, 1)
    for inbox in inboxes:
        await inbox.next()
    await followers[0].close()
    await write(transport, 2)
    assert (await inboxes[1].next()).body == b"2"
    assert len(inboxes[0]) == 0
    assert transport.connected


async def test_a_deleted_stream_is_made_anew_and_followed(
    transport: Transport, connect: Connect
) -> None:
    await transport.declare(small())
    inbox = Inbox[Message]()
    await transport.follow(LOG, inbox)
    await write(transport, 1)
    await inbox.next()
    other = await connect()
    await other.delete(LOG)
    await send_when_routed(other, ROUTE, b"2")
    assert (await inbox.next()).body == b"2"


async def test_there_must_be_a_stream(transport: Transport) -> None:
    await transport.declare(small())
    with pytest.raises(ConfigurationError, match=r"bt\.nothing"):
        await transport.follow("bt.nothing", Inbox[Message]())
    assert await transport.depth(LOG) is not None
    await transport.publish(Route(LOG, "any key"), Message(body=b"7"), timeout=SECONDS)
