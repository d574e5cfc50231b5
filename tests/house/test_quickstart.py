"""The quickstart and the README's story, done as written: a file, terminals, their output."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from pathlib import Path
from typing import Final

import pytest

from tests.house.pages import README, ROOT, Block, Page, read

PAGE: Final = read(ROOT / "docs/quickstart.md")
SECONDS: Final = 40.0
RUN: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
TOKEN: Final = re.compile(r"token_[0-9a-f]+")
READY: Final = "ready; Ctrl-C stops"


@pytest.mark.anyio
async def test_the_quickstart_happens_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(PAGE.snippets[0].text, encoding="utf-8")
    begin, *rest = [block for block in PAGE.blocks if block.language == "console"]
    terminal = Terminal(tmp_path)
    async with asyncio.timeout(100):
        await terminal.start(next(begin.commands))
        try:
            await terminal.until(READY)
            for block in rest:
                for command, shown in exchanges(block):
                    said = await output(command, tmp_path)
                    assert matches(shown, said), place(PAGE, block) + f"\n{said}"
            seen = [block for block in PAGE.blocks if block.language == "text"]
            await terminal.until(heard="✔ fetch")
        finally:
            await terminal.stop()
    shown = "\n".join([*begin.text.splitlines()[1:], *(block.text for block in seen)])
    assert matches(shown, terminal.said), terminal.said


@pytest.mark.anyio
async def test_the_story_of_the_readme_happens_as_it_is_told(tmp_path: Path) -> None:
    page = read(README)
    (tmp_path / "shop.py").write_text(page.snippets[0].text, encoding="utf-8")
    (story,) = [block for block in page.blocks if "curl" in block.text]
    trigger, follow, *rest = exchanges(story)
    server, following = Terminal(tmp_path), Terminal(tmp_path)
    async with asyncio.timeout(100):
        await server.start("brokertask dev shop:app")
        try:
            await server.until(READY)
            said = await output(trigger[0], tmp_path)
            real = {RUN.findall(trigger[1])[0]: RUN.findall(said)[0]}
            assert matches(renamed(trigger[1], real), said)
            await following.start(renamed(follow[0], real))
            await following.until("still here")
            for command, shown in rest:
                said = await output(renamed(command, real), tmp_path)
                while TOKEN.search(shown) and not TOKEN.search(said):
                    said = await output(renamed(command, real), tmp_path)
                real |= zip(TOKEN.findall(shown), TOKEN.findall(said), strict=True)
                assert matches(renamed(shown, real), said), f"{command}\n{said}"
            await following.until("event: completed")
            await following.end()
            assert matches(follow[1], following.said), following.said
        finally:
            await server.stop()


def renamed(text: str, real: dict[str, str]) -> str:
    """Put what a run and a token are really called in place of what the page calls them."""
    for shown, name in real.items():
        text = text.replace(shown, name)
    return text


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Terminal:
    """A program that runs on while others are called."""

    def __init__(self, folder: Path) -> None:
        self.said = ""
        self._folder = folder
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._more = asyncio.Condition()

    async def start(self, command: str) -> None:
        self._process = await start(command, self._folder)
        self._reading = asyncio.create_task(self._read())

    async def until(self, heard: str) -> None:
        async with asyncio.timeout(SECONDS), self._more:
            await self._more.wait_for(lambda: heard in self.said)

    async def stop(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
        await self.end()

    async def end(self) -> None:
        assert self._process is not None
        await self._process.wait()
        assert self._reading is not None
        await self._reading

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            async with self._more:
                self.said += as_shown(line.decode())
                self._more.notify_all()


def exchanges(block: Block) -> list[tuple[str, str]]:
    """Return each command of a console block with the output shown below it."""
    parts = re.split(r"^\$ (.*)$", block.text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


async def start(command: str, folder: Path) -> Process:
    program, *arguments = shlex.split(command.replace(SHOWN, HERE), comments=True)
    words = [sys.executable, "-m", "brokertask.cli"] if program == "brokertask" else [program]
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    path = os.pathsep.join(str(place) for place in (ROOT, *sys.path) if place)
    environment = {
        **kept,
        "PYTHONPATH": path,
        "COLUMNS": "200",
        "PYTHONUNBUFFERED": "1",
        "BROKERTASK_SERVER_BIND": HERE.replace("localhost", "127.0.0.1"),
        "BROKERTASK_SERVER_URL": f"http://{HERE}",
    }
    return await asyncio.create_subprocess_exec(
        *words, *arguments, cwd=folder, env=environment, stdout=PIPE, stderr=STDOUT
    )


async def output(command: str, folder: Path) -> str:
    process = await start(command, folder)
    async with asyncio.timeout(SECONDS):
        said, _ = await process.communicate()
    return as_shown(said.decode())


def as_shown(said: str) -> str:
    return said.replace(HERE.partition(":")[2], SHOWN.partition(":")[2])


def matches(shown: str, said: str) -> bool:
    """Whether `said` is what is shown, but for spaces and for what `…` stands for."""
    pattern = " ".join(re.escape(word).replace("…", ".*?") for word in shown.split())
    return re.fullmatch(pattern, " ".join(said.split()), re.DOTALL) is not None


SHOWN: Final = "localhost:8070"
HERE: Final = f"localhost:{free_port()}"
"""In place of it: what is run on this machine may have that port."""


def place(page: Page, block: Block) -> str:
    return f"{page.name}:{block.line + 1}"


def test_an_output_matches_as_a_whole() -> None:
    assert matches("a  b\n… c d…", "a b\nxyz 1  c def\n")
    assert not matches("a b", "a b c")
    assert not matches("a b", "a")
