"""mypy and pyright infer what `accepted` says, and refuse each marked line of `rejected`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import mypy.api
import pytest

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
MARK: Final = re.compile(r"  # type: ignore\[[a-z, -]+\]$", re.MULTILINE)


def mypy_lines(file: Path) -> set[int]:
    """Return the lines that mypy --strict finds wrong."""
    cache = ROOT / ".mypy_cache/typing"
    report, problems, _ = mypy.api.run(
        ["--strict", "--config-file=", f"--cache-dir={cache}", str(file)]
    )
    assert not problems
    assert re.search(r"^(Found|Success)", report, re.MULTILINE), report
    return {int(line) for line in re.findall(r"^[^:\n]+:(\d+): error:", report, re.MULTILINE)}


def pyright_lines(file: Path) -> set[int]:
    """Return the lines that pyright finds wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", f"--pythonpath={sys.executable}", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    return {
        problem["range"]["start"]["line"] + 1
        for problem in report["generalDiagnostics"]
        if problem["severity"] == "error"
    }


both = pytest.mark.parametrize("lines", [mypy_lines, pyright_lines])


@both
def test_what_is_right_is_accepted(lines: Callable[[Path], set[int]]) -> None:
    assert lines(HERE / "accepted.py") == set()


@both
def test_each_wrong_line_is_refused(lines: Callable[[Path], set[int]], tmp_path: Path) -> None:
    text = (HERE / "rejected.py").read_text()
    bare = tmp_path / "rejected.py"
    bare.write_text(MARK.sub("", text))
    marked = {number for number, line in enumerate(text.splitlines(), 1) if MARK.search(line)}
    assert len(marked) > 20
    assert lines(bare) == marked


@both
def test_a_wrong_type_would_be_seen(lines: Callable[[Path], set[int]], tmp_path: Path) -> None:
    text = (HERE / "accepted.py").read_text()
    changed = tmp_path / "accepted.py"
    changed.write_text(text.replace("Task[Document, Report])\n", "Task[Document, int])\n"))
    assert len(lines(changed)) >= 2
