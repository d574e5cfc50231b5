"""`brokertask dev` in real processes: the embedded broker, events as lines, and reload."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, Field, TypeAdapter

from brokertask import App, Run, Settings
from brokertask.cli.example import example
from tests.flow.command import SECONDS, Command, brokertask, until_gone

pytestmark = pytest.mark.anyio

TASKS = """
import asyncio
from pydantic import BaseModel
from brokertask import App, Context, Retry

app = App("subject")


class Document(BaseModel):
    path: str
    pages: int = 3


@app.task
async def version(document: Document) -> int:
    return 1


@app.task(retry=Retry(max_attempts=2, min_delay=0.1))
async def fail() -> None:
    raise ValueError("always")


@app.task
async def slow(seconds: float) -> int:
    print("slow begins on version 1", flush=True)
    await asyncio.sleep(seconds)
    return 1
"""


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks.py").write_text(TASKS)
    return tmp_path


@asynccontextmanager
async def dev(
    folder: Path, *arguments: str, app: str = "tasks:app", **environment: str
) -> AsyncIterator[Command]:
    # Wherever there is room: other tests run beside this one.
    own = {"BROKERTASK_SERVER_BIND": "127.0.0.1:0"} | environment
    async with brokertask("dev", app, *arguments, folder=folder, environment=own) as command:
        yield command


@asynccontextmanager
async def client(folder: Path) -> AsyncIterator[App]:
    url = f"unix:{folder / '.brokertask' / 'dev.sock'}"
    async with App("test", settings=Settings(amqp_url=url)) as app:
        yield app


@asynccontextmanager
async def client_of(command: Command, folder: Path) -> AsyncIterator[App]:
    """Return a client once `dev` is ready."""
    await command.line("ready")
    async with client(folder) as app:
        yield app


async def version(app: App) -> object:
    run: Run[Any] = await app.client.trigger("version", {"path": "a.txt"})
    return await run.result(timeout=SECONDS)


async def test_it_says_what_runs_where_and_ends_with_ctrl_c(folder: Path) -> None:
    async with dev(folder) as command:
        await command.line("NOT FOR PRODUCTION")
        await command.line("embedded, in memory: it forgets everything at exit")
        await command.line("reload on *.py in the current folder")
        await command.line("version (10), fail (10), slow (10)")
        await command.line("""Try     brokertask trigger version '{"path": "text"}'""")
        await command.line("ready")
        command.send(signal.SIGINT)
        assert await command.end() == 0
    assert not (folder / ".brokertask" / "dev.sock").exists()


async def test_every_event_is_a_line(folder: Path) -> None:
    async with dev(folder, "--no-reload") as command:
        await command.line("no reload")
        await command.line("ready")
        async with client(folder) as app:
            run: Run[Any] = await app.client.trigger("version", {"path": "a.txt"})
            assert await command.line(f"✔ version  {run.run_id[-8:]}")
            run = await app.client.trigger("fail")
            retrying = await command.line(
                f"↻ fail  {run.run_id[-8:]}  attempt 1  ValueError: always"
            )
            assert "again in" in retrying
            await command.line("attempt 2  ValueError: always  dead-lettered (max_attempts)")
        command.send(signal.SIGINT)
        assert await command.end() == 0


async def test_a_changed_file_is_run_and_a_broken_one_is_not(folder: Path) -> None:
    file = folder / "tasks.py"
    async with dev(folder) as command, client_of(command, folder) as app:
        assert await version(app) == 1
        file.write_text(TASKS.replace("return 1", "return 2"))
        await command.line("reloaded in")
        assert await version(app) == 2
        file.write_text("def broken(:\n")
        await command.line("SyntaxError")
        await command.line("not reloaded (exit code 3): keeping the last good worker")
        assert await version(app) == 2
        file.write_text(TASKS.replace("return 1", "return 3"))
        await command.line("reloaded in")
        assert await version(app) == 3
        command.send(signal.SIGINT)
        assert await command.end() == 0


async def test_a_run_in_flight_finishes_on_the_code_it_began_with(folder: Path) -> None:
    async with dev(folder) as command, client_of(command, folder) as app:
        run: Run[Any] = await app.client.trigger("slow", 3)
        await command.line("slow begins on version 1")
        (folder / "tasks.py").write_text(TASKS.replace("return 1", "return 2"))
        await command.line("reloaded in")
        assert await version(app) == 2
        assert await run.result(timeout=SECONDS) == 1
        command.send(signal.SIGINT)
        assert await command.end() == 0


async def test_a_module_in_a_package_reloads_with_its_whole_package(tmp_path: Path) -> None:
    package = tmp_path / "shop" / "jobs"
    package.mkdir(parents=True)
    for part in (package.parent, package):
        (part / "__init__.py").touch()
    (package.parent / "values.py").write_text("value = 1\n")
    source = "from shop.values import value\n" + TASKS.replace("return 1", "return value")
    (package / "tasks.py").write_text(source)
    async with dev(tmp_path, app="shop.jobs.tasks:app") as command:
        await command.line("reload on *.py in shop")
        async with client_of(command, tmp_path) as app:
            (package.parent / "values.py").write_text("value = 2\n")
            await command.line("reloaded in")
            assert await version(app) == 2


async def test_a_server_beside_it_remembers_until_the_end(folder: Path) -> None:
    place = folder / ".brokertask"
    place.mkdir()
    (place / "dev.db").write_text("of one that was killed")
    async with dev(folder, "--no-reload") as command:
        url = (await command.line("Server   http://127.0.0.1:")).split()[-1]
        async with client_of(command, folder) as app:
            run: Run[Any] = await app.client.trigger("version", {"path": "a"}, idempotency_key="k")
            assert await run.result(timeout=SECONDS) == 1
            again: Run[Any] = await app.client.trigger(
                "version", {"path": "a"}, idempotency_key="k"
            )
            assert again.run_id == run.run_id
            found = await asyncio.to_thread(_got, f"{url}/runs/{run.run_id}/result?wait=20")
            assert found["result"] == 1
        command.send(signal.SIGINT)
        assert await command.end() == 0
    assert [path.name for path in place.iterdir()] == [".gitignore"]


def _got(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


async def test_it_goes_on_without_a_server(folder: Path) -> None:
    async with dev(folder, "--no-reload", "--no-server") as command:
        await command.line("Server  none")
        async with client_of(command, folder) as app:
            assert await version(app) == 1
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "sqlalchemy.py").write_text("raise ModuleNotFoundError('no', name='sqlalchemy')\n")
    path = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
    async with dev(folder, "--no-reload", PYTHONPATH=path) as command:
        await command.line("Server  none: sqlalchemy is missing; pip install 'brokertask[server]'")
        async with client_of(command, folder) as app:
            assert await version(app) == 1


async def test_an_address_that_is_taken_is_an_error(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with dev(folder, "--no-reload", BROKERTASK_SERVER_BIND=address) as command:
            assert await command.end() == 2
    assert f"cannot listen on {address}" in command.output
    assert "set BROKERTASK_SERVER_BIND, or use --no-server" in command.output


async def test_a_second_one_in_the_same_folder_is_refused(folder: Path) -> None:
    async with dev(folder) as first:
        await first.line("ready")
        async with dev(folder) as second:
            assert await second.end() == 2
        assert "already listens" in second.output
        async with client(folder) as app:
            assert await version(app) == 1


async def test_it_uses_the_broker_it_is_told_to(folder: Path, amqp_url: str) -> None:
    async with dev(folder, "--no-reload", BROKERTASK_AMQP_URL=amqp_url) as command:
        line = await command.line("(BROKERTASK_AMQP_URL), not the embedded one")
        assert "guest:***@" in line
        await command.line("ready")
        async with App("test", settings=Settings(amqp_url=amqp_url)) as app:
            assert await version(app) == 1
        await command.line("✔ version")
        command.send(signal.SIGINT)
        assert await command.end() == 0
    assert not (folder / ".brokertask").exists()


async def test_an_app_with_settings_of_its_own_is_warned_of(folder: Path, tmp_path: Path) -> None:
    own = 'App("subject", settings=Settings(namespace="own"))'
    source = TASKS.replace('App("subject")', own).replace("import App", "import App, Settings")
    (folder / "tasks.py").write_text(source)
    async with dev(folder) as command:
        await command.line("the app's own settings choose unix:.brokertask/dev.sock, namespace own")


async def test_its_children_go_with_it(folder: Path) -> None:
    async with dev(folder) as command:
        await command.line("ready")
        children = [int(pid) for pid in _children(command.pid)]
        assert len(children) == 1
        command.send(signal.SIGKILL)
        await until_gone(children[0])


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def test_a_first_start_that_fails_ends_it(folder: Path) -> None:
    (folder / "tasks.py").write_text("1 / 0\n")
    async with dev(folder) as command:
        assert await command.end() == 3
    assert command.output.count("error[") == 1


async def test_reload_without_watchfiles_is_an_error(folder: Path) -> None:
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "watchfiles.py").write_text("raise ImportError('not installed')\n")
    async with dev(folder, PYTHONPATH=str(hidden)) as command:
        assert await command.end() == 2
    assert "pip install 'brokertask[reload]'" in command.output
    async with dev(folder, "--no-reload", PYTHONPATH=str(hidden)) as command:
        await command.line("ready")


async def test_a_memory_broker_is_refused(folder: Path) -> None:
    async with dev(folder, BROKERTASK_AMQP_URL="memory:") as command:
        assert await command.end() == 2
    assert "unset it" in command.output


class Colour(StrEnum):
    RED = "red"


class Item(BaseModel):
    name: str = Field(min_length=6, max_length=8)
    count: int = Field(ge=5, multiple_of=4)
    parent: Item | None = None


class Order(BaseModel):
    id: UUID
    at: datetime
    colour: Colour
    kind: Literal["a", "b"]
    items: list[Item] = Field(min_length=2)
    pair: tuple[int, str]
    notes: dict[str, str]
    price: float = Field(gt=0, lt=10)
    flag: bool
    nickname: str = "nobody"


@pytest.mark.parametrize(
    "kind",
    [
        int,
        str,
        None,
        list[int],
        Item,
        Order,
        Item | int,
        Annotated[str, Field(examples=["b"])],
        dict[str, int],
        datetime,
        Path,
        Any,
    ],
)
def test_an_example_is_valid(kind: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    adapter.validate_json(TypeAdapter(Any).dump_json(example(adapter.json_schema())))
