"""The demonstration as `make demo` runs it: real worker processes, one of which is killed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import socket
import sys
import urllib.request
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from workers.documents.accesslog import Access, Fact, read
from workers.documents.crash import half_way
from workers.documents.processes import ACCESS_LOG, EMBEDDED, LOG, WORK

ROOT: Final = Path(__file__).resolve().parents[2]
SECONDS: Final = 100.0
DOCUMENTS: Final = [f"letter-{number:02}.txt" for number in range(12)]
BROKEN: Final = "broken-scan.txt"


async def begin(folder: Path, url: str, *arguments: str, bind: str = "127.0.0.1:0") -> Process:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROKERTASK_")}
    own = {"BROKERTASK_AMQP_URL": url, "BROKERTASK_CONNECT_TIMEOUT": "30", "COLUMNS": "100"}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers.documents", *arguments),
        cwd=folder,
        env={**kept, **own, "BROKERTASK_SERVER_BIND": bind, "PYTHONPATH": str(ROOT)},
        stdout=PIPE,
        stderr=STDOUT,
    )


async def demonstrate(folder: Path, url: str, *arguments: str) -> tuple[int, str]:
    """Return the exit code and the output of a demonstration that is held in a folder."""
    process = await begin(folder, url, *arguments)
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    print(said.decode())
    assert process.returncode is not None
    return process.returncode, said.decode()


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    folder = tmp_path / "letters"
    folder.mkdir()
    for number, name in enumerate(DOCUMENTS):
        sentence = f"The harbour of town number {number} is full of wonderful boats this summer. "
        (folder / name).write_text("\n\n".join([sentence * 20] * 3))
    return folder


@pytest.fixture(params=["embedded", "rabbitmq"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "embedded":
        return EMBEDDED
    found: str = request.getfixturevalue("amqp_url")
    return found


@pytest.mark.anyio
async def test_a_worker_is_killed_and_every_document_is_fetched_once(
    url: str, letters: Path, tmp_path: Path
) -> None:
    code, said = await demonstrate(tmp_path, url, "--input", str(letters))
    assert code == 0
    killed = re.search(r"killed    worker process (\d+) \(SIGKILL\), half-way through (\d+) ", said)
    assert killed
    pid, half_done = int(killed[1]), int(killed[2])
    assert half_done > 0
    log = (tmp_path / LOG).read_text()
    assert f"(pid {pid}) ended: killed by signal 9" in log, "its supervisor saw it die"
    accesses = read(tmp_path / ACCESS_LOG)
    fetches = Counter(access.run_id for access in accesses if access.fact == "fetched")
    assert list(fetches.values()) == [1] * 13
    assert f"once each: 13 of 13; one worker killed half-way, {half_done} run(s) resumed" in said
    rows = table(said)
    assert list(rows) == [*DOCUMENTS, BROKEN]
    for name, (status, attempts, fetched, sections, _, note) in rows.items():
        assert fetched == "1"
        assert (status, sections) == (("dead", "0") if name == BROKEN else ("completed", "3"))
        assert int(attempts) > 1 or "killed" not in note
    assert rows[BROKEN][-1].startswith("aborted: ")
    assert sum("killed half-way" in row[-1] for row in rows.values()) == half_done
    assert re.search(r"process_section +36 runs", said)
    report = (tmp_path / WORK / "report.md").read_text()
    assert re.findall(r"^## (.+)$", report, re.MULTILINE) == DOCUMENTS
    assert len(re.findall("words, about: .*harbour", report)) == len(DOCUMENTS)


@pytest.mark.anyio
async def test_with_a_console_it_is_kept_open_until_it_is_interrupted(
    url: str, letters: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = await begin(tmp_path, url, "--input", str(letters), "--console", bind=address)
    assert process.stdout is not None
    said: list[str] = []
    try:
        async with asyncio.timeout(SECONDS):
            while not said or "until Ctrl-C" not in said[-1]:
                said.append((await process.stdout.readline()).decode())
                assert said[-1], "".join(said)
            assert f"console   http://{address}/ " in said[-1]
            listed = await asyncio.to_thread(read_url, f"http://{address}/runs?status=failed")
            assert "process_document" in listed
            process.send_signal(signal.SIGINT)
            await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0


def read_url(url: str) -> str:
    with urllib.request.urlopen(url) as response:
        text: str = response.read().decode()
        return text


def table(said: str) -> dict[str, list[str]]:
    """Return the cells of the table that is shown, by the document."""
    lines = said.partition("\nDOCUMENT ")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [[*re.split(r"\s{2,}", line.strip(), maxsplit=6), ""][:7] for line in lines]
    return {name: cells for name, *cells in rows}


@pytest.mark.anyio
async def test_it_says_why_the_workers_cannot_work(letters: Path, tmp_path: Path) -> None:
    code, said = await demonstrate(tmp_path, "memory:", "--input", str(letters))
    assert code == 1
    assert "the workers ended before their runs did" in said
    assert "BROKERTASK_AMQP_URL" in said


@pytest.mark.anyio
async def test_only_one_is_held_in_a_folder(letters: Path, tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir(parents=True)
    with (tmp_path / WORK / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = await demonstrate(tmp_path, EMBEDDED, "--input", str(letters))
    assert code == 1
    assert "another demonstration is at work" in said


def test_make_demo_is_held_on_the_embedded_broker() -> None:
    assert f"\nurl-of-memory := echo {EMBEDDED}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("facts", "settled", "caught"),
    [
        (["fetched", "asked"], 0, True),
        (["fetched", "asked", "busy"], 0, True),
        (["fetched"], 0, False),
        (["fetched"], 1, False),
        (["fetched", "asked", "answered"], 0, False),
        (["fetched", "asked", "down"], 1, False),
        (["fetched", "asked", "down", "asked"], 1, True),
    ],
)
def test_a_process_is_caught_half_way_behind_a_fetch(
    facts: list[Fact], settled: int, caught: bool
) -> None:
    accesses = [Access(1, "run", fact) for fact in facts]
    assert bool(half_way(1, accesses, lambda _: settled)) == caught
    assert not half_way(2, accesses, lambda _: settled)


@pytest.mark.parametrize(
    ("facts", "settled", "spared"),
    [
        (["fetched"], 0, True),
        (["fetched"], 1, False),
        (["fetched", "asked", "down"], 0, True),
        (["fetched", "asked", "down"], 1, False),
        (["fetched", "asked", "down", "asked", "answered"], 1, True),
        (["fetched", "asked", "down", "asked", "answered"], 2, False),
    ],
)
def test_a_process_is_spared_while_it_has_done_what_is_not_remembered(
    facts: list[Fact], settled: int, spared: bool
) -> None:
    waiting = [Access(1, "waiting", "fetched"), Access(1, "waiting", "asked")]
    accesses = [*waiting, *(Access(1, "other", fact) for fact in facts)]
    assert half_way(1, accesses, lambda _: settled) == (set() if spared else {"waiting"})
