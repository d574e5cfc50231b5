"""What each role may do on the broker, as RabbitMQ's three patterns; nothing more is needed. Pure.

They are for `BROKERTASK_DECLARE=false`, with the topology applied by the role `topology`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from brokertask.topology import Names

Role: TypeAlias = Literal["publisher", "worker", "server", "topology"]


@dataclass(frozen=True, slots=True)
class Permissions:
    """Patterns of names: what a user may configure, write and read."""

    configure: str
    write: str
    read: str

    def command(self, user: str, vhost: str) -> str:
        """Return the `rabbitmqctl` command that gives them to a user."""
        words = ("-p", vhost, user, self.configure, self.write, self.read)
        return f"rabbitmqctl set_permissions {shlex.join(words)}"


def permissions(names: Names, role: Role) -> Permissions:
    """Return what a role needs.

    A worker may do what a publisher may, as its tasks trigger others.
    """
    match role:
        case "publisher":
            return _permissions(
                names,
                configure=["reply."],
                write=["tasks", "delay", "server", "reply."],
                read=["events", "reply."],
            )
        case "worker":
            return _permissions(
                names,
                configure=["inflight.", "reply."],
                write=[
                    *("tasks", "delay", "server", "resume", "dead", "events", "control"),
                    *("inflight", "inflight.", "reply."),
                ],
                read=["events", "control", "inflight", "inflight.", "q.", "in.", "reply."],
            )
        case "server":
            # It binds its queue of events to the tasks that it comes to know.
            return _permissions(
                names,
                configure=["reply."],
                write=[
                    *("tasks", "delay", "server", "resume", "dead", "events", "control"),
                    *("server.", "reply."),
                ],
                read=["tasks", "events", "control", "server.", "dead.", "reply."],
            )
        case "topology":
            everything = f"^{re.escape(names.namespace)}\\."
            return Permissions(everything, everything, everything)


def _permissions(
    names: Names, *, configure: Iterable[str], write: Iterable[str], read: Iterable[str]
) -> Permissions:
    return Permissions(*(_pattern(names, each) for each in (configure, write, read)))


def _pattern(names: Names, parts: Iterable[str]) -> str:
    """Return the pattern of whole names, and of those that begin with one that ends in a dot."""
    listed = list(parts)
    whole = "|".join(part for part in listed if not part.endswith("."))
    begun = "|".join(part[:-1] for part in listed if part.endswith("."))
    before = f"^{re.escape(names.namespace)}\\."
    patterns = [f"{before}({whole})$"] if whole else []
    return "|".join([*patterns, *([f"{before}({begun})\\."] if begun else [])])
