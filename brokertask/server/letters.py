"""What a job does to dead letters: it redrives or discards those of its runs, queue by queue.

    redrive   `sent` and its new start in the outbox ──► the dead letter is acked ──► `done`
    discard   `sent` ──► the dead letter is acked ──► `done`

A crash leaves items `sent`. Of a redrive, the dead letter is acked then, and nothing published
again; one that died once more meanwhile is another one, and stays. Of a discard, it is discarded
then; or it is gone, and so it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Final

from brokertask.deadletter import DeadLetter, Filter
from brokertask.deadletters import Result, Selection, Send
from brokertask.envelope import Message
from brokertask.errors import BrokertaskError, StoreUnavailable
from brokertask.server import bulk
from brokertask.server.bulk import Item, Job
from brokertask.server.grip import Grip
from brokertask.server.resources import Resources
from brokertask.topology import Route

LOOKS: Final = 3
"""How often a dead letter is looked for: what another reader gave back comes a moment later."""
CROWDED_LOOKS: Final = 20
"""The same, while there are other readers, who may hold it."""
BREATH: Final = 0.5


class Letters:
    """Acts on the dead letters of one job."""

    def __init__(self, resources: Resources, job: Job, grip: Grip) -> None:
        self._resources = resources
        self._job = job
        self._grip = grip
        self._looks: dict[int, int] = {}

    async def redrive(self, items: Sequence[Item]) -> None:
        """Redrive the runs of items, all of one task; those that are `sent` are finished.

        Raises:
            StoreUnavailable, BrokerUnavailable: What is not done is as it was.
        """
        by_id = {item.run_id: item for item in items}
        gone: list[StoreUnavailable] = []

        async def send(letter: DeadLetter, route: Route, message: Message) -> None:
            try:
                await self._send(by_id[letter.run_id], letter, route, message)
            except StoreUnavailable as error:
                gone.append(error)
                raise

        refused: dict[str, Result] = {}
        async with self._selection(items, send) as found:
            redriving = found.redrive(forget=bool(self._job.options.get("forget")))
            async with aclosing(redriving):
                async for result in redriving:
                    if gone:
                        raise gone[0]
                    if result.status == "redriven":
                        await self._move(by_id[result.letter.run_id], "done")
                    elif result.status == "failed":
                        refused[result.letter.run_id] = result
                    if not await self._grip.turn():
                        break
            self._resources.outbox.poke()
            # Not before all were tried: of two dead letters of a run, one is refused.
            for run_id, result in refused.items() if self._grip.held else ():
                await self._refuse(by_id[run_id], result)
            await self._missed(found, by_id)

    async def discard(self, items: Sequence[Item]) -> None:
        """Discard the runs of items, all of one task. Raises what `redrive` does."""
        by_id = {item.run_id: item for item in items}
        async with self._selection(items, None) as found:
            held = [by_id[letter.run_id] for letter in found.letters]
            if self._job.aborting:
                await self._give_back(held)
            else:
                await self._begin(held)
                discarding = found.discard(self._job.reason)
                async with aclosing(discarding):
                    async for result in discarding:
                        if result.status == "discarded":
                            await self._discarded(by_id[result.letter.run_id])
                        if not await self._grip.turn():
                            break
                # Not begun with after all; those that are done stay so.
                await self._give_back(held)
            await self._missed(found, by_id)

    def _selection(
        self, items: Sequence[Item], send: Send | None
    ) -> AbstractAsyncContextManager[Selection]:
        resources = self._resources
        return Selection.open(
            resources.transport,
            resources.broker_settings,
            [items[0].task],
            Filter(run_ids=frozenset(item.run_id for item in items)),
            clock=resources.clock,
            claims=resources.claims,
            send=send,
        )

    async def _send(self, item: Item, letter: DeadLetter, route: Route, message: Message) -> None:
        """Have a run begin anew once, whoever else is at it; then its dead letter may go."""
        resources, now_ms = self._resources, self._resources.clock.now_ms()
        async with resources.store.begin() as connection:
            if await bulk.move(
                connection,
                item,
                "sent",
                now_ms=now_ms,
                before=["waiting"],
                redrives=letter.redrives,
            ):
                await resources.outbox.add(connection, route, message)
                return
            before = await bulk.sent(connection, item)
        if before is None or letter.redrives > before:
            raise _Another("it was redriven, and has died again")

    async def _refuse(self, item: Item, result: Result) -> None:
        """Write why a run was not redriven; one that was before is done."""
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            if not await bulk.move(connection, item, "done", now_ms=now_ms, before=["sent"]):
                await bulk.move(
                    connection,
                    item,
                    "failed",
                    now_ms=now_ms,
                    before=["waiting"],
                    detail=result.detail,
                )

    async def _missed(self, found: Selection, by_id: Mapping[str, Item]) -> None:
        """Decide on the runs whose dead letters are not there: looked for again, or given up."""
        if not self._grip.held:
            return
        crowded = any(look.readers or look.elsewhere for look in found.looks)
        seen = {letter.run_id for letter in found.letters}
        missing = [item for run_id, item in by_id.items() if run_id not in seen]
        for item in missing:
            looks = self._looks[item.number] = self._looks.get(item.number, 0) + 1
            if looks >= (CROWDED_LOOKS if crowded else LOOKS):
                await self._give_up(item, found)
        if missing:
            await asyncio.sleep(BREATH)

    async def _give_up(self, item: Item, found: Selection) -> None:
        if item.state == "sent":
            # It was done, and its server has died before it could write that down.
            await (self._discarded if self._job.action == "discard" else self._done)(item)
            return
        left = sum(look.left for look in found.looks)
        where = f"; {left} others were not looked at" if left else ""
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            detail = f"it is not in the dead-letter queue{where}"
            await bulk.move(connection, item, "skipped", now_ms=now_ms, detail=detail)

    async def _begin(self, items: Sequence[Item]) -> None:
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            for item in items:
                await bulk.move(connection, item, "sent", now_ms=now_ms)

    async def _give_back(self, items: Sequence[Item]) -> None:
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            for item in items:
                await bulk.move(connection, item, "waiting", now_ms=now_ms, before=["sent"])

    async def _done(self, item: Item) -> None:
        await self._move(item, "done")

    async def _discarded(self, item: Item) -> None:
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            await bulk.move(connection, item, "done", now_ms=now_ms)
            await bulk.discarded(connection, item.run_id, now_ms=now_ms)

    async def _move(self, item: Item, state: bulk.State) -> None:
        now_ms = self._resources.clock.now_ms()
        async with self._resources.store.begin() as connection:
            await bulk.move(connection, item, state, now_ms=now_ms)


class _Another(BrokertaskError):
    """A dead letter that is of a later life of its run than the job has selected."""
