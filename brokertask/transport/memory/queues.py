"""Exchanges and queues of the embedded broker, driven by the arguments RabbitMQ gets."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, cast

import msgpack

from brokertask.clock import Clock, Timer
from brokertask.envelope import Message
from brokertask.topology import Argument, Exchange, Queue


@dataclass(frozen=True, slots=True)
class Parcel:
    """A published message; its headers are packed, so that no two readers share them."""

    message: Message
    headers: bytes
    exchange: str
    keys: tuple[str, ...]


@dataclass(slots=True)
class Item:
    """A parcel's place in one queue."""

    parcel: Parcel
    place: int
    expires_ms: int | None
    lost: int = 0

    def message(self) -> Message:
        """Return the message as it is delivered."""
        headers = msgpack.unpackb(self.parcel.headers)
        if self.lost:
            headers["x-delivery-count"] = self.lost
        return replace(self.parcel.message, headers=headers)


class Reader(Protocol):
    """Who takes items from a queue."""

    @property
    def free(self) -> bool:
        """It has room for one more."""
        ...

    def deliver(self, item: Item) -> None:
        """Take it, until it is settled or given back."""
        ...


class Host(Protocol):
    """What a queue needs of its broker."""

    @property
    def clock(self) -> Clock:
        """Where expiry is read from."""
        ...

    @property
    def up(self) -> bool:
        """Messages may move."""
        ...

    def delete(self, name: str) -> None:
        """Delete a queue that has expired."""
        ...

    def forward(self, parcel: Parcel) -> bool:
        """Store a dead letter in every queue it is routed to; False: some or none takes it."""
        ...

    def retry(self) -> None:
        """Try again what no target took, now that there may be room."""
        ...


class StoredQueue:
    """One quorum queue: what is ready, in order, who reads it, and what is due when."""

    def __init__(self, host: Host, queue: Queue) -> None:
        self.name = queue.name
        self.arguments = dict(queue.arguments)
        self.ready: deque[Item] = deque()
        self.readers: deque[Reader] = deque()
        self.deleted = False
        self._host = host
        self._ttl = self._limit("x-message-ttl")
        self._max_length = self._limit("x-max-length")
        self._delivery_limit = self._limit("x-delivery-limit")
        self._lease = self._limit("x-expires")
        self._unused_since_ms = 0
        self._stuck: list[tuple[Item, str]] = []
        self._places = 0
        self._timer: Timer | None = None
        self._timer_ms: int | None = None
        self.renew()

    def _limit(self, name: str) -> int | None:
        value = self.arguments.get(name)
        return None if value is None else int(value)

    @property
    def full(self) -> bool:
        """It refuses what is published to it."""
        return self._over(1) and self.arguments.get("x-overflow") == "reject-publish"

    def _over(self, more: int) -> bool:
        return self._max_length is not None and len(self.ready) + more > self._max_length

    def add(self, parcel: Parcel) -> None:
        """Store a message at the end."""
        now_ms = 0 if self._ttl is None else self._host.clock.now_ms()
        self._places += 1
        self.ready.append(
            Item(parcel, self._places, None if self._ttl is None else now_ms + self._ttl)
        )
        self.pump()
        while self._over(0):
            self._bury(self.ready.popleft(), "maxlen")

    def renew(self) -> None:
        """Begin the time anew after which a queue without readers expires."""
        if self._lease is not None:
            self._unused_since_ms = self._host.clock.now_ms()

    def join(self, reader: Reader) -> None:
        """Let `reader` take items, in turn with the others."""
        if reader not in self.readers:
            self.readers.append(reader)
        self.pump()

    def leave(self, reader: Reader) -> None:
        """Give it nothing more; nothing happens if it was not reading."""
        if reader in self.readers:
            self.readers.remove(reader)
            self.renew()
            self.pump()

    def end(self) -> None:
        """Be deleted, with everything in it."""
        self.deleted = True
        self.ready.clear()
        self.readers.clear()
        self._stuck.clear()
        self.cancel_timer()

    def give_back(self, items: list[Item]) -> None:
        """Count a lost delivery for each and put them where they were; `pump` has to follow."""
        index = 0
        for item in sorted(items, key=lambda item: item.place):
            item.lost += 1
            if self._delivery_limit is not None and item.lost > self._delivery_limit:
                self._bury(item, "delivery_limit")
                continue
            while index < len(self.ready) and self.ready[index].place < item.place:
                index += 1
            self.ready.insert(index, item)

    def pump(self) -> None:
        """Expire what is due, deliver while somebody has room, and see to the next expiry."""
        if self.deleted or not self._host.up:
            return
        expires_ms = self._expires_ms()
        if expires_ms is not None and expires_ms <= self._host.clock.now_ms():
            self._host.delete(self.name)
            return
        before = len(self.ready)
        while self.ready:
            due_ms = self.ready[0].expires_ms
            if due_ms is not None and due_ms <= self._host.clock.now_ms():
                self._bury(self.ready.popleft(), "expired")
            elif (reader := self._free_reader()) is not None:
                reader.deliver(self.ready.popleft())
            else:
                break
        due_ms = self.ready[0].expires_ms if self.ready else None
        self._set_timer(_earlier(due_ms, expires_ms))
        if self._max_length is not None and len(self.ready) < before:
            self._host.retry()

    def retry(self) -> None:
        """Try again what no dead-letter target took."""
        stuck, self._stuck = self._stuck, []
        for item, reason in stuck:
            self._bury(item, reason)

    def cancel_timer(self) -> None:
        """Let nothing more expire by itself."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_ms = None

    def _expires_ms(self) -> int | None:
        unused = self._lease is not None and not self.readers
        return self._unused_since_ms + (self._lease or 0) if unused else None

    def _free_reader(self) -> Reader | None:
        for _ in range(len(self.readers)):
            self.readers.rotate(-1)
            if self.readers[-1].free:
                return self.readers[-1]
        return None

    def _set_timer(self, due_ms: int | None) -> None:
        if due_ms == self._timer_ms:
            return
        self.cancel_timer()
        if due_ms is not None:
            clock = self._host.clock
            self._timer_ms = due_ms
            self._timer = clock.call_later(max(0, due_ms - clock.now_ms()) / 1000, self._ring)

    def _ring(self) -> None:
        self._timer = self._timer_ms = None
        self.pump()

    def _bury(self, item: Item, reason: str) -> None:
        exchange = self.arguments.get("x-dead-letter-exchange")
        if exchange is None:
            return
        key = self.arguments.get("x-dead-letter-routing-key")
        parcel = Parcel(
            item.parcel.message,
            self._death(item.parcel, reason),
            str(exchange),
            item.parcel.keys if key is None else (str(key),),
        )
        kept = self.arguments.get("x-dead-letter-strategy") == "at-least-once"
        if not self._host.forward(parcel) and kept:
            self._stuck.append((item, reason))

    def _death(self, parcel: Parcel, reason: str) -> bytes:
        headers = msgpack.unpackb(parcel.headers)
        earlier = headers.get("x-death", [])
        same = [one for one in earlier if (one["queue"], one["reason"]) == (self.name, reason)]
        death = {
            "count": 1 + sum(one["count"] for one in same),
            "reason": reason,
            "queue": self.name,
            "time": self._host.clock.now_ms() // 1000 * 1000,
            "exchange": parcel.exchange,
            "routing-keys": list(parcel.keys),
        }
        headers["x-death"] = [death, *(one for one in earlier if one not in same)]
        for part in ("reason", "queue", "exchange"):
            headers.setdefault(f"x-first-death-{part}", death[part])
        return cast("bytes", msgpack.packb(headers))


def _earlier(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


class StoredExchange:
    """One exchange and its bindings: queues by key or pattern."""

    def __init__(self, exchange: Exchange) -> None:
        self.arguments: dict[str, Argument] = {"type": exchange.kind, **exchange.arguments}
        self._kind = exchange.kind
        self._bound: dict[str, dict[str, StoredQueue]] = {}

    def bind(self, key: str, queue: StoredQueue) -> None:
        """Deliver to `queue` what carries `key`."""
        self._bound.setdefault(key, {})[queue.name] = queue

    def unbind(self, key: str, queue: str) -> None:
        """Undo it; nothing happens if it was not bound."""
        self._bound.get(key, {}).pop(queue, None)
        if not self._bound.get(key, True):
            del self._bound[key]

    def forget(self, queue: str) -> None:
        """Undo every binding of a queue."""
        for key in list(self._bound):
            self.unbind(key, queue)

    def route(self, keys: tuple[str, ...]) -> dict[str, StoredQueue]:
        """Return the queues for `keys`, each once however many keys match."""
        found: dict[str, StoredQueue] = {}
        for key in keys:
            if self._kind == "direct":
                found.update(self._bound.get(key, {}))
                continue
            for pattern, queues in self._bound.items():
                if self._kind == "fanout" or _matches(pattern, key):
                    found.update(queues)
        return found


@lru_cache(maxsize=4_096)
def _matches(pattern: str, key: str) -> bool:
    return _words_match(pattern.split("."), key.split(".") if key else [])


def _words_match(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_words_match(pattern[1:], words[at:]) for at in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _words_match(pattern[1:], words[1:])
