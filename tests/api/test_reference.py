"""The page about the API has every operation and every problem, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from brokertask.server.api.app import OPERATIONS
from brokertask.server.api.problems import KINDS

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/http-api.md").read_text()


def test_each_operation_is_in_the_reference_with_its_role() -> None:
    told = re.findall(r"^\| `([A-Z]+) (/\S+)` \| (.+?) \|", PAGE, re.MULTILINE)
    made = []
    for each in OPERATIONS:
        role = "none" if each.public else f"`{each.role}`"
        made.append((each.method, each.path, role + (" and payloads" if each.reveals else "")))
    assert sorted(told) == sorted(made)


def test_each_problem_is_in_the_reference() -> None:
    told = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(told) == sorted((str(status), kind) for kind, (status, _) in KINDS.items())
