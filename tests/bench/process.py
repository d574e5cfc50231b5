"""Measured processes: they die with the harness, whatever it dies of."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.bench import meter

ROOT: Final = Path(__file__).parents[2]
PR_SET_PDEATHSIG: Final = 1
STOP_TIMEOUT: Final = 8.0
_LIBC: Final = ctypes.CDLL(None)


class BenchError(Exception):
    """A measurement that could not be made, and what the measured program said."""


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Program:
    """A measured program, the first of a process group of its own."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.begun = time.monotonic()
        self._log = log
        self._stopped = False
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=ROOT,
                env=_clean(os.environ) | {"PYTHONPATH": str(ROOT)} | dict(environment),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Return what its tree has used so far."""
        return meter.cpu_seconds(self.pid)

    def check(self) -> None:
        """Raise `BenchError` if it has ended."""
        if self._process.poll() is not None:
            raise BenchError(f"exited with {self._process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        """Return the end of what it said."""
        return self._log.read_text(errors="replace")[-600:].strip() or "it said nothing"

    def tell(self, line: str) -> None:
        """Send it a line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(self.last_words()) from None

    def hear(self, timeout: float) -> float | None:
        """Return its next answer; raise `BenchError` if there is none in time."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        line = b""
        while not line.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise BenchError(f"no answer within {timeout:g} s: {self.last_words()}")
            more = os.read(self._process.stdout.fileno(), 1)
            if not more:
                raise BenchError(f"no answer: {self.last_words()}")
            line += more
        answer = json.loads(line)
        return None if answer is None else float(answer)

    def stop(self) -> None:
        """Tell it to stop in order, and after some seconds end its whole group."""
        if self._stopped:
            return
        self._stopped = True
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out what would configure a measured program behind our back."""
    ours = ("BROKERTASK_", "OTEL_", "PYTHON", "CELERY_", "TASKIQ_", "FASTSTREAM_", "dramatiq_")
    return {name: value for name, value in environment.items() if not name.startswith(ours)}
