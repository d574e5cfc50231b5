"""What of a run's time is drawn, from whatever was told of it; forms, statuses, texts of pages."""

from __future__ import annotations

from io import StringIO
from typing import get_args

import pytest
from rich.console import Console

from brokertask.cli import console
from brokertask.server.api.beginnings import BeginningView
from brokertask.server.api.problems import Problem
from brokertask.server.api.runs import AttemptView, RunView, Status
from brokertask.server.api.waits import WaitView
from brokertask.server.console.forms import fields, payload_of
from brokertask.server.console.html import block, plain, visible
from brokertask.server.console.timeline import Span, Told, spans
from brokertask.server.runs import STATUSES as KNOWN
from brokertask.statuses import STATUSES, status_of


def a_run(status: str, *, at_ms: int = 0, due_ms: int | None = None) -> RunView:
    ended_ms = at_ms if status in ("completed", "failed") else None
    named = {"run_id": "r", "task": "t", "status": status, "attempt": 1, "redrives": 0}
    times = {"triggered_ms": 1_000, "at_ms": at_ms, "due_ms": due_ms, "ended_ms": ended_ms}
    unset = dict.fromkeys(set(RunView.model_fields) - {*named, *times, "waits", "tags"})
    return RunView.model_validate({**unset, **named, **times, "waits": [], "tags": []})


def an_attempt(number: int, ended_ms: int, delay_ms: int | None = None) -> AttemptView:
    outcome = "completed" if delay_ms is None else "retrying"
    unset = dict.fromkeys(AttemptView.model_fields)
    known = {"redrives": 0, "attempt": number, "outcome": outcome, "worker": "w"}
    return AttemptView.model_validate(
        {**unset, **known, "ended_ms": ended_ms, "delay_ms": delay_ms}
    )


def began(number: int, began_ms: int) -> BeginningView:
    return BeginningView(redrives=0, attempt=number, worker="w", began_ms=began_ms)


def drawn(told: Told) -> list[tuple[str, int, int | None]]:
    return [(span.label, span.since_ms, span.until_ms) for span in spans(told)]


def test_attempts_and_what_is_between_them() -> None:
    told = Told(
        run=a_run("completed", at_ms=9_000),
        attempts=[an_attempt(1, 3_000, 5_000), an_attempt(2, 9_000)],
        beginnings=[began(1, 1_500), began(2, 8_100)],
        steps=[
            {"redrives": 0, "attempt": 2, "name": "one", "ended_ms": 8_400},
            {"redrives": 0, "attempt": 2, "name": "two", "ended_ms": 8_900},
        ],
    )
    assert drawn(told) == [
        ("queued", 1_000, 1_500),
        ("attempt 1", 1_500, 3_000),
        ("wait for the retry", 3_000, 8_100),
        ("attempt 2", 8_100, 9_000),
        ("one", 8_100, 8_400),
        ("two", 8_400, 8_900),
    ]


def test_what_goes_on_has_no_end() -> None:
    running = Told(run=a_run("running", at_ms=2_000), beginnings=[began(1, 2_000)])
    assert drawn(running) == [("queued", 1_000, 2_000), ("attempt 1", 2_000, None)]
    assert drawn(Told(run=a_run("queued"))) == [("queued", 1_000, None)]
    assert drawn(Told(run=a_run("delayed", due_ms=7_000))) == [("delayed", 1_000, 7_000)]


def test_an_attempt_that_nobody_ended_was_lost_when_the_next_began() -> None:
    told = Told(
        run=a_run("completed", at_ms=9_000),
        attempts=[an_attempt(2, 9_000)],
        beginnings=[began(1, 2_000), began(2, 6_000)],
    )
    lost = spans(told)[1]
    assert (lost.label, lost.until_ms, lost.note) == ("attempt 1", 6_000, "it was lost")


def test_without_beginnings_an_attempt_is_drawn_from_when_it_could_begin() -> None:
    told = Told(
        run=a_run("completed", at_ms=9_000),
        attempts=[an_attempt(1, 3_000, 5_000), an_attempt(2, 9_000)],
    )
    assert drawn(told)[0] == ("attempt 1", 1_000, 3_000)
    assert drawn(told)[2] == ("attempt 2", 8_000, 9_000)


def test_a_wait_is_within_its_attempt() -> None:
    wait = WaitView(
        key="k", state="waiting", since_ms=3_000, due_ms=None, over_ms=None, what=["token a"]
    )
    told = Told(run=a_run("waiting", at_ms=3_000), beginnings=[began(1, 2_000)], waits=[wait])
    assert spans(told)[-1] == Span(
        kind="wait", label="token a", since_ms=3_000, until_ms=None, status="waiting"
    )


def test_a_form_keeps_every_digit_and_leaves_out_what_is_empty() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "number": {"type": "integer"},
            "sure": {"type": "boolean"},
            "size": {"type": "string", "enum": ["s", "l"]},
            "lines": {"type": "array"},
        },
        "required": ["name"],
    }
    found = fields(schema)
    assert [field.kind for field in found] == ["text", "number", "choice", "choice", "json"]
    form = {"payload.name": "7", "payload.number": "9007199254740993", "payload.size": '"l"'}
    assert payload_of(found, form) == {"name": "7", "number": 9_007_199_254_740_993, "size": "l"}
    with pytest.raises(Problem, match="number"):
        payload_of(found, {"payload.number": "seven"})
    assert payload_of(fields({"type": "integer"}), {"payload": "7"}) == 7
    assert payload_of(fields(None), {"payload": ""}) is None


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert plain("a\u202eb\0\n") == "a\\u202eb\\x00\\n"
    assert visible("<b>\u2066") == '<bdi>&lt;b&gt;<span class="unseen">\\u2066</span></bdi>'
    assert visible("a\nb\ud800", breaks=True) == (
        '<bdi>a\nb<span class="unseen">\\ud800</span></bdi>'
    )
    assert block({"n": 2**63 - 1})[0] == "<bdi>{\n  &#34;n&#34;: 9223372036854775807\n}</bdi>"


def test_there_is_one_vocabulary_of_statuses() -> None:
    assert set(STATUSES) == set(KNOWN) == set(get_args(Status))
    assert len({each.mark for each in STATUSES.values()}) == len(STATUSES)
    assert status_of("of a newer server").mark == "?"


def test_a_status_has_its_colour_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(file=StringIO(), force_terminal=True, color_system="standard", width=80)
    monkeypatch.setattr(console, "out", out)
    console.show_table(("RUN", "STATUS"), [("r", "failed"), ("\x1b[31m", "of tomorrow")])
    assert isinstance(out.file, StringIO)
    told = out.file.getvalue()
    assert "r         \x1b[31mfailed\x1b[0m" in told
    assert "\\x1b[31m" in told
