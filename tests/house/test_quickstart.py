"""The quickstart, done as it is written: its file, its two terminals, its output."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from pathlib import Path
from typing import Final

import pytest

from tests.house.pages import ROOT, Block, Page, read

PAGE: Final = read(ROOT / "docs/quickstart.md")
SECONDS: Final = 20.0
READY: Final = "ready; Ctrl-C stops"


@pytest.mark.anyio
async def test_the_quickstart_happens_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(PAGE.snippets[0].text, encoding="utf-8")
    begin, *rest = [block for block in PAGE.blocks if block.language == "console"]
    terminal = Terminal(tmp_path)
    async with asyncio.timeout(60):
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
        await self._process.wait()
        assert self._reading is not None
        await self._reading

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            async with self._more:
                self.said += line.decode()
                self._more.notify_all()


def exchanges(block: Block) -> list[tuple[str, str]]:
    """Return each command of a console block with the output shown below it."""
    parts = re.split(r"^\$ (.*)$", block.text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


async def start(command: str, folder: Path) -> Process:
    program, *arguments = shlex.split(command)
    words = [sys.executable, "-m", "brokertask.cli"] if program == "brokertask" else [program]
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    path = os.pathsep.join(str(place) for place in (ROOT, *sys.path) if place)
    environment = {**kept, "PYTHONPATH": path, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    return await asyncio.create_subprocess_exec(
        *words, *arguments, cwd=folder, env=environment, stdout=PIPE, stderr=STDOUT
    )


async def output(command: str, folder: Path) -> str:
    process = await start(command, folder)
    async with asyncio.timeout(SECONDS):
        said, _ = await process.communicate()
    return said.decode()


def matches(shown: str, said: str) -> bool:
    """Whether `said` is what is shown, but for spaces and for what `…` stands for."""
    pattern = " ".join(re.escape(word).replace("…", ".*?") for word in shown.split())
    return re.fullmatch(pattern, " ".join(said.split()), re.DOTALL) is not None


def place(page: Page, block: Block) -> str:
    return f"{page.name}:{block.line + 1}"


def test_an_output_matches_as_a_whole() -> None:
    assert matches("a  b\n… c d…", "a b\nxyz 1  c def\n")
    assert not matches("a b", "a b c")
    assert not matches("a b", "a")
