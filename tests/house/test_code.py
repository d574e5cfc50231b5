"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

import brokertask
from brokertask import Settings, errors
from brokertask.cli.console import code_of
from brokertask.server.settings import ServerSettings

ROOT: Final = Path(__file__).resolve().parents[2]
MODULES: Final = sorted(
    path
    for folder in ("brokertask", "workers")
    for path in (ROOT / folder).rglob("*.py")
    if path.parent.name != "migrations"  # written by a program, never again by anybody
)
REFERENCE: Final = ROOT / "docs/reference"
LONGEST_MODULE: Final = 400
LONGEST_FUNCTION: Final = 40
MOST_OF_AN_IMPORT: Final = 2.5
ERRORS: Final = sorted(
    (
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.BrokertaskError)
    ),
    key=lambda kind: kind.__name__,
)
every_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(ROOT))
)


# --- names ----------------------------------------------------------------------------------------


def test_the_public_names_are_complete_and_sorted() -> None:
    public = [
        name
        for name, value in vars(brokertask).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    assert list(brokertask.__all__) == sorted(public)


def test_every_error_is_public() -> None:
    assert {kind.__name__ for kind in ERRORS} <= set(brokertask.__all__)


# --- modules --------------------------------------------------------------------------------------


@every_module
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE


@every_module
def test_functions_stay_small(path: Path) -> None:
    long = {name: length for name, length in _functions(path) if length > LONGEST_FUNCTION}
    assert not long


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """Tell how many lines the body of each function has, its docstring aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_the_rules_would_notice(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("def f():\n    '''Doc.\n\n    '''\n    x = 1\n" + "    x += 1\n" * 41)
    assert list(_functions(path)) == [("f", 42)]


def test_an_import_is_quick() -> None:
    """Measured against what it stands on, in turns: machines differ, and so do their moments."""
    pairs = [
        (_import_cpu("brokertask"), _import_cpu("aio_pika, anyio, pydantic.main")) for _ in range(5)
    ]
    ours, theirs = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    print(f"import brokertask: {ours:.0f} ms of CPU; its libraries: {theirs:.0f} ms")
    assert statistics.median(own / other for own, other in pairs) < MOST_OF_AN_IMPORT


def _import_cpu(modules: str) -> float:
    program = f"import time; began = time.process_time(); import {modules};"
    (seconds,) = _numbers(program + "print(time.process_time() - began)")
    return seconds


def _numbers(program: str) -> tuple[float, ...]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return tuple(float(number) for number in done.stdout.split())


# --- reference pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_explained(name: str) -> None:
    source = inspect.getsource(Settings)
    assert re.search(rf'^    {name}: .*?\n    """\w', source, re.MULTILINE), "no docstring"
    (row,) = _rows("settings.md", f"`{name}`")
    assert f"`BROKERTASK_{name.upper()}`" in row
    default = Settings.model_fields[name].default
    shown = {True: "true", False: "false", None: "none"}.get(default, f"{default}")
    assert f"| `{shown.removesuffix('.0')}` |" in row


def test_no_setting_is_explained_that_is_not_there() -> None:
    text = (REFERENCE / "settings.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert named == [*Settings.model_fields, *ServerSettings.model_fields]


@pytest.mark.parametrize("name", ServerSettings.model_fields)
def test_every_setting_of_a_server_is_explained(name: str) -> None:
    (row,) = _rows("settings.md", f"`{name}`")
    assert f"`BROKERTASK_SERVER_{name.upper()}`" in row
    default = ServerSettings.model_fields[name].default
    shown = {(): "[]", None: "none"}.get(default, f"{default}")
    assert f"| `{shown}` |" in row


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_is_explained(kind: type[errors.BrokertaskError]) -> None:
    assert kind.__doc__
    assert kind.__dict__.get("__doc__"), "its docstring is its parent's"
    (row,) = _rows("errors.md", f"`{kind.__name__}`")
    code, status = code_of(kind.__new__(kind))
    if code != "BT-000":
        assert f"| {code} | {int(status)} |" in row


@pytest.mark.parametrize("reason", errors.REASONS)
def test_every_reason_is_explained(reason: errors.Reason) -> None:
    (row,) = _rows("errors.md", f"`{reason}`")
    assert errors.REASONS[reason] in row


def _rows(page: str, first: str) -> list[str]:
    """Return the table rows of a reference page that begin with a cell."""
    lines = (REFERENCE / page).read_text().splitlines()
    return [line for line in lines if line.startswith(f"| {first} |")]
