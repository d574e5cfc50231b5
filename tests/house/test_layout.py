"""What must be nowhere in the tree, and what importing the package must not bring along.

`test_code` holds the sizes and the public names.
"""

from __future__ import annotations

import ast
import inspect
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeAlias

import pytest

import brokertask
from brokertask import testing
from tests.house.pages import ROOT, Page, pages

MAX_HELP: Final = 1.0
HEAVY: Final = ("aio_pika", "aiormq", "typer", "rich", "opentelemetry.sdk")
"""What only some processes need."""
FOLDERS: Final = ("brokertask", "workers", "tests", "infra")
GUIDES: Final = [page for page in pages() if re.match(r"README|docs/(guides|reference)", page.name)]
Rule: TypeAlias = Callable[[ast.AST], bool]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def found(rule: Rule, paths: Iterable[Path]) -> list[str]:
    """Return where in these files something is that a rule speaks of."""
    return [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        for path in paths
        for node in ast.walk(tree(path))
        if rule(node)
    ]


# --- what is nowhere ------------------------------------------------------------------------------


def is_type_checking(node: ast.AST) -> bool:
    return "TYPE_CHECKING" in (getattr(node, name, None) for name in ("id", "attr", "name"))


def is_swallowing(node: ast.AST) -> bool:
    return isinstance(node, ast.ExceptHandler) and all(
        isinstance(line, ast.Pass)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in node.body
    )


def is_skipping(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and (
        node.attr in ("skipif", "xfail", "importorskip", "SkipTest", "skipTest")
        or ast.unparse(node) in ("pytest.skip", "pytest.mark.skip", "unittest.skip")
    )


def is_sleeping(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")


def test_no_import_is_for_the_type_checker_only() -> None:
    assert found(is_type_checking, sources(*FOLDERS)) == []


def test_no_error_is_passed_over() -> None:
    assert found(is_swallowing, sources(*FOLDERS)) == []


def test_no_test_is_skipped() -> None:
    assert found(is_skipping, sources("tests")) == []


def test_no_test_sleeps() -> None:
    # The programs that tests run are not among these: in them it is the tasks that block.
    tests = [path for path in sources("tests") if re.match(r"test_|conftest", path.name)]
    assert len(tests) > 30
    assert found(is_sleeping, tests) == []


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (is_type_checking, "from typing import TYPE_CHECKING"),
        (is_type_checking, "if typing.TYPE_CHECKING: import x"),
        (is_swallowing, "try: x\nexcept ValueError: pass"),
        (is_swallowing, "try: x\nexcept ValueError: ..."),
        (is_skipping, "@pytest.mark.skip\ndef test(): ..."),
        (is_skipping, "pytestmark = pytest.mark.skipif(True, reason='')"),
        (is_skipping, "pytest.skip('later')"),
        (is_sleeping, "time.sleep(1)"),
    ],
)
def test_each_rule_finds_what_it_forbids(rule: Rule, code: str) -> None:
    assert any(rule(node) for node in ast.walk(ast.parse(code)))
    allowed = ast.parse("try: x\nexcept A: log(A)\nawait asyncio.sleep(0)\npytest.mark.anyio")
    assert not any(rule(node) for node in ast.walk(allowed))


# --- what is everywhere ---------------------------------------------------------------------------


def test_every_module_says_what_it_is() -> None:
    silent = [str(path) for path in sources("brokertask") if not ast.get_docstring(tree(path))]
    assert silent == []


@pytest.mark.parametrize("page", GUIDES, ids=[page.name for page in GUIDES])
def test_the_classes_that_a_guide_names_are_public(page: Page) -> None:
    public = {*brokertask.__all__, *(name for name, _ in inspect.getmembers(testing))}
    ours = {
        node.name
        for path in sources("brokertask")
        for node in tree(path).body
        if isinstance(node, ast.ClassDef)
    }
    own = set(re.findall(r"\bclass (\w+)", page.program))
    named = {word for span in page.spans for word in re.findall(r"\b[A-Z]\w+", span)}
    assert (named & ours) - public - own == set()


# --- what an import costs -------------------------------------------------------------------------


def test_importing_the_package_brings_nothing_heavy() -> None:
    program = f"import sys, brokertask; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_help_of_the_command_is_there_at_once() -> None:
    """Within a second of processor time, as on a busy machine the clock tells of others."""
    command = [str(Path(sys.executable).with_name("brokertask")), "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "worker" in done.stdout
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < MAX_HELP
