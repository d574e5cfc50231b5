"""Commands as a user runs them: real processes, watched by their output."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

SECONDS = 30.0
"""How long a test waits for what must happen; only a failing test takes that long."""


class Command:
    """A running `brokertask`; its output, both streams, line by line."""

    def __init__(self, process: Process) -> None:
        self.lines: list[str] = []
        self._process = process
        self._read = 0
        self._more = asyncio.Condition()
        self._reading = asyncio.create_task(self._collect())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    async def line(self, text: str) -> str:
        """Return the next line that holds `text`, waiting for it."""
        try:
            async with asyncio.timeout(SECONDS), self._more:
                while True:
                    while self._read < len(self.lines):
                        self._read += 1
                        if text in self.lines[self._read - 1]:
                            return self.lines[self._read - 1]
                    if self._reading.done():
                        raise AssertionError(f"ended without {text!r}:\n{self.output}")
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no {text!r} in time:\n{self.output}") from None

    async def ready(self, processes: int = 1) -> list[int]:
        """Wait until it works, and return the pids of its processes."""
        lines = [await self.line("is ready") for _ in range(processes)]
        return [int(line.partition("(pid ")[2].partition(")")[0]) for line in lines]

    def send(self, sign: signal.Signals, pid: int | None = None) -> None:
        os.kill(self.pid if pid is None else pid, sign)

    async def end(self) -> int:
        """Wait for its end, and return the exit code."""
        async with asyncio.timeout(SECONDS):
            code = await self._process.wait()
            await self._reading
        return code

    async def stop(self) -> int:
        self.send(signal.SIGTERM)
        return await self.end()

    async def close(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        await asyncio.wait({self._reading}, timeout=SECONDS)

    async def _collect(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            async with self._more:
                self.lines.append(line.decode().rstrip("\n"))
                self._more.notify_all()
        async with self._more:
            self._more.notify_all()


@asynccontextmanager
async def brokertask(
    *arguments: str, folder: Path, environment: Mapping[str, str]
) -> AsyncIterator[Command]:
    """Run `brokertask` in a folder; it is killed at the end if it still runs."""
    own = {name: value for name, value in os.environ.items() if not _ours(name)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "brokertask.cli",
        *arguments,
        cwd=folder,
        env=own | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | {**environment},
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        start_new_session=True,
    )
    command = Command(process)
    try:
        yield command
    finally:
        await command.close()
        print(command.output)  # shown by pytest if the test fails


async def until_gone(pid: int) -> None:
    """Return once there is no such process."""
    async with asyncio.timeout(SECONDS):
        while _alive(pid):  # noqa: ASYNC110 - it is nobody's child here that could be awaited
            await asyncio.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def _ours(name: str) -> bool:
    return name.startswith(("BROKERTASK_", "OTEL_"))
