"""The processes that do the work of the demonstration, and what happens if they do not."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
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
STORE: Final = WORK / "server.db"
STORE_VARIABLE: Final = "BROKERTASK_SERVER_STORE_URL"
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
async def worker_processes(count: int, url: str, *, server: bool) -> AsyncIterator[list[Process]]:
    """Run worker processes until the block is left, and with `server` one of those, too.

    There is an embedded broker with them if `url` is of it.
    """
    environment = {**os.environ, URL_VARIABLE: url, VARIABLE: str(ACCESS_LOG.absolute())}
    places = (str(HERE), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    ACCESS_LOG.unlink(missing_ok=True)
    LOG.unlink(missing_ok=True)
    many = ("--processes", str(count))
    async with AsyncExitStack() as stack:
        if url == EMBEDDED:
            del environment[URL_VARIABLE]
            words = ["dev", APP, "--no-reload", *many, *([] if server else ["--no-server"])]
            yield [await stack.enter_async_context(_process(words, environment, WORK))]
            return
        found = []
        if server:
            STORE.unlink(missing_ok=True)
            environment[STORE_VARIABLE] = f"sqlite+aiosqlite:///{STORE}"
            found.append(await stack.enter_async_context(_process(["server"], environment)))
        words = ["worker", APP, "--log-level", "warning", *many]
        found.append(await stack.enter_async_context(_process(words, environment)))
        yield found


@asynccontextmanager
async def _process(
    words: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> AsyncIterator[Process]:
    with LOG.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "brokertask.cli", *words),
            cwd=folder,
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


async def beside(
    processes: Sequence[Process], work: Coroutine[Any, Any, T], *, patience: float | None
) -> T:
    """Return what `work` returns, as long as all processes live.

    Raises:
        Unfinished: One ended before, or it took longer than `patience` seconds.
    """
    working = asyncio.ensure_future(work)
    ends = [asyncio.ensure_future(process.wait()) for process in processes]
    try:
        done, _ = await asyncio.wait(
            {working, *ends}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
        )
        if working in done:
            return working.result()
        if done:
            said = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_WORDS:]
            raise Unfinished("\n".join(["the workers ended before their runs did:", *said]))
        raise Unfinished(f"not every run has ended after {patience:g} s; see {LOG}")
    finally:
        for each in (working, *ends):
            each.cancel()
        await asyncio.gather(working, *ends, return_exceptions=True)
