"""The documentation as data: pages with their snippets, commands and links.

    ```python            run, in order, all of a page in one namespace; `await` needs no function
    <!-- python … -->    the same, but not shown: what a reader has anyway, such as a running worker
    <!-- not run -->     before a snippet: only type-checked, with the rest of its page
    <!-- not ours -->    before a snippet: only parsed; it needs what is not installed here
    print(x)  # text     in a snippet that is run: it prints that text
    ```console           lines that begin with `$ ` are commands; in ```sh every line is one

docs/contributing.md says the same to authors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

ROOT: Final = Path(__file__).resolve().parents[2]
README: Final = ROOT / "README.md"
INDEX: Final = ROOT / "docs/index.md"

Mark: TypeAlias = Literal["run", "not run", "not ours"]

_FENCE: Final = re.compile(r"^( *)(```+)\s*([\w-]*)")
_MARK: Final = re.compile(r"^\s*<!-- (not run|not ours) -->\s*$")
_LINK: Final = re.compile(r"(?<!!)\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^()\s]+)\)")
_CODE: Final = re.compile(r"`([^`\n]+)`")
_HEADING: Final = re.compile(r"^#{1,6} (.+?)\s*$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, or what a `<!-- python` comment hides."""

    language: str
    text: str
    line: int
    """The line of the page, from 0, that its first line is on."""
    mark: Mark = "run"

    @property
    def commands(self) -> Iterator[str]:
        """The shell commands in it, each on one line, without comments."""
        text = self.text.replace("\\\n", " ")
        for line in text.splitlines():
            command = line.strip()
            if self.language == "console":
                if not command.startswith("$ "):
                    continue
                command = command.removeprefix("$ ")
            if command and not command.startswith("#"):
                yield re.sub(r"\s+#\s.*$", "", command)


@dataclass(frozen=True, slots=True)
class Page:
    """A Markdown file, taken apart."""

    path: Path
    blocks: tuple[Block, ...]
    prose: str
    """The text without blocks and comments; every line is on its own line still."""

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def module(self) -> str:
        """A name for its snippets, as a module."""
        return "page_" + re.sub(r"\W+", "_", self.name.removesuffix(".md"))

    @property
    def snippets(self) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.language == "python")

    @property
    def program(self) -> str:
        """What of its Python is ours, each line on the line that it has on the page."""
        lines: list[str] = []
        for block in self.snippets:
            if block.mark != "not ours":
                lines += [""] * (block.line - len(lines)) + block.text.splitlines()
        return "\n".join(lines) + "\n"

    @property
    def links(self) -> tuple[str, ...]:
        """Targets of its links, as written."""
        return tuple(_LINK.findall(_CODE.sub("``", self.prose)))

    @property
    def spans(self) -> tuple[str, ...]:
        """What stands between backticks in its prose."""
        return tuple(_CODE.findall(self.prose))

    @property
    def anchors(self) -> frozenset[str]:
        """The anchors that GitHub gives its headings."""
        found: dict[str, int] = {}
        for line in self.prose.splitlines():
            if heading := _HEADING.match(line):
                slug = _slug(heading[1])
                count = found[slug] = found.get(slug, -1) + 1
                if count:
                    found[f"{slug}-{count}"] = 0
        return frozenset(found)


def pages() -> list[Page]:
    """Return every page: the README, the changelog, and what is below docs/."""
    files = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [read(path) for path in files]


def read(path: Path) -> Page:
    """Take a Markdown file apart."""
    lines = path.read_text(encoding="utf-8").splitlines()
    blocks: list[Block] = []
    prose = [""] * len(lines)
    mark: Mark = "run"
    at = 0
    while at < len(lines):
        line = lines[at]
        if marked := _MARK.match(line):
            mark = "not run" if marked[1] == "not run" else "not ours"
            at += 1
            continue
        if fence := _FENCE.match(line):
            end = _find(lines, at + 1, rf"^ *{fence[2]}\s*$")
            indent = len(fence[1])
            text = "\n".join(inner[indent:] for inner in lines[at + 1 : end])
            blocks.append(Block(fence[3], text, at + 1, mark))
            mark, at = "run", end + 1
            continue
        if line.startswith("<!--"):
            end = at if line.rstrip().endswith("-->") else _find(lines, at + 1, r"-->\s*$")
            if line.rstrip() != "<!-- python":
                raise ValueError(f"{path.name}:{at + 1}: {line!r} means nothing here")
            blocks.append(Block("python", "\n".join(lines[at + 1 : end]), at + 1))
            at = end + 1
            continue
        prose[at] = line
        at += 1
    return Page(path, tuple(blocks), "\n".join(prose))


def _find(lines: list[str], start: int, pattern: str) -> int:
    for number, line in enumerate(lines[start:], start):
        if re.search(pattern, line):
            return number
    raise ValueError(f"nothing ends what begins before line {start + 1}")


def _slug(heading: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
