"""A day of faults from the command line: a table, and exit code 1 if a rule was broken."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from infra.rabbitmq.node import Node
from tests.crash.stage import private_node

Options = TypeVar("Options")
Say = Callable[[str], None]


class Outcome(Protocol):
    """What came of it."""

    def table(self) -> str:
        """Return it for people."""
        ...

    def violations(self) -> Iterator[str]:
        """Say what must not be."""
        ...


def spend(
    options: type[Options],
    play: Callable[[Node, Path, Options, Say], Awaitable[Outcome]],
    *,
    description: str | None,
) -> NoReturn:
    """Play a day on a private node, with a number on the command line for each of the options."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in vars(options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="keep journals and logs there")
    given = vars(parser.parse_args())
    kept: Path | None = given.pop("folder")
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {text}", file=sys.stderr, flush=True)

    async def whole(node: Node, folder: Path) -> Outcome:
        return await play(node, folder, options(**given), say)

    logging.basicConfig(level=logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="brokertask-day-") as name:
        folder = kept or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        node = private_node(folder / "node")
        try:
            outcome = asyncio.run(whole(node, folder))
        finally:
            node.destroy()
    print(outcome.table())
    violations = list(outcome.violations())
    for violation in violations:
        print(f"VIOLATION  {violation}")
    sys.exit(1 if violations else 0)
