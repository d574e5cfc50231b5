"""Processes that outlive whoever starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.rabbitmq.installation import NodeError


@dataclass(frozen=True)
class Process:
    """A process that outlives whoever starts it, found again by the pid in a file."""

    pid_file: Path
    mark: str
    """A setting in its environment: proof that the pid has not passed to a stranger."""

    @property
    def pid(self) -> int | None:
        """The pid, if the process lives."""
        try:
            pid = int(self.pid_file.read_text())
            return pid if self.mark.encode() in _environment(pid).split(b"\0") else None
        except (OSError, ValueError):
            return None

    def spawn(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        """Start it as nobody's child, with its pid in the file before this returns."""
        script = 'log=$1 pid_file=$2; shift 2; "$@" </dev/null >>"$log" 2>&1 & echo $! >"$pid_file"'
        subprocess.run(
            ["sh", "-c", script, "sh", str(log), str(self.pid_file), *command],
            env=environment,
            cwd=log.parent,
            start_new_session=True,
            check=True,
        )

    def stop(self, sign: signal.Signals = signal.SIGKILL, timeout: float = 10) -> None:
        """Send a signal and wait for the end."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
            until(lambda: self.pid is None, timeout, f"process {pid} does not stop")
        self.pid_file.unlink(missing_ok=True)


def until(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    """Wait for this; after so many seconds complain."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise NodeError(f"{complaint} (waited {timeout:.0f} s)")
        time.sleep(0.05)


def _environment(pid: int) -> bytes:
    """The environment of a process, as it began; nothing if it is dead or never had one."""
    process = Path(f"/proc/{pid}")
    for _ in range(100):  # between two programs of a process there is none for a moment
        if environment := (process / "environ").read_bytes():
            return environment
        if b") Z" in (process / "stat").read_bytes():
            break  # dead; its parent has yet to notice
        time.sleep(0.01)
    return b""
