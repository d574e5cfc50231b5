"""What a worker tells the servers when it starts: its tasks, and when they are to be triggered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from brokertask.envelope import Message
from brokertask.errors import AccessDenied, EnvelopeError, PublishError, Unroutable
from brokertask.topology import Route
from brokertask.transport.base import Transport
from brokertask.values import MSGPACK, decode, pack

log = logging.getLogger("brokertask.worker")

MANIFEST: Final = "manifest"
"""The `type` of its message, and the key by which it gets to the servers."""
AGAIN: Final = 30.0
"""Seconds between two attempts to reach a server that is to trigger something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one worker's code says."""

    worker: str
    at_ms: int
    """When its worker started, by its own clock."""
    schedules: Mapping[str, Mapping[str, Any] | None]
    """By task: `Task.schedule_plain`; None: it has no schedule, or none any more."""
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By task: the JSON Schemas of its `payload` and `result`; None for what has none."""

    def message(self) -> Message:
        """Return it as the message to publish."""
        body = {
            "worker": self.worker,
            "at_ms": self.at_ms,
            "schedules": self.schedules,
            "schemas": self.schemas,
        }
        return Message(
            body=pack(body), type=MANIFEST, content_type=MSGPACK, timestamp_ms=self.at_ms
        )

    @staticmethod
    def read(message: Message) -> Manifest:
        """Return the manifest in a message; fields that a newer version added are ignored.

        Raises:
            EnvelopeError: There is none in it.
        """
        raw = decode(message.body, message.content_type or MSGPACK)
        match raw:
            case {"worker": str(worker), "at_ms": int(at_ms), "schedules": dict(schedules)}:
                if all(
                    isinstance(task, str) and isinstance(plain, dict | None)
                    for task, plain in schedules.items()
                ):
                    schemas = raw.get("schemas")
                    return Manifest(
                        worker=worker,
                        at_ms=at_ms,
                        schedules=schedules,
                        schemas=schemas if isinstance(schemas, dict) else {},
                    )
        raise EnvelopeError("not a manifest", reason="undecodable")


async def tell(
    transport: Transport,
    route: Route,
    manifest: Manifest,
    *,
    timeout: float,
) -> None:
    """Publish a manifest to the servers; again and again only if something is scheduled in it.

    Where no server was ever started, nobody takes it, and nobody need.
    """
    scheduled = any(plain is not None for plain in manifest.schedules.values())
    while True:
        try:
            await transport.publish(route, manifest.message(), timeout=timeout)
        except AccessDenied as error:
            log.warning("servers cannot be told of this worker's schedules: %s", error)
        except Unroutable:
            if scheduled:
                log.warning("tasks are scheduled, and no server was ever started to trigger them")
        except PublishError as error:
            log.warning("servers are not told of this worker yet: %s", error)
        else:
            return
        if not scheduled:
            return
        await asyncio.sleep(AGAIN)
