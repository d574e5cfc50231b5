"""What a run waits for, as it is told, for each thing that it may wait for."""

from __future__ import annotations

from typing import Any

import pytest

from brokertask.server.why import Facts, reasons
from brokertask.transport.base import Depth

NOW_MS = 1_800_000_000_000
SLOTS = {"charge": {"slots": 2, "busy": 2}}
WORKER = {"worker": "w", "state": "working", "tasks": SLOTS}


def facts(status: str, **more: Any) -> Facts:
    run = {
        "task": "charge",
        "status": status,
        "reason": None,
        "error_type": "TimeoutError",
        "error_message": "no answer",
        "discarded_ms": None,
        "due_ms": None,
        "attempt": 2,
        "worker": "w",
        "at_ms": NOW_MS - 3_000,
    }
    given: dict[str, Any] = {
        "waits": (),
        "paused": None,
        "queue": Depth(7, 1),
        "workers": [WORKER],
        "cancelled": False,
    }
    own = {name: more.pop(name) for name in list(more) if name in given}
    return Facts(run={**run, **more}, now_ms=NOW_MS, **{**given, **own})


@pytest.mark.parametrize(
    ("given", "codes", "words"),
    [
        (facts("completed"), ["completed"], "it has completed"),
        (facts("expired"), ["expired"], "too late to start"),
        (facts("cancelled", reason="closing"), ["cancelled"], "cancelled: closing"),
        (facts("failed", reason="max_attempts"), ["dead"], "(max_attempts), by TimeoutError"),
        (facts("failed", discarded_ms=1), ["discarded"], "was discarded"),
        (facts("delayed", due_ms=NOW_MS + 60_000), ["delay"], "begins in 1m"),
        (facts("retrying", due_ms=NOW_MS + 4_000), ["retry"], "no answer; the next one begins"),
        (facts("sleeping", due_ms=NOW_MS + 4_000), ["sleep"], "goes on in 4.0 s"),
        (facts("waiting", waits=["token:approval"]), ["waits"], "waits for token:approval"),
        (facts("queued"), ["slots", "queue"], "all 2 slots of 1 workers are busy"),
        (facts("queued", workers=[]), ["queue"], "7 runs of charge wait"),
        (facts("queued", queue=None), ["no_queue"], "no queue of charge"),
        (facts("queued", queue=Depth(7, 0)), ["no_worker", "queue"], "no worker consumes"),
        (
            facts("queued", queue=Depth(7, 0), workers=[{**WORKER, "state": "draining"}]),
            ["no_worker", "queue"],
            "1 that have it take no more work",
        ),
        (
            facts("queued", workers=[], paused={"reason": "bank down", "at_ms": NOW_MS - 5_000}),
            ["paused", "queue"],
            "paused 5.0 s ago: bank down",
        ),
        (facts("retrying", due_ms=NOW_MS - 1, workers=[]), ["queue"], "wait in its queue"),
        (facts("running"), ["running"], "attempt 2, on w; heard of 3.0 s ago"),
        (facts("running", workers=[{**WORKER, "state": "silent"}]), ["lost"], "worker is silent"),
        (facts("running", cancelled=True), ["cancelling", "running"], "it is cancelled"),
    ],
)
def test_what_a_run_waits_for_is_told(given: Facts, codes: list[str], words: str) -> None:
    found = reasons(given)
    assert [one.code for one in found] == codes
    assert words in found[0].what
