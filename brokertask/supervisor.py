"""A parent that keeps child processes at work: starts, watches, replaces and stops them.

    starting ──► ready ◄──► reconnecting        blocked: no heartbeat, whatever it last said
        └──────────┴─► draining ──► (gone) ──► starting, after a backoff

Each child holds one end of a socket: it reports over it at least once a second, and sees by its
end that the parent is gone. Orders go by signal: SIGTERM to drain, however often it comes (systemd
sends it to every process, and so do we), SIGQUIT to stop at once.
What the children do is no business of this module; it imports next to nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

log = logging.getLogger("brokertask.supervisor")

State: TypeAlias = Literal["starting", "ready", "reconnecting", "draining", "blocked", "gone"]

HEARTBEAT: Final = 0.5
BLOCKED_AFTER: Final = 3.0
"""Without a report for so long, a child's event loop does not run."""
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 15.0
STEADY_AFTER: Final = 5.0
"""A child that was ready for so long did not die of its start: the backoff begins anew."""
HURRY: Final = 5.0
"""After the second signal, until SIGKILL."""
DRAIN_MARGIN: Final = 20.0
"""Beyond the grace period, for handing back and flushing, until SIGKILL."""
LET_GO: Final = 1.0
"""By then a child that was told to stop takes no more work, even if it has some to finish."""
LAST_WORDS: Final = 1.0
MAX_REPORT: Final = 1_048_576


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a child tells its parent, as one line of JSON."""

    state: State
    busy: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    """What it runs; told once, before it is ready."""
    failure: str = ""
    """Why it is about to exit, in place of printing it."""

    def line(self) -> bytes:
        """Return it as it is sent."""
        told: dict[str, Any] = {"state": self.state, "busy": self.busy}
        if self.about:
            told["about"] = dict(self.about)
        if self.failure:
            told["failure"] = self.failure
        return json.dumps(told).encode() + b"\n"


class Child:
    """One process, from its start to its end."""

    def __init__(
        self,
        number: int,
        process: Process,
        channel: socket.socket,
        reported: Callable[[Report], None],
    ) -> None:
        self.number = number
        self.pid = process.pid
        self.busy = 0
        self.failure = ""
        self.ready_at: float | None = None
        self.ready = asyncio.Event()
        self._process = process
        self._reported = reported
        self._state: State = "starting"
        self._heard_at = time.monotonic()
        self.ended = asyncio.create_task(self._end(channel), name=f"child {process.pid}")

    @property
    def state(self) -> State:
        """What it is doing at this moment."""
        if self.ended.done():
            return "gone"
        late = time.monotonic() - self._heard_at > BLOCKED_AFTER
        return "blocked" if late and self.ready_at is not None else self._state

    @property
    def steady(self) -> bool:
        """Whether it had been ready for a while."""
        return self.ready_at is not None and time.monotonic() - self.ready_at > STEADY_AFTER

    async def _end(self, channel: socket.socket) -> int:
        """Return its exit code, after all of its reports."""
        listening = asyncio.create_task(self._listen(channel))
        code = await self._process.wait()
        # Processes of its own may have inherited its end of the socket.
        await asyncio.wait({listening}, timeout=LAST_WORDS)
        listening.cancel()
        return code

    async def _listen(self, channel: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=channel, limit=MAX_REPORT)
        try:
            while line := await reader.readline():
                self._hear(Report(**json.loads(line)))
        except (OSError, ValueError, TypeError) as error:
            log.warning("process %d (pid %d) reports nonsense: %s", self.number, self.pid, error)
        finally:
            writer.close()

    def _hear(self, report: Report) -> None:
        self._heard_at = time.monotonic()
        self._state, self.busy = report.state, report.busy
        self.failure = report.failure or self.failure
        if report.state == "ready" and self.ready_at is None:
            self.ready_at = self._heard_at
            self.ready.set()
            log.info("process %d (pid %d) is ready", self.number, self.pid)
        self._reported(report)

    async def until_ready(self) -> bool:
        """Wait until it is ready; False if it ended before."""
        await _first(self.ready.wait(), asyncio.shield(self.ended))
        return self.ready.is_set()

    def send(self, sign: signal.Signals) -> None:
        """Send it a signal, if it is still there."""
        with suppress(ProcessLookupError):
            self._process.send_signal(sign)

    def cause(self) -> str:
        """Return why it ended, for people."""
        code = self.ended.result()
        if self.failure:
            return self.failure
        if code >= 0:
            return f"exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        hint = ", perhaps out of memory" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} ({name}){hint}"


class Supervisor:
    """Keeps `processes` children running until it is told to stop.

    Args:
        command: The program and its arguments; the number of a file descriptor is added.
        processes: How many children.
        grace: How long a drain may take, until a child says its own.
        fatal: Exit codes that a restart cannot mend: the first child that ends with one before
            any was ever ready ends everything, with that code.
        environment: The children's, in place of this process's.
        reported: Called with every report of every child.

    Attributes:
        restarts: How often a place had to be filled again.
        proven: Set once a child was ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        processes: int = 1,
        grace: float = 60.0,
        fatal: Collection[int] = (),
        environment: Mapping[str, str] | None = None,
        reported: Callable[[Report], None] = lambda _: None,
    ) -> None:
        self.restarts = 0
        self.proven = asyncio.Event()
        self._command = tuple(command)
        self._grace = grace
        self._fatal = frozenset(fatal)
        self._environment = environment
        self._reported = reported
        self._places: dict[int, Child | None] = dict.fromkeys(range(1, processes + 1))
        self._children: set[Child] = set()
        self._signals = 0
        self._stopping = asyncio.Event()
        self._code = 0

    @property
    def ready(self) -> bool:
        """Whether every child is ready, at this moment."""
        return not self.stopping and all(
            child is not None and child.state == "ready" for child in self._places.values()
        )

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping.is_set()

    @property
    def busy(self) -> int:
        """How many deliveries all children hold, as last reported."""
        return sum(child.busy for child in self._children)

    def describe(self) -> dict[str, Any]:
        """Return the state of everything, for the health endpoint."""
        return {
            "ready": self.ready,
            "stopping": self.stopping,
            "restarts": self.restarts,
            "processes": [
                {
                    "number": number,
                    "pid": child.pid if child else None,
                    "state": child.state if child else "gone",
                    "busy": child.busy if child else 0,
                }
                for number, child in self._places.items()
            ],
        }

    async def run(self) -> int:
        """Supervise until `interrupt`, and return the exit code: 0 if every child drained."""
        keepers = [
            asyncio.create_task(self._keep(number), name=f"keeper {number}")
            for number in self._places
        ]
        try:
            await asyncio.gather(*keepers)
            # Those that were replaced may still drain.
            await asyncio.gather(*(self._finish(child) for child in list(self._children)))
        except BaseException:
            for child in self._children:
                child.send(signal.SIGKILL)
            raise
        finally:
            for keeper in keepers:
                keeper.cancel()
        if self._signals:
            log.info("stopped")
        return self._code

    def interrupt(self) -> None:
        """Stop: the first call lets runs finish, a second one does not wait for them."""
        self._signals += 1
        if self._signals == 1:
            held = f"; {self.busy} run(s) may finish, a second signal stops at once"
            log.info("stopping%s", held if self.busy else "")
        self._stopping.set()
        for child in list(self._children):
            child.send(signal.SIGTERM if self._signals == 1 else signal.SIGQUIT)
            deadline = self._grace + DRAIN_MARGIN if self._signals == 1 else HURRY
            asyncio.get_running_loop().call_later(deadline, child.send, signal.SIGKILL)

    async def replace(self) -> str:
        """Put a new child in the place of each, and drain the old one once the new is ready.

        Returns "", or how a new child ended before it was ready; what ran before then runs on.
        """
        for number in self._places:
            new = await self._start(number)
            if new is None:
                return "it cannot be started"
            if not await new.until_ready():
                await self._finish(new)
                return new.cause()
            old, self._places[number] = self._places[number], new
            if old is not None:
                old.send(signal.SIGTERM)
                # Whoever hears that the new code runs must not meet the old any more.
                await asyncio.wait({old.ended}, timeout=LET_GO)
        return ""

    async def _keep(self, number: int) -> None:
        """Keep one place taken until the end."""
        if number > 1:
            # One child finds out whether the app works at all: a mistake is shown once.
            await _first(self.proven.wait(), self._stopping.wait())
        failures = 0
        while not self.stopping:
            child = self._places[number]
            if child is None or child.ended.done():
                child = self._places[number] = await self._start(number)
            if child is not None:
                child = await self._watch(number, child)
            if not self.stopping and not self._give_up(child):
                failures = 1 if child is not None and child.steady else failures + 1
                await self._pause(number, child, failures)

    async def _watch(self, number: int, child: Child) -> Child:
        """Wait for the end of a place's child, or of the one that has replaced it meanwhile."""
        while True:
            await self._finish(child)
            current = self._places[number]
            if self.stopping or current is None or current is child:
                return child
            child = current

    async def _finish(self, child: Child) -> None:
        """Wait for the end of a child; the exit code tells if it ended badly when told to end."""
        code = await child.ended
        # The signal may hit a child before it can listen for it, or when it has drained and listens
        # no more; it holds nothing then, and says so before its event loop ends.
        unaware = code in (-signal.SIGTERM, -signal.SIGQUIT) and not child.busy
        if child in self._children and self.stopping and code and not unaware:
            log.warning("process %d (pid %d): %s", child.number, child.pid, child.cause())
            self._code = self._code or 1
        self._children.discard(child)

    def _give_up(self, child: Child | None) -> bool:
        code = child.ended.result() if child else 0
        if self.proven.is_set() or code not in self._fatal:
            return False
        self._code = code
        self._stopping.set()
        return True

    async def _pause(self, number: int, child: Child | None, failures: int) -> None:
        """Say why a place is empty, and wait before it is filled again."""
        self.restarts += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures - 1, 10))
        pause *= random.uniform(0.5, 1)
        if child is not None:
            what = f"process {number} (pid {child.pid}) ended: {child.cause()}"
            log.warning("%s; the next one starts in %.1f s", what, pause)
        await _first(self._stopping.wait(), asyncio.sleep(pause))

    async def _start(self, number: int) -> Child | None:
        """Start a process; None, and a line in the log, if the system has none to give."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            log.error("process %d cannot be started: %s", number, error)
            return None
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    str(theirs.fileno()),
                    stdin=DEVNULL,
                    env=self._environment,
                    pass_fds=[theirs.fileno()],
                    # The terminal's Ctrl-C is for the parent, which passes it on in order.
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                log.error("process %d cannot be started: %s", number, error)
                return None
        child = Child(number, process, ours, self._hear)
        self._children.add(child)
        if self.stopping:
            child.send(signal.SIGTERM)
        return child

    def _hear(self, report: Report) -> None:
        self._grace = float(report.about.get("grace", self._grace))
        if report.state == "ready":
            self.proven.set()
        self._reported(report)


async def _first(*waits: Awaitable[object]) -> None:
    """Wait for the first of several; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
