"""The documentation is held to what it says: snippets run, commands exist, links lead somewhere.

`tests.house.pages` says how a page is read.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

import mypy.api
import pytest
import typer.main

from brokertask import App, Settings, Worker
from brokertask.cli.remote import TOKEN_VARIABLE, URL_VARIABLE
from brokertask.portal import portal
from brokertask.server.settings import ServerSettings
from infra.rabbitmq.installation import VARIABLE as RELEASE_VARIABLE
from tests.conftest import NODE_VARIABLE
from tests.house.pages import INDEX, README, ROOT, Block, Page, pages, read

PAGES: Final = pages()
NAMES: Final = [page.name for page in PAGES]
SHELLS: Final = ("sh", "bash", "shell", "console")
EXPECTED: Final = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)
PATHS: Final = re.compile(r"(?:tests|docs|infra|workers|brokertask)/[\w./-]+(?:::\w+)?")
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


# --- snippets -----------------------------------------------------------------------------------


@every_page
@pytest.mark.anyio
@pytest.mark.timeout(60)
async def test_the_snippets_of_a_page_run(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BROKERTASK_AMQP_URL", "memory:")
    monkeypatch.chdir(tmp_path)
    async with namespace(page) as module:
        for block in page.snippets:
            if block.mark != "run":
                continue
            capsys.readouterr()
            await run(block, page, module)
            expected = EXPECTED.findall(block.text)
            if expected:
                assert capsys.readouterr().out.splitlines() == expected, place(page, block)


async def run(block: Block, page: Page, module: ModuleType) -> None:
    """Run a snippet; then every test function that it defines."""
    before = set(vars(module))
    await execute(compiled(page, block), vars(module))
    for name in [name for name in vars(module) if name not in before and name.startswith("test_")]:
        test = vars(module)[name]
        if inspect.iscoroutinefunction(test):
            await test()
        else:
            await asyncio.to_thread(test)


async def execute(code: CodeType, names: dict[str, Any]) -> None:
    """Run code here if it awaits, else in a thread, as a program without an event loop would."""
    function = FunctionType(code, names)
    if code.co_flags & inspect.CO_COROUTINE:
        await function()
    else:
        await asyncio.to_thread(function)


def compiled(page: Page, block: Block) -> CodeType:
    """Compile a snippet so that tracebacks name the page and its lines."""
    code = compile(
        "\n" * block.line + block.text,
        page.name,
        "exec",
        flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        dont_inherit=True,
    )
    assert isinstance(code, CodeType)
    return code


@asynccontextmanager
async def namespace(page: Page) -> AsyncIterator[ModuleType]:
    """Make a module for the snippets of a page; afterwards close what they left open."""
    module = sys.modules[page.module] = ModuleType(page.module)
    try:
        yield module
    finally:
        values = list(vars(module).values())
        for worker in (value for value in values if isinstance(value, Worker)):
            await worker.stop(grace=0)
        for app in (value for value in values if isinstance(value, App)):
            await app.client.close()
        await asyncio.to_thread(portal.close)
        del sys.modules[page.module]


def place(page: Page, block: Block) -> str:
    return f"{page.name}:{block.line + 1}"


@every_page
def test_snippets_that_need_what_is_not_here_are_python(page: Page) -> None:
    for block in page.snippets:
        compiled(page, block)


def test_the_snippets_of_every_page_are_well_typed(tmp_path: Path) -> None:
    names = {}
    for page in PAGES:
        file = tmp_path / f"{page.module}.py"
        file.write_text(page.program, encoding="utf-8")
        names[str(file)] = page.name
    cache = ROOT / ".mypy_cache/docs"
    report, problems, _ = mypy.api.run(
        ["--strict", "--no-error-summary", f"--cache-dir={cache}", "--config-file=", *names]
    )
    assert not problems
    # Snippets are read as in `python -m asyncio`, where top-level code may await.
    wrong = [
        line.replace(file, name, 1)
        for line in report.splitlines()
        if "outside function" not in line and "outside async function" not in line
        for file, name in names.items()
        if line.startswith(f"{file}:")
    ]
    assert not wrong, "\n".join(wrong)


# --- commands -----------------------------------------------------------------------------------


@every_page
def test_every_command_shown_exists(page: Page) -> None:
    wrong = []
    for block in page.blocks:
        if block.language in SHELLS:
            for command in block.commands:
                for part in re.split(r"\s(?:\||&&|&)\s|\s&$", command):
                    wrong += [f"{place(page, block)}: {problem}" for problem in problems_of(part)]
    wrong += [
        f"{page.name}: `{span}`: {problem}"
        for span in page.spans
        if re.match(r"(brokertask|make) \w", span)
        for problem in problems_of(re.sub(r"\|\S+", "", span), whole=False)
    ]
    assert not wrong, "\n".join(wrong)


def problems_of(command: str, *, whole: bool = True) -> Iterator[str]:
    """Tell what is wrong with a command; `whole`: its arguments must be complete, too."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    match words:
        case ["brokertask", *arguments]:
            yield from problems_of_cli(arguments, whole=whole)
        case ["make", *targets]:
            yield from (f"no make target {name!r}" for name in targets if not is_target(name))
        case [python, "-m", module, *_] if python.startswith("python"):
            if importlib.util.find_spec(module) is None:
                yield f"no module {module!r}"
        case ["pip", "install", *packages]:
            extras = re.findall(r"brokertask\[([\w,-]+)\]", " ".join(packages))
            known = project()["optional-dependencies"]
            names = [name for extra in extras for name in extra.split(",")]
            yield from (f"no extra {name!r}" for name in names if name not in known)


def problems_of_cli(arguments: list[str], *, whole: bool) -> Iterator[str]:
    command, words = cli(), arguments
    context: Any = None
    while hasattr(command, "commands") and words:
        if words[0].startswith("-"):
            break
        if words[0] not in command.commands:
            yield f"{words[0]!r} is none of {', '.join(command.commands)}"
            return
        context = command.make_context(command.name, [], parent=context, resilient_parsing=True)
        command, words = command.commands[words[0]], words[1:]
    if whole:
        try:
            command.make_context(command.name, list(words), parent=context)
        except Exception as error:
            yield f"{' '.join(arguments)!r}: {getattr(error, 'message', '') or error!r}"
    else:
        known = {name for each in command.params for name in each.opts} | {"--help", "-h"}
        given = [word.partition("=")[0] for word in words if word.startswith("-")]
        yield from (f"{command.name} has no option {name}" for name in given if name not in known)


def cli() -> Any:
    from brokertask.cli.main import app

    return typer.main.get_command(app)


def variables(command: Any) -> Iterator[str]:
    """Return the environment variables that a command and those below it read."""
    for parameter in command.params:
        yield from [parameter.envvar] if isinstance(parameter.envvar, str) else ()
    for inner in getattr(command, "commands", {}).values():
        yield from variables(inner)


def is_target(word: str) -> bool:
    """Whether make knows a word: as a target, or as the value of a variable."""
    name, assigned, _ = word.partition("=")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    if assigned:
        return f"$({name})" in makefile
    return re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE) is not None


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return dict(tomllib.load(file)["project"])


@every_page
def test_every_setting_named_exists(page: Page) -> None:
    text = page.path.read_text(encoding="utf-8")
    named = set(re.findall(r"\bBROKERTASK_[A-Z][A-Z_]*\b", text))
    known = {f"BROKERTASK_{name.upper()}" for name in Settings.model_fields}
    known |= {f"BROKERTASK_SERVER_{name.upper()}" for name in ServerSettings.model_fields}
    known |= {URL_VARIABLE, TOKEN_VARIABLE}
    assert named <= {*known, *variables(cli()), NODE_VARIABLE, RELEASE_VARIABLE}


# --- links --------------------------------------------------------------------------------------


@every_page
def test_every_link_leads_somewhere(page: Page) -> None:
    wrong = []
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        if not path.exists() or ROOT not in path.parents:
            wrong.append(f"{link}: there is no such file")
        elif anchor and anchor not in read(path).anchors:
            wrong.append(f"{link}: there is no such heading")
    assert not wrong, f"{page.name}: {wrong}"


@every_page
def test_every_file_named_exists(page: Page) -> None:
    wrong = []
    for span in page.spans:
        if PATHS.fullmatch(span):
            name, _, function = span.partition("::")
            path = ROOT / name
            if not path.exists():
                wrong.append(f"{span}: there is no such file")
            elif function and f"def {function}(" not in path.read_text(encoding="utf-8"):
                wrong.append(f"{span}: there is no such test")
    assert not wrong, f"{page.name}: {wrong}"


def test_every_page_is_reached_from_the_index() -> None:
    reached, waiting = set[Path](), [INDEX]
    while waiting:
        page = read(waiting.pop())
        reached.add(page.path)
        for link in page.links:
            path = (page.path.parent / link.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.is_file() and path not in reached:
                waiting.append(path)
    assert {page.path for page in PAGES} - {README} <= reached


# --- the README ---------------------------------------------------------------------------------


def test_the_readme_takes_a_minute() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    first = read(README).blocks[0]
    assert len(lines) <= 90
    assert first.language == "python"
    assert first.line < 15


# --- this suite itself --------------------------------------------------------------------------


def test_a_page_is_taken_apart(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# A `page` of two, [linked](x.md)\n<!-- python\nx = 1\n-->\n<!-- not run -->\n"
        "```python\ny = 2\n```\n```console\n$ a b \\\n  c   # why\nd\n```\n[to](y.md#z)\n",
        encoding="utf-8",
    )
    page = read(path)
    hidden, shown, console = page.blocks
    assert (hidden.text, hidden.line, hidden.mark) == ("x = 1", 2, "run")
    assert (shown.text, shown.line, shown.mark) == ("y = 2", 6, "not run")
    assert list(console.commands) == ["a b    c"]
    assert page.links == ("x.md", "y.md#z")
    assert page.anchors == {"a-page-of-two-linked"}
    assert page.program.splitlines() == ["", "", "x = 1", "", "", "", "y = 2"]
