"""What one call asks for: the options of a trigger, checked once for however many runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brokertask.claim import CLAIM, Claim
from brokertask.durations import Duration, seconds
from brokertask.envelope import Envelope
from brokertask.identity import checked_tags
from brokertask.run import RunningIn, running_in
from brokertask.topology import IN_PLACE_MS, Names, Route, check_task_id
from brokertask.values import MSGPACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Runs of one task with the same options; delays are ms."""

    task: str
    app_id: str
    delay_ms: int | None
    """None: they are to start at once."""
    expires_ms: int | None
    tags: tuple[str, ...]
    parent: RunningIn | None

    @staticmethod
    def of(
        task: str,
        *,
        app_id: str,
        delay: Duration,
        expires: Duration | None,
        tags: Sequence[str],
    ) -> Request:
        """Return the request of who calls, or raise `InvalidOption`."""
        check_task_id(task)
        delay_ms = round(seconds(delay) * 1000)
        return Request(
            task=task,
            app_id=app_id,
            delay_ms=delay_ms if delay_ms > IN_PLACE_MS else None,
            expires_ms=None if expires is None else round(seconds(expires) * 1000),
            tags=checked_tags(tags),
            parent=running_in.get(),
        )

    def addressed(
        self,
        names: Names,
        *,
        run_id: str,
        body: bytes,
        claim: Claim | None,
        trace: Mapping[str, str],
        reply_to: str | None,
        now_ms: int,
    ) -> tuple[Envelope, Route]:
        """Return one run's message, and where to publish it."""
        route, left = names.trigger_route(self.task), 0
        if self.delay_ms is not None:
            route, left = names.delay_route(self.task, self.delay_ms)
        envelope = Envelope(
            run_id=run_id,
            task=self.task,
            payload=body if claim is None else claim.pack(),
            content_type=MSGPACK if claim is None else CLAIM,
            triggered_ms=now_ms,
            sent_ms=now_ms,
            due_ms=None if self.delay_ms is None else now_ms + self.delay_ms,
            left_ms=left,
            expires_ms=None if self.expires_ms is None else now_ms + self.expires_ms,
            tags=self.tags,
            parent=self.parent.run_id if self.parent else None,
            root=self.parent.root if self.parent else None,
            reply_to=reply_to,
            app_id=self.app_id,
            trace=trace,
        )
        return envelope, route
