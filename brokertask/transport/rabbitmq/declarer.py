"""The topology on a live broker: making it, and comparing it with the code."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

from aiormq.abc import AbstractChannel
from aiormq.exceptions import (
    AMQPError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)

from brokertask.errors import AccessDenied, BrokerUnavailable, TopologyMismatch
from brokertask.topology import Binding, Exchange, Queue, Topology
from brokertask.transport.base import Difference
from brokertask.transport.rabbitmq.link import Link
from brokertask.transport.rabbitmq.waiting import close_quietly, describe, raise_if_cancelled

Item = TypeVar("Item")
Answer = TypeVar("Answer")

RPC_TIMEOUT: Final = 60.0
CHANNELS: Final = 8
"""Declaring a quorum queue takes the broker 5 to 100 ms; so many at a time."""


class Declarer:
    """Asks one thing at a time on throwaway channels, as a refusal closes the channel."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def declare(self, topology: Topology, *, timeout: float) -> None:
        """See `Transport.declare`."""
        mismatches: list[str] = []

        async def make(channel: AbstractChannel, item: Exchange | Queue) -> None:
            try:
                await declare_one(channel, item)
            except ChannelPreconditionFailed as error:
                mismatches.append(describe(error))

        await self._each(topology.exchanges, make, timeout)
        await self._each(topology.queues, make, timeout)
        await self._each(topology.bindings, _bind, timeout)
        await self._each(topology.absent_bindings, _unbind, timeout)
        if mismatches:
            raise TopologyMismatch(
                "the broker differs from the code in what cannot be changed: "
                f"{'; '.join(mismatches)}. `brokertask topology plan` says how to mend it"
            )

    async def compare(self, topology: Topology, *, timeout: float) -> list[Difference]:
        """See `Transport.compare`."""
        differences: list[Difference] = []

        async def look(channel: AbstractChannel, item: Exchange | Queue) -> None:
            try:
                await _passive(channel, item)
                # It exists, so declaring it again changes nothing and tells whether it is equal.
                await declare_one(channel, item)
            except ChannelNotFoundEntity:
                differences.append(Difference(item, missing=True))
            except ChannelPreconditionFailed as error:
                differences.append(Difference(item, missing=False, detail=describe(error)))

        items: list[Exchange | Queue] = [*topology.exchanges, *topology.queues]
        await self._each(items, look, timeout)
        return sorted(differences, key=lambda difference: difference.item.name)

    async def ask(
        self, question: Callable[[AbstractChannel], Awaitable[Answer]], *, timeout: float
    ) -> Answer | None:
        """Return the answer to a question on a channel of its own; None if it asks for nothing."""
        channel = await self._link.channel(confirms=False, timeout=timeout)
        try:
            return await question(channel)
        except ChannelNotFoundEntity:
            return None
        except (AMQPError, OSError, RuntimeError, TimeoutError, asyncio.CancelledError) as error:
            raise _translated(error) from error
        finally:
            await close_quietly(channel)

    async def _each(
        self,
        items: Iterable[Item],
        action: Callable[[AbstractChannel, Item], Awaitable[None]],
        timeout: float,
    ) -> None:
        """Do `action` for each item, on a few channels at a time."""
        waiting = list(items)
        waiting.reverse()

        async def work() -> None:
            channel: AbstractChannel | None = None
            try:
                while waiting:
                    item = waiting.pop()
                    if channel is None or channel.is_closed:
                        channel = await self._link.channel(confirms=False, timeout=timeout)
                    await action(channel, item)
            except (
                AMQPError,
                OSError,
                RuntimeError,
                TimeoutError,
                asyncio.CancelledError,
            ) as error:
                # The others end with what they are at: an RPC cut short costs the connection.
                waiting.clear()
                raise _translated(error) from error
            finally:
                if channel is not None:
                    await close_quietly(channel)

        workers = [asyncio.ensure_future(work()) for _ in range(min(CHANNELS, len(waiting)))]
        try:
            ended = await asyncio.gather(*workers, return_exceptions=True)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error


def _translated(error: BaseException) -> Exception:
    if isinstance(error, asyncio.CancelledError):
        raise_if_cancelled(error)
    if isinstance(error, ChannelAccessRefused):
        return AccessDenied(
            f"{describe(error)}. This user may not configure the broker: run `brokertask topology "
            "apply` as one who may, and set BROKERTASK_DECLARE=false here"
        )
    return BrokerUnavailable(f"the connection was lost: {describe(error)}")


async def declare_one(channel: AbstractChannel, item: Exchange | Queue) -> None:
    """Declare a durable exchange or queue."""
    if isinstance(item, Exchange):
        await channel.exchange_declare(
            item.name,
            exchange_type=item.kind,
            durable=True,
            arguments=dict(item.arguments),
            timeout=RPC_TIMEOUT,
        )
    else:
        await channel.queue_declare(
            item.name, durable=True, arguments=dict(item.arguments), timeout=RPC_TIMEOUT
        )


async def _passive(channel: AbstractChannel, item: Exchange | Queue) -> None:
    if isinstance(item, Exchange):
        await channel.exchange_declare(item.name, passive=True, timeout=RPC_TIMEOUT)
    else:
        await channel.queue_declare(item.name, passive=True, timeout=RPC_TIMEOUT)


async def _bind(channel: AbstractChannel, binding: Binding) -> None:
    await channel.queue_bind(binding.queue, binding.exchange, binding.key, timeout=RPC_TIMEOUT)


async def _unbind(channel: AbstractChannel, binding: Binding) -> None:
    await channel.queue_unbind(binding.queue, binding.exchange, binding.key, timeout=RPC_TIMEOUT)
