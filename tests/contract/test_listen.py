"""A queue of one's own: settled on receipt, gone when closed."""

from __future__ import annotations

import pytest

from brokertask.envelope import Message
from brokertask.transport.base import Transport
from tests.contract.conftest import (
    NAMES,
    SECONDS,
    Connect,
    Inbox,
    own_queue,
    send,
    small,
    until_ready,
)

pytestmark = pytest.mark.anyio

REPLY = NAMES.reply("c1")
EVENT = NAMES.event_route("run.completed", "a", reply_to=REPLY)


async def test_a_listener_hears_what_its_bindings_route(connect: Connect) -> None:
    listening, publishing = await connect(), await connect()
    await publishing.declare(small())
    inbox = Inbox[Message]()
    await listening.listen(*own_queue(REPLY, REPLY), inbox)
    for number in range(50):
        message = Message(body=b"%d" % number, headers={"bt-seq": number})
        await publishing.publish(EVENT, message, timeout=SECONDS)
    await publishing.publish(
        NAMES.event_route("run.completed", "a"), Message(body=b""), timeout=SECONDS, mandatory=False
    )
    heard = await inbox.take(50)
    assert [message.body for message in heard] == [b"%d" % number for number in range(50)]
    assert heard[7].headers == {"bt-seq": 7}
    await until_ready(publishing, 0, REPLY)
    assert len(inbox) == 0


async def test_what_was_heard_is_settled(connect: Connect) -> None:
    listening, other = await connect(), await connect()
    await other.declare(small())
    inbox = Inbox[Message]()
    listener = await listening.listen(*own_queue(REPLY, REPLY), inbox)
    await other.publish(EVENT, Message(body=b"1"), timeout=SECONDS)
    await inbox.next()
    await listener.stop()
    await until_ready(other, 0, REPLY)
    await listener.close()


async def test_a_closed_listener_leaves_nothing(connect: Connect) -> None:
    listening, other = await connect(), await connect()
    await other.declare(small())
    inbox = Inbox[Message]()
    listener = await listening.listen(*own_queue(REPLY, REPLY), inbox)
    await listener.close()
    assert await other.depth(REPLY) is None
    await other.publish(EVENT, Message(body=b"1"), timeout=SECONDS, mandatory=False)
    await send(other, b"1")
    await until_ready(other, 1)
    assert len(inbox) == 0


async def test_two_listeners_hear_their_own(transport: Transport) -> None:
    await transport.declare(small())
    inboxes = {name: Inbox[Message]() for name in ("c1", "c2")}
    for name, inbox in inboxes.items():
        await transport.listen(*own_queue(NAMES.reply(name), NAMES.reply(name)), inbox)
    for name in inboxes:
        route = NAMES.event_route("run.completed", "a", reply_to=NAMES.reply(name))
        await transport.publish(route, Message(body=name.encode()), timeout=SECONDS)
    for name, inbox in inboxes.items():
        assert (await inbox.next()).body == name.encode()
        assert len(inbox) == 0
