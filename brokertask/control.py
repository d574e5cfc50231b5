"""The control log: what was said to all workers, as entries, and what holds when they are read.

| entry       | its subject | says                                                             |
| ----------- | ----------- | ---------------------------------------------------------------- |
| `cancel`    | a run id    | the run is to end; with `children`, what it has triggered, too   |
| `pause`     | a task id   | no worker begins runs of the task                                |
| `resume`    | a task id   | they do again                                                    |
| `drain`     | a worker    | it begins no run of any task any more                            |
| `recording` | a server    | servers keep history: what happens within runs is worth telling  |
| `hello`     | a worker    | the worker has read all that was before                          |

The body is a msgpack map. Entries of a kind that is not known here are passed over. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from brokertask.envelope import Envelope, Message
from brokertask.errors import EnvelopeError
from brokertask.values import MSGPACK, clip, decode, pack

Kind: TypeAlias = Literal["cancel", "pause", "resume", "drain", "recording", "hello"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)
MAX_REASON: Final = 500
MAX_CANCELLED: Final = 200_000
"""More ids of cancelled runs than the log holds; beyond, the oldest are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the control log, in both directions."""

    kind: Kind
    subject: str
    at_ms: int
    reason: str = ""
    children: bool = False
    again: bool = False
    """A pause that a server repeats, so that the log does not forget it."""

    def message(self) -> Message:
        """Return it as the message to publish."""
        body: dict[str, Any] = {"subject": self.subject, "at_ms": self.at_ms}
        if self.reason:
            body["reason"] = clip(self.reason, MAX_REASON)
        for name in ("children", "again"):
            if getattr(self, name):
                body[name] = True
        return Message(
            body=pack(body), type=self.kind, content_type=MSGPACK, timestamp_ms=self.at_ms
        )

    @staticmethod
    def read(message: Message) -> Entry | None:
        """Return the entry in `message`; None if a newer version has written it.

        Raises:
            EnvelopeError: It is no entry.
        """
        if message.type not in KINDS:
            return None
        match raw := decode(message.body, message.content_type or MSGPACK):
            case {"subject": str(subject), "at_ms": int(at_ms)}:
                return Entry(
                    kind=cast("Kind", message.type),
                    subject=subject,
                    at_ms=at_ms,
                    reason=str(raw.get("reason", "")),
                    children=raw.get("children") is True,
                    again=raw.get("again") is True,
                )
        raise EnvelopeError("not an entry of the control log", reason="undecodable")


class Standing:
    """What holds after all entries that were read."""

    def __init__(self) -> None:
        self.paused: set[str] = set()
        """The tasks that are paused."""
        self.recording = False
        """Whether there are servers that keep history."""
        self._cancelled: OrderedDict[str, Entry] = OrderedDict()
        self._resumed_ms: dict[str, int] = {}

    def apply(self, entry: Entry) -> None:
        """Let an entry hold from now on; the same again changes nothing."""
        match entry.kind:
            case "cancel":
                known = self._cancelled.setdefault(entry.subject, entry)
                if entry.children and not known.children:
                    self._cancelled[entry.subject] = replace(known, children=True)
                if len(self._cancelled) > MAX_CANCELLED:
                    self._cancelled.popitem(last=False)
            case "pause":
                # A server may repeat it in the moment in which somebody lifts it.
                lifted_ms = self._resumed_ms.get(entry.subject)
                if not entry.again or lifted_ms is None or lifted_ms < entry.at_ms:
                    self.paused.add(entry.subject)
            case "resume":
                self.paused.discard(entry.subject)
                self._resumed_ms[entry.subject] = entry.at_ms
            case "recording":
                self.recording = True
            case "drain" | "hello":
                pass  # It is for one worker, which is told.

    def cancelled(self, envelope: Envelope) -> Entry | None:
        """Return the entry that cancels a run: its own, its parent's or that of its tree's root.

        Cost: below 0.1 µs while nothing is cancelled, as for most workers always.
        """
        if not self._cancelled:
            return None
        if (own := self._cancelled.get(envelope.run_id)) is not None:
            return own
        for above in (envelope.parent, envelope.root):
            entry = self._cancelled.get(above or "")
            if entry is not None and entry.children:
                return entry
        return None
