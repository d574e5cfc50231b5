"""The processes that do the work of the demonstration, and what happens if they do not."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from workers.documents.accesslog import VARIABLE

HERE: Final = Path(__file__).resolve().parents[2]
WORK: Final = Path(".brokertask/demo")
LOG: Final = WORK / "worker.log"
ACCESS_LOG: Final = WORK / "access.log"
EMBEDDED: Final = f"unix:{WORK}/.brokertask/dev.sock"
"""Where `brokertask dev` offers its embedded broker if it is started in `WORK`."""
APP: Final = "workers.documents:app"
URL_VARIABLE: Final = "BROKERTASK_AMQP_URL"
LAST_WORDS: Final = 5
T = TypeVar("T")


class Unfinished(Exception):
    """The demonstration cannot begin, or not come to its end."""


@contextmanager
def alone() -> Iterator[None]:
    """Keep other demonstrations out of `WORK`, which is made.

    Raises:
        Unfinished: There is another one.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unfinished(f"another demonstration is at work in {WORK}") from None
        yield


@asynccontextmanager
async def worker_processes(count: int, url: str) -> AsyncIterator[Process]:
    """Run worker processes, with an embedded broker if `url` is of it, until the block is left."""
    environment = {**os.environ, URL_VARIABLE: url, VARIABLE: str(ACCESS_LOG.absolute())}
    places = (str(HERE), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    words = ["worker", APP, "--log-level", "warning"]
    if url == EMBEDDED:
        words = ["dev", APP, "--no-reload", "--no-server"]
        del environment[URL_VARIABLE]
    ACCESS_LOG.unlink(missing_ok=True)
    with LOG.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "brokertask.cli", *words, "--processes", str(count)),
            cwd=WORK if url == EMBEDDED else None,
            env=environment,
            stdin=DEVNULL,
            stdout=log,
            stderr=STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def beside(process: Process, work: Coroutine[Any, Any, T], *, patience: float) -> T:
    """Return what `work` returns, as long as a process lives.

    Raises:
        Unfinished: The process ended before, or it took longer than `patience` seconds.
    """
    working, ended = asyncio.ensure_future(work), asyncio.ensure_future(process.wait())
    try:
        done, _ = await asyncio.wait(
            {working, ended}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
        )
        if working in done:
            return working.result()
        if ended in done:
            said = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_WORDS:]
            raise Unfinished("\n".join(["the workers ended before their runs did:", *said]))
        raise Unfinished(f"not every run has ended after {patience:g} s; see {LOG}")
    finally:
        for each in (working, ended):
            each.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)
