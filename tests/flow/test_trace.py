"""Traces end to end: a real broker and worker, OTLP over HTTP, the tree that arrives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.otlp import OtlpReceiver, Span, tree

ROOT = Path(__file__).resolve().parents[2]
CLIENT = """
import asyncio, sys
from brokertask import RunFailed, telemetry
from tests.flow.traced import app

async def main() -> None:
    async with app:
        task, payload = sys.argv[1], int(sys.argv[2])
        run = await app.client.trigger(task, payload)
        try:
            await run.result(timeout=30)
        except RunFailed:
            pass

flush = telemetry.configure("shop")
asyncio.run(main())
flush()
"""


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def environment(amqp_url: str, receiver: OtlpReceiver) -> dict[str, str]:
    return {
        **os.environ,
        "BROKERTASK_AMQP_URL": amqp_url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        # Longer than the test: what arrives was flushed on the way out.
        "OTEL_BSP_SCHEDULE_DELAY": "120000",
    }


def run_traced(environment: dict[str, str], task: str, payload: int) -> None:
    """Start a worker, let a client process trigger one run and await it, stop the worker."""
    command = (sys.executable, "-m", "brokertask.cli", "worker", "tests.flow.traced:app")
    worker = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        subprocess.run(
            (sys.executable, "-c", CLIENT, task, str(payload)),
            env=environment,
            cwd=ROOT,
            check=True,
            timeout=60,
        )
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 0


def one(spans: list[Span], name: str) -> Span:
    (span,) = [span for span in spans if span.name == name]
    return span


def test_retried_then_successful_is_one_flat_trace(
    receiver: OtlpReceiver, environment: dict[str, str]
) -> None:
    run_traced(environment, "flaky", 3)
    spans = receiver.spans()
    root = one(spans, "trigger flaky")
    attempts = [span for span in spans if span.name == "process flaky"]
    waits = [span for span in spans if span.name == "wait retry"]
    assert root.parent_id == ""
    assert {span.trace_id for span in spans} == {root.trace_id}
    assert {span.parent_id for span in spans if span is not root} == {root.span_id}, tree(spans)
    assert [span.status == "ERROR" for span in attempts] == [True, True, False]
    assert [link.span_id for span in attempts for link in span.links] == [
        attempts[0].span_id,
        attempts[1].span_id,
    ]
    # The wait fills the gap between two attempts.
    for wait, before, after in zip(waits, attempts[:-1], attempts[1:], strict=True):
        # It is back-dated from instants in milliseconds.
        assert before.start_ns // 10**6 <= wait.start_ns // 10**6
        assert wait.end_ns <= after.end_ns
        assert 1.1e9 <= wait.end_ns - wait.start_ns <= 2e9
    assert attempts[2].attributes["brokertask.run.status"] == "completed"
    assert all("brokertask.run.status" not in span.attributes for span in attempts[:2])
    assert {span.resource["service.name"] for span in attempts} == {"traced"}
    assert root.resource["service.name"] == "shop"


def test_a_dead_run_ends_its_trace_in_the_dead_letter_queue(
    receiver: OtlpReceiver, environment: dict[str, str]
) -> None:
    run_traced(environment, "flaky", 99)
    last = [span for span in receiver.spans() if span.name == "process flaky"][-1]
    assert last.attributes["brokertask.run.status"] == "dead"
    assert last.attributes["error.type"] == "ConnectionError"
    (event,) = [event for event in last.events if event.name == "run.dead_lettered"]
    assert event.attributes["reason"] == "max_attempts"
    texts = repr([(span.attributes, span.events) for span in receiver.spans()])
    assert "Traceback" not in texts


def test_a_small_fan_out_joins_the_trace_of_its_parent(
    receiver: OtlpReceiver, environment: dict[str, str]
) -> None:
    run_traced(environment, "fans_out", 3)
    spans = receiver.spans()
    parent = one(spans, "process fans_out")
    triggers = [span for span in spans if span.name == "trigger leaf"]
    assert len(triggers) == 3
    by_id = {span.span_id: span for span in spans}
    for trigger in triggers:
        sent = by_id[trigger.parent_id]
        assert (sent.name, sent.parent_id) == ("send leaf", parent.span_id)
    assert {span.trace_id for span in spans} == {parent.trace_id}
    leaves = [span for span in spans if span.name == "process leaf"]
    assert {span.parent_id for span in leaves} == {trigger.span_id for trigger in triggers}
