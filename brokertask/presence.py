"""What a worker says of itself to the servers that keep history: that it is there, and how busy."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from brokertask.envelope import Message
from brokertask.errors import EnvelopeError
from brokertask.values import MSGPACK, decode, pack
from brokertask.version import __version__

WORKER: Final = "worker"
"""The `type` of its message, and what its routing key begins with: `worker.<name>`."""
EVERY: Final = 30.0
"""Seconds between two of them; a worker that is silent for three times as long is gone."""
State: TypeAlias = Literal["working", "draining", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A worker at one moment."""

    worker: str
    state: State
    at_ms: int
    started_ms: int
    tasks: Mapping[str, Mapping[str, Any]]
    """By task: `slots`, how many of them are `busy`, and whether it is `paused`."""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    version: str = __version__

    def message(self) -> Message:
        """Return it as the message to publish."""
        body = {name: getattr(self, name) for name in self.__slots__}
        return Message(body=pack(body), type=WORKER, content_type=MSGPACK, timestamp_ms=self.at_ms)

    @staticmethod
    def read(message: Message) -> Presence:
        """Return what is in a message; fields that a newer version added are ignored.

        Raises:
            EnvelopeError: It is none.
        """
        match decode(message.body, message.content_type or MSGPACK):
            case {
                "worker": str(worker),
                "state": "working" | "draining" | "stopped" as state,
                "at_ms": int(at_ms),
                "started_ms": int(started_ms),
                "tasks": dict(tasks),
                "host": str(host),
                "pid": int(pid),
                "version": str(version),
            }:
                return Presence(
                    worker=worker,
                    state=state,
                    at_ms=at_ms,
                    started_ms=started_ms,
                    tasks=tasks,
                    host=host,
                    pid=pid,
                    version=version,
                )
        raise EnvelopeError("not what a worker says of itself", reason="undecodable")
