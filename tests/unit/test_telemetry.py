from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import TraceFlags
from pydantic import TypeAdapter

from brokertask.envelope import Envelope
from brokertask.errors import ConfigurationError, QueueFull
from brokertask.outcome import (
    AttemptError,
    Expired,
    Failed,
    Interrupted,
    Outcome,
    Retrying,
    Sleeping,
    Succeeded,
)
from brokertask.telemetry import AttemptSpan, Telemetry, configure, fingerprint, propagation
from brokertask.telemetry.attributes import SCHEMA_URL
from brokertask.topology import Names
from tests.flow.otlp import OtlpReceiver, Span, read_spans, tree

NAMES = Names()
TASK = "charge_card"
QUEUE = "bt.q.charge_card"
RUN = "0198c0de-0000-7000-8000-000000000001"
INCOMING = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
OK = Succeeded(b"")
ATTEMPTS = "brokertask.attempts"


class Recorded:
    """A Telemetry with an SDK of its own, and what it recorded."""

    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        provider = TracerProvider(shutdown_on_exit=False, **options)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = provider.get_tracer("test")
        self.telemetry = Telemetry(NAMES, tracer_provider=provider, meter_provider=meters)

    def spans(self) -> list[Span]:
        return read_spans(encode_spans(self._exporter.get_finished_spans()))

    def span(self, name: str) -> Span:
        (found,) = (span for span in self.spans() if span.name == name)
        return found

    def points(self, name: str) -> list[tuple[dict[str, Any], float]]:
        """Return attributes and value (histograms: the sum) of each point of a metric."""
        data = self._reader.get_metrics_data()
        assert data is not None
        return [
            (dict(point.attributes or {}), getattr(point, "value", getattr(point, "sum", 0)))
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def envelope(trace_headers: Mapping[str, str], **values: Any) -> Envelope:
    fields: dict[str, Any] = {"run_id": RUN, "task": TASK, "payload": b"", "trace": trace_headers}
    return Envelope(**(fields | values))


def failure(attempt: int = 1, message: str = "no answer in 30 s") -> AttemptError:
    return AttemptError(attempt, "GatewayTimeout", message, now_ms(), "w-1", "Traceback: SECRET")


@contextmanager
def trying(telemetry: Telemetry, message: Envelope, *, lost: int = 0) -> Iterator[AttemptSpan]:
    with telemetry.attempt(
        message, lost=lost, max_attempts=4, queue=QUEUE, worker="w-1", now_ms=now_ms()
    ) as span:
        yield span


def following(
    message: Envelope, span: AttemptSpan, wait: str, gap: float, *, attempt: int | None = None
) -> Envelope:
    """Return the message behind a wait of `gap` seconds that was over a second ago."""
    due = now_ms() - 1_000
    again = message.again(
        attempt=attempt or message.attempt, now_ms=due - round(gap * 1000), wait=wait
    )
    return replace(
        again, due_ms=due, trace=span.trace, origin=span.origin, previous=span.traceparent
    )


@contextmanager
def current(headers: Mapping[str, str]) -> Iterator[None]:
    token = context.attach(propagation.context(headers))
    try:
        yield
    finally:
        context.detach(token)


def trigger_and_send(telemetry: Telemetry) -> Mapping[str, str]:
    headers = telemetry.trigger(TASK, RUN)
    with telemetry.send(NAMES.trigger_route(TASK), trace=headers):
        pass
    return headers


def run_with_retries(telemetry: Telemetry, last: Outcome) -> None:
    """Scenarios B and C: four attempts, the last of which ends with `last`."""
    headers = trigger_and_send(telemetry)
    began = now_ms() - 60_000
    message = envelope(headers, triggered_ms=began, sent_ms=began)
    for attempt in range(1, 5):
        with trying(telemetry, message) as span:
            outcome = last if attempt == 4 else Retrying(5.0, failure(attempt))
            span.end(outcome, at_ms=began)
        delayed = isinstance(outcome, Retrying)
        route = NAMES.delay_route(TASK, 5_000)[0] if delayed else NAMES.dead_route(TASK)
        if not isinstance(outcome, Succeeded):
            with telemetry.send(route, trace=headers):
                pass
        message = envelope(
            headers,
            attempt=attempt + 1,
            seq=attempt,
            triggered_ms=began,
            sent_ms=began + attempt * 10_000,
            due_ms=began + attempt * 10_000 + 5_000,
            wait="retry",
            previous=span.traceparent,
        )


def test_a_success_is_one_trace_of_trigger_send_and_process(recorded: Recorded) -> None:
    with recorded.tracer.start_as_current_span("POST /checkout"):
        headers = trigger_and_send(recorded.telemetry)
    message = envelope(headers, triggered_ms=now_ms() - 412, parent="run-p", root="run-r")
    with trying(recorded.telemetry, message) as span:
        with recorded.tracer.start_as_current_span("SELECT"):
            pass
        assert span.trace_id == recorded.span("POST /checkout").trace_id
        span.end(OK, at_ms=now_ms())

    assert tree(recorded.spans()) == (
        "POST /checkout\n"
        "  trigger charge_card\n"
        "    send charge_card\n"
        "    process charge_card\n"
        "      SELECT"
    )
    trigger, send, process = (
        recorded.span(f"{word} {TASK}") for word in ("trigger", "send", "process")
    )
    assert (trigger.kind, send.kind, process.kind) == ("PRODUCER", "CLIENT", "CONSUMER")
    assert {trigger.schema_url, send.schema_url, process.schema_url} == {SCHEMA_URL}
    assert trigger.scope == "brokertask"
    assert trigger.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "trigger",
        "messaging.operation.type": "create",
        "messaging.destination.name": "bt.tasks:charge_card",
        "messaging.rabbitmq.destination.routing_key": TASK,
        "messaging.message.id": RUN,
        "brokertask.run.id": RUN,
        "brokertask.task": TASK,
    }
    assert send.attributes["messaging.destination.name"] == "bt.tasks:charge_card"
    waited = process.attributes.pop("brokertask.queue.wait_ms")
    assert isinstance(waited, int)
    assert 412 <= waited < 10_000
    assert process.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "bt.tasks:charge_card:bt.q.charge_card",
        "messaging.rabbitmq.destination.routing_key": TASK,
        "messaging.message.id": RUN,
        "brokertask.run.id": RUN,
        "brokertask.task": TASK,
        "brokertask.queue": QUEUE,
        "brokertask.worker.id": "w-1",
        "brokertask.parent_run.id": "run-p",
        "brokertask.root_run.id": "run-r",
        "brokertask.attempt.number": 1,
        "brokertask.attempt.max": 4,
        "brokertask.attempt.outcome": "success",
        "brokertask.run.status": "completed",
    }
    assert process.status == "UNSET"
    assert not process.links


def test_b_retries_are_siblings_below_the_trigger(recorded: Recorded) -> None:
    run_with_retries(recorded.telemetry, OK)
    spans = recorded.spans()
    (trigger,) = (span for span in spans if span.name == f"trigger {TASK}")
    below = [span for span in spans if span.parent_id == trigger.span_id]
    attempts = [span for span in spans if span.name.startswith("process")]
    waits = [span for span in spans if span.name == "wait retry"]

    assert {span.trace_id for span in spans} == {trigger.trace_id}
    assert len(attempts) == 4
    assert len(waits) == 3
    assert below == [span for span in spans if span is not trigger]
    assert [span.status for span in attempts] == ["ERROR", "ERROR", "ERROR", "UNSET"]
    assert [span.attributes.get("brokertask.run.status") for span in attempts] == [
        None,
        None,
        None,
        "completed",
    ]
    assert {span.attributes["brokertask.attempt.outcome"] for span in attempts[:3]} == {"retry"}
    for before, after in pairwise(attempts):
        assert [link.span_id for link in after.links] == [before.span_id]
        assert after.links[0].attributes == {"brokertask.link": "previous_attempt"}
        assert after.attributes["brokertask.previous_attempt.span_id"] == before.span_id
    for wait in waits:
        assert wait.end_ns - wait.start_ns == 5_000_000_000
        assert wait.end_ns < trigger.end_ns
        assert wait.kind == "INTERNAL"
    scheduled = attempts[0].events[-1]
    assert scheduled.name == "retry.scheduled"
    assert scheduled.attributes == {"delay_ms": 5000, "reason": "GatewayTimeout"}


def test_c_a_dead_run_says_why_on_its_last_attempt(recorded: Recorded) -> None:
    run_with_retries(recorded.telemetry, Failed("max_attempts", failure(4)))
    last = [span for span in recorded.spans() if span.name.startswith("process")][-1]
    dead = recorded.span(f"send {TASK}.dead")

    assert last.status == "ERROR"
    assert last.message == "GatewayTimeout: no answer in 30 s"
    assert last.attributes["brokertask.attempt.outcome"] == "failed"
    assert last.attributes["brokertask.run.status"] == "dead"
    assert last.attributes["error.type"] == "GatewayTimeout"
    assert [event.name for event in last.events] == ["exception", "run.dead_lettered"]
    assert last.events[0].attributes == {
        "exception.type": "GatewayTimeout",
        "exception.message": "no answer in 30 s",
    }
    assert last.events[1].attributes == {
        "reason": "max_attempts",
        "attempts": 4,
        "error.fingerprint": fingerprint(failure()),
    }
    assert dead.parent_id == last.parent_id
    assert dead.attributes["messaging.destination.name"] == "bt.dead:charge_card"


def test_a_redrive_is_a_new_trace_linked_to_the_dead_one(recorded: Recorded) -> None:
    link = (INCOMING, {"brokertask.link": "origin"})
    recorded.telemetry.trigger(TASK, RUN, detach=True, links=[link, ("nonsense", {})])
    span = recorded.span(f"trigger {TASK}")
    assert span.parent_id == ""
    assert [link.trace_id for link in span.links] == [INCOMING[3:35]]
    assert span.attributes["brokertask.origin.trace_id"] == INCOMING[3:35]


def test_a_redrive_without_a_traced_trigger_keeps_the_link(recorded: Recorded) -> None:
    with trying(recorded.telemetry, envelope({}, origin=INCOMING, redrives=1)) as span:
        span.end(OK, at_ms=now_ms())
    process = recorded.span(f"process {TASK}")
    assert process.parent_id == ""
    assert process.attributes["brokertask.origin.span_id"] == INCOMING[36:52]
    assert process.attributes["brokertask.redrives"] == 1


def test_a_small_fan_out_is_below_its_attempt(recorded: Recorded) -> None:
    with trying(recorded.telemetry, envelope({})) as span:
        with recorded.telemetry.send(NAMES.trigger_route("page"), count=3):
            for child in range(3):
                recorded.telemetry.trigger("page", f"run-c{child}", parent_run=RUN)
        span.end(OK, at_ms=now_ms())
    assert tree(recorded.spans()) == (
        f"process {TASK}\n  send page\n    trigger page\n    trigger page\n    trigger page"
    )
    assert recorded.span("send page").attributes["messaging.batch.message_count"] == 3
    triggers = [span for span in recorded.spans() if span.name == "trigger page"]
    assert {span.attributes["brokertask.parent_run.id"] for span in triggers} == {RUN}


def test_a_detached_trigger_begins_a_trace_that_is_found_from_its_caller(
    recorded: Recorded,
) -> None:
    with recorded.tracer.start_as_current_span("import"):
        headers = recorded.telemetry.trigger(TASK, RUN, detach=True, attributes={"bulk.id": "b1"})
    caller, trigger = recorded.span("import"), recorded.span(f"trigger {TASK}")
    assert trigger.parent_id == ""
    assert trigger.trace_id != caller.trace_id
    assert trigger.trace_id in headers["traceparent"]
    assert trigger.attributes["brokertask.triggered_by.trace_id"] == caller.trace_id
    assert trigger.attributes["bulk.id"] == "b1"
    assert [link.span_id for link in trigger.links] == [caller.span_id]


def test_a_delayed_first_attempt_shows_its_wait(recorded: Recorded) -> None:
    began = now_ms() - 90_000
    message = envelope(
        recorded.telemetry.trigger(TASK, RUN), triggered_ms=began, due_ms=began + 60_000
    )
    with trying(recorded.telemetry, message) as span:
        span.end(OK, at_ms=now_ms())
    wait, process = recorded.span("wait delay"), recorded.span(f"process {TASK}")
    assert (wait.start_ns, wait.end_ns) == (began * 10**6, (began + 60_000) * 10**6)
    assert wait.parent_id == process.parent_id
    queued = process.attributes["brokertask.queue.wait_ms"]
    assert isinstance(queued, int)
    assert 30_000 <= queued < 40_000
    assert process.attributes["messaging.destination.name"] == f"bt.resume:{TASK}:{QUEUE}"


@pytest.mark.parametrize(
    ("values", "lost"),
    [
        pytest.param({"due": 999}, 0, id="too short"),
        pytest.param({"due": 60_000}, 1, id="recorded by the worker that was lost"),
        pytest.param({"due": 600_000}, 0, id="not over"),
        pytest.param({"due": 60_000, "seq": 1}, 0, id="unknown what for"),
        pytest.param({"due": None, "seq": 1}, 0, id="handed back"),
    ],
)
def test_a_wait_is_left_out(recorded: Recorded, values: dict[str, int | None], lost: int) -> None:
    began = now_ms() - 90_000
    due, seq = values["due"], values.get("seq", 0)
    message = envelope(
        {},
        seq=seq,
        attempt=1 + lost,
        triggered_ms=began,
        sent_ms=began,
        due_ms=None if due is None else began + due,
    )
    with trying(recorded.telemetry, message, lost=lost) as span:
        span.end(OK, at_ms=now_ms())
    assert "wait" not in tree(recorded.spans())
    process = recorded.span(f"process {TASK}")
    assert process.attributes.get("brokertask.attempts.lost") == (lost or None)


@pytest.mark.anyio
async def test_steps_are_below_their_attempt_one_after_the_other_and_in_parallel(
    recorded: Recorded,
) -> None:
    async def page(span: AttemptSpan, name: str, both: asyncio.Barrier) -> None:
        with span.step(name):
            await both.wait()
            with recorded.tracer.start_as_current_span(f"GET {name}"):
                await both.wait()

    with trying(recorded.telemetry, envelope({})) as span:
        with span.step("list"):
            pass
        both = asyncio.Barrier(2)
        await asyncio.gather(page(span, "page one", both), page(span, "page two", both))
        with recorded.tracer.start_as_current_span("report"), span.step("render#2"):
            pass
        span.end(OK, at_ms=now_ms())

    assert tree(recorded.spans()) == (
        f"process {TASK}\n"
        "  step list\n"
        "  step page one\n"
        "    GET page one\n"
        "  step page two\n"
        "    GET page two\n"
        "  report\n"
        "    step render"
    )
    render = recorded.span("step render")
    assert (render.kind, render.status) == ("INTERNAL", "UNSET")
    assert render.attributes == {
        "brokertask.run.id": RUN,
        "brokertask.task": TASK,
        "brokertask.step.name": "render#2",
        "brokertask.step.outcome": "success",
    }


def test_a_step_in_a_thread_of_the_task_itself_is_below_the_attempt(recorded: Recorded) -> None:
    def work(span: AttemptSpan) -> None:
        with span.step("fetch"):
            pass

    with trying(recorded.telemetry, envelope({})) as span:
        thread = threading.Thread(target=work, args=(span,))
        thread.start()
        thread.join()
        span.end(OK, at_ms=now_ms())
    assert tree(recorded.spans()) == f"process {TASK}\n  step fetch"


def test_a_failing_step_tells_of_its_retries(recorded: Recorded) -> None:
    with trying(recorded.telemetry, envelope({})) as span:
        with suppress(ConnectionError), span.step("fetch") as step:
            step.retried(TimeoutError("no answer"), 1.5)
            step.retried(TimeoutError("no answer"), 3)
            raise ConnectionError("refused")
        span.end(Retrying(5, failure()), at_ms=now_ms())

    assert tree(recorded.spans()) == f"process {TASK} !\n  step fetch !"
    step_ = recorded.span("step fetch")
    assert step_.message == "ConnectionError: refused"
    assert step_.attributes["error.type"] == "ConnectionError"
    assert step_.attributes["brokertask.step.outcome"] == "failed"
    assert [(event.name, event.attributes) for event in step_.events] == [
        ("step.retry", {"delay_ms": 1500, "reason": "TimeoutError"}),
        ("step.retry", {"delay_ms": 3000, "reason": "TimeoutError"}),
        ("exception", {"exception.type": "ConnectionError", "exception.message": "refused"}),
    ]


def test_a_cancelled_step_did_not_fail(recorded: Recorded) -> None:
    with trying(recorded.telemetry, envelope({})) as span:
        with pytest.raises(asyncio.CancelledError), span.step("fetch"):
            raise asyncio.CancelledError("drain")
        span.end(Interrupted(), at_ms=now_ms())
    step = recorded.span("step fetch")
    assert (step.status, step.events) == ("UNSET", ())
    assert step.attributes["brokertask.step.outcome"] == "cancelled"
    assert "error.type" not in step.attributes


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("SECRET")


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        pytest.param(lambda: int("x" * 400), "invalid literal", id="long"),
        pytest.param(
            lambda: TypeAdapter(int).validate_python("SECRET"), "int_parsing", id="validation"
        ),
        pytest.param(lambda: _raise(Mute()), "cannot be had", id="no text"),
    ],
)
def test_what_a_step_raised_arrives_and_its_span_holds_no_value(
    recorded: Recorded, broken: Callable[[], object], said: str
) -> None:
    with trying(recorded.telemetry, envelope({})) as span:
        with pytest.raises((ValueError, Mute)), span.step("fetch"):
            broken()
        span.end(OK, at_ms=now_ms())
    step = recorded.span("step fetch")
    assert said in step.message
    assert len(step.message) <= 256
    assert "SECRET" not in repr(step)


def test_steps_that_are_remembered_are_events(recorded: Recorded) -> None:
    with trying(recorded.telemetry, envelope({})) as span:
        for number in range(150):
            span.remembered(f"page#{number}")
        with span.step("render"):
            pass
        span.end(Sleeping(60), at_ms=now_ms())
    process = recorded.span(f"process {TASK}")
    remembered = [event for event in process.events if event.name == "step.remembered"]
    assert tree(recorded.spans()) == f"process {TASK}\n  step render"
    assert [event.attributes["name"] for event in remembered] == [f"page#{n}" for n in range(100)]
    assert process.attributes["brokertask.steps.remembered"] == 150
    assert process.events[-1].name == "run.suspended"


def test_a_run_that_sleeps_for_half_a_minute_stays_in_its_trace(recorded: Recorded) -> None:
    message = envelope(trigger_and_send(recorded.telemetry), triggered_ms=now_ms() - 40_000)
    with trying(recorded.telemetry, message) as span:
        assert span.trace is message.trace
        span.end(Sleeping(30), at_ms=now_ms())
    message = following(message, span, "sleep", 30)
    with trying(recorded.telemetry, message) as span:
        assert span.trace is message.trace
        span.end(OK, at_ms=now_ms())

    wait = recorded.span("wait sleep")
    parts = [span_ for span_ in recorded.spans() if span_.name == f"process {TASK}"]
    assert sorted(tree(recorded.spans()).splitlines()) == [
        f"  process {TASK}",
        f"  process {TASK}",
        f"  send {TASK}",
        "  wait sleep",
        f"trigger {TASK}",
    ]
    assert {span_.trace_id for span_ in recorded.spans()} == {wait.trace_id}
    assert wait.end_ns - wait.start_ns == 30 * 10**9
    assert [link.span_id for link in parts[1].links] == [parts[0].span_id]
    assert parts[0].status == "UNSET"
    assert parts[0].attributes["brokertask.attempt.outcome"] == "suspended"
    assert [(event.name, event.attributes) for event in parts[0].events] == [
        ("run.suspended", {"kind": "sleep", "delay_ms": 30_000})
    ]
    assert {point[0]["brokertask.attempt.outcome"] for point in recorded.points(ATTEMPTS)} == {
        "suspended",
        "success",
    }


def test_e_a_run_that_sleeps_for_an_hour_goes_on_in_a_new_trace(recorded: Recorded) -> None:
    with current({"baggage": "tenant=a"}):
        message = envelope(trigger_and_send(recorded.telemetry), triggered_ms=now_ms() - 9_000_000)
    with trying(recorded.telemetry, message) as span:
        span.end(Sleeping(3_600), at_ms=now_ms())
    message = following(message, span, "sleep", 3_600)
    with trying(recorded.telemetry, message) as span:
        assert baggage.get_all() == {"tenant": "a"}
        with span.step("remind"):
            pass
        span.end(Retrying(20, failure()), at_ms=now_ms())
    with recorded.telemetry.send(NAMES.delay_route(TASK, 20_000)[0], trace=span.trace):
        pass
    message = following(message, span, "retry", 20, attempt=2)
    with trying(recorded.telemetry, message) as span:
        span.end(OK, at_ms=now_ms())

    trigger, resume = recorded.span(f"trigger {TASK}"), recorded.span(f"resume {TASK}")
    first, last = (span_ for span_ in recorded.spans() if span_.name == f"process {TASK}")
    before = [span_ for span_ in recorded.spans() if span_.trace_id == trigger.trace_id]
    after = [span_ for span_ in recorded.spans() if span_.trace_id == resume.trace_id]
    assert tree(before) == f"trigger {TASK}\n  send {TASK}\n  process {TASK}"
    assert sorted(span_.name for span_ in after) == [
        f"process {TASK}",
        f"resume {TASK}",
        f"send {TASK}.delay",
        "step remind",
        "wait retry",
    ]
    assert {span_.parent_id for span_ in after} == {"", resume.span_id}
    assert (resume.kind, resume.parent_id) == ("CONSUMER", "")
    assert [(link.span_id, link.attributes["brokertask.link"]) for link in resume.links] == [
        (first.span_id, "previous_segment"),
        (trigger.span_id, "run_origin"),
    ]
    assert resume.attributes["brokertask.run_origin.trace_id"] == trigger.trace_id
    assert resume.attributes["brokertask.previous_segment.span_id"] == first.span_id
    assert resume.attributes["brokertask.run.id"] == RUN
    assert [link.attributes["brokertask.link"] for link in last.links] == ["previous_attempt"]
    assert span.trace["traceparent"].startswith(f"00-{resume.trace_id}-{resume.span_id}-")
    assert span.trace["baggage"] == "tenant=a"


def test_every_segment_is_linked_to_the_trigger_that_the_run_began_with(
    recorded: Recorded,
) -> None:
    message = envelope(recorded.telemetry.trigger(TASK, RUN))
    for wait in ("retry", "sleep", "sleep"):
        with trying(recorded.telemetry, message) as span:
            span.end(Sleeping(400), at_ms=now_ms())
        message = following(message, span, wait, 400)
    with trying(recorded.telemetry, message) as span:
        span.end(OK, at_ms=now_ms())

    trigger = recorded.span(f"trigger {TASK}")
    parts = [span_ for span_ in recorded.spans() if span_.name != trigger.name]
    assert [span_.name.split()[0] for span_ in parts] == ["process", "resume", "resume", "resume"]
    assert len({span_.trace_id for span_ in parts}) == 4
    for before, after in pairwise(parts):
        assert [link.span_id for link in after.links] == [before.span_id, trigger.span_id]


def test_a_long_delay_begins_a_trace_that_is_found_from_the_trigger(recorded: Recorded) -> None:
    message = envelope(recorded.telemetry.trigger(TASK, RUN), triggered_ms=now_ms() - 400_000)
    with trying(recorded.telemetry, replace(message, due_ms=now_ms())) as span:
        span.end(OK, at_ms=now_ms())
    trigger, process = recorded.span(f"trigger {TASK}"), recorded.span(f"process {TASK}")
    assert tree(recorded.spans()) == f"trigger {TASK}\nprocess {TASK}"
    assert process.trace_id != trigger.trace_id
    assert [link.span_id for link in process.links] == [trigger.span_id]
    assert process.attributes["brokertask.run_origin.span_id"] == trigger.span_id


def test_a_new_segment_is_sampled_as_a_root_and_what_follows_does_as_it_did() -> None:
    recorded = Recorded(sampler=ParentBased(ALWAYS_OFF))
    headers = {"traceparent": INCOMING, "tracestate": "vendor=1"}
    message = envelope(headers)
    with trying(recorded.telemetry, message) as span:
        span.end(Sleeping(400), at_ms=now_ms())
    message = following(message, span, "sleep", 400)
    with trying(recorded.telemetry, message) as span:
        assert span.trace_id not in (None, INCOMING[3:35])
        assert span.trace_id == span.trace["traceparent"][3:35]
        assert not int(span.trace["traceparent"][-2:]) & TraceFlags.SAMPLED
        assert "tracestate" not in span.trace
        with span.step("fetch"):
            pass
        span.end(Retrying(5, failure()), at_ms=now_ms())
    with trying(recorded.telemetry, following(message, span, "retry", 5)) as span:
        span.end(OK, at_ms=now_ms())
    assert tree(recorded.spans()) == f"process {TASK}"


@pytest.mark.parametrize("provider", [None, trace.NoOpTracerProvider()])
def test_without_an_sdk_a_long_wait_does_not_cut_the_callers_trace(
    provider: trace.TracerProvider | None,
) -> None:
    telemetry = Telemetry(NAMES, tracer_provider=provider)
    headers = {"traceparent": INCOMING, "baggage": "tenant=a"}
    began = now_ms() - 3_700_000
    message = envelope(headers, seq=1, wait="sleep", sent_ms=began, due_ms=began + 3_600_000)
    with trying(telemetry, message, lost=2) as span:
        assert (span.trace, span.origin, span.trace_id) == (headers, None, INCOMING[3:35])
        assert telemetry.trigger("other", "run-2") == headers
        span.remembered("list")
        with span.step("fetch") as step:
            step.retried(TimeoutError(), 1)
        # Nothing is made for a step of which nothing is recorded.
        assert span.step("fetch") is span.step("render")
        span.end(OK, at_ms=now_ms())


def test_lost_attempts_are_recorded_by_the_worker_of_the_next(recorded: Recorded) -> None:
    ready = now_ms() - 60_000
    message = envelope(recorded.telemetry.trigger(TASK, RUN), triggered_ms=ready, attempt=3)
    with trying(recorded.telemetry, message, lost=2) as span:
        span.end(OK, at_ms=now_ms())
    first, second = (span_ for span_ in recorded.spans() if span_.name == "attempt lost")
    process = recorded.span(f"process {TASK}")
    assert {first.parent_id, second.parent_id} == {process.parent_id}
    assert (first.kind, first.status) == ("INTERNAL", "ERROR")
    assert first.attributes == {
        "brokertask.run.id": RUN,
        "brokertask.task": TASK,
        "brokertask.attempt.number": 1,
        "brokertask.attempt.outcome": "lost",
        "error.type": "worker_lost",
    }
    assert second.attributes["brokertask.attempt.number"] == 2
    assert (first.start_ns, first.end_ns) == (ready * 10**6, second.start_ns)
    assert first.end_ns < second.end_ns <= process.start_ns
    assert process.attributes["brokertask.attempt.number"] == 3
    assert process.attributes["brokertask.attempts.lost"] == 2


def test_of_many_lost_attempts_the_last_five_are_recorded(recorded: Recorded) -> None:
    with trying(recorded.telemetry, envelope({}, attempt=9), lost=8) as span:
        span.end(OK, at_ms=now_ms())
    lost = [span_ for span_ in recorded.spans() if span_.name == "attempt lost"]
    assert sorted(str(span_.attributes["brokertask.attempt.number"]) for span_ in lost) == [
        "4",
        "5",
        "6",
        "7",
        "8",
    ]
    assert recorded.span(f"process {TASK}").attributes["brokertask.attempts.lost"] == 8


def test_an_attempt_lost_behind_a_long_wait_is_in_the_new_trace(recorded: Recorded) -> None:
    due = now_ms() - 5_000
    message = envelope(
        {"traceparent": INCOMING},
        attempt=2,
        seq=1,
        wait="sleep",
        sent_ms=due - 400_000,
        due_ms=due,
    )
    with trying(recorded.telemetry, message, lost=1) as span:
        span.end(OK, at_ms=now_ms())
    assert tree(recorded.spans()) == f"resume {TASK}\n  attempt lost !"
    assert recorded.span("attempt lost").start_ns == due * 10**6


@pytest.mark.parametrize(
    ("outcome", "word", "status"),
    [
        (Expired(), "expired", "expired"),
        (Interrupted(), "interrupted", None),
    ],
)
def test_an_outcome_that_is_no_failure_is_no_error(
    recorded: Recorded, outcome: Outcome, word: str, status: str | None
) -> None:
    with trying(recorded.telemetry, envelope({})) as span:
        span.end(outcome, at_ms=now_ms())
        span.end(Failed("aborted", failure()), at_ms=now_ms())  # only the first one counts
    (process,) = recorded.spans()
    assert process.status == "UNSET"
    assert process.attributes["brokertask.attempt.outcome"] == word
    assert process.attributes.get("brokertask.run.status") == status
    assert recorded.points("brokertask.dead_letters") == []


def test_an_attempt_left_without_an_outcome_is_an_error(recorded: Recorded) -> None:
    with pytest.raises(RuntimeError), trying(recorded.telemetry, envelope({})):
        raise RuntimeError("the worker is broken")
    (process,) = recorded.spans()
    assert (process.status, process.message) == ("ERROR", "RuntimeError: the worker is broken")
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_refused_publish_marks_its_span_and_its_metrics(recorded: Recorded) -> None:
    with pytest.raises(QueueFull), recorded.telemetry.send(NAMES.trigger_route(TASK)):
        raise QueueFull("bt.in.charge_card is full")
    (send,) = recorded.spans()
    assert (send.status, send.attributes["error.type"]) == ("ERROR", "QueueFull")
    labels = {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": "bt.tasks:charge_card",
        "messaging.operation.name": "send",
        "error.type": "QueueFull",
    }
    assert recorded.points("messaging.client.sent.messages") == [(labels, 1)]
    assert recorded.points("messaging.client.operation.duration")[0][0] == labels


def test_send_names_are_few(recorded: Recorded) -> None:
    routes = {
        "send charge_card": NAMES.resume_route(TASK),
        "send charge_card.delay": NAMES.delay_route(TASK, 100)[0],
        "send charge_card.dead": NAMES.dead_route(TASK),
        "send bt.events": NAMES.event_route("completed", TASK, reply_to="bt.reply.c"),
    }
    for route in routes.values():
        with recorded.telemetry.send(route):
            pass
    assert [span.name for span in recorded.spans()] == list(routes)


def test_no_payload_and_no_traceback_is_recorded(recorded: Recorded) -> None:
    long = "SECRETLY".join(["x" * 400] * 2)
    message = envelope(recorded.telemetry.trigger(TASK, RUN), payload=b"\xa6SECRET")
    for outcome in (Retrying(1, failure(message=long)), Failed("aborted", failure(message=long))):
        with trying(recorded.telemetry, message) as span:
            span.end(outcome, at_ms=now_ms())
    with pytest.raises(ValueError, match="SECRETLY"), trying(recorded.telemetry, message):
        raise ValueError(long)
    for span_ in recorded.spans():
        assert "SECRET" not in repr(span_)
        assert "stacktrace" not in repr(span_)
        assert len(span_.message) <= 256
        for event in span_.events:
            assert all(len(str(value)) <= 256 for value in event.attributes.values())


def test_an_unsampled_trace_costs_no_span_and_stays_unsampled() -> None:
    recorded = Recorded()
    with current({"traceparent": INCOMING[:-2] + "00"}):
        headers = trigger_and_send(recorded.telemetry)
    assert headers["traceparent"].startswith(INCOMING[:36])
    assert headers["traceparent"].endswith("-00")
    with trying(recorded.telemetry, envelope(headers, previous=INCOMING)) as span:
        assert span.traceparent is None
        assert span.trace_id == INCOMING[3:35]
        span.end(Failed("aborted", failure()), at_ms=now_ms())
    assert recorded.spans() == []


def test_a_root_that_is_not_sampled_says_so_to_the_worker() -> None:
    recorded = Recorded(sampler=ALWAYS_OFF)
    read = propagation.span_context(recorded.telemetry.trigger(TASK, RUN)["traceparent"])
    assert read is not None
    assert not read.trace_flags.sampled
    assert recorded.spans() == []


@pytest.mark.parametrize("provider", [None, trace.NoOpTracerProvider()])
@pytest.mark.parametrize("detach", [False, True])
def test_without_an_sdk_the_callers_trace_passes_through(
    provider: trace.TracerProvider | None, detach: bool
) -> None:
    telemetry = Telemetry(NAMES, tracer_provider=provider)
    assert telemetry.trigger(TASK, RUN, detach=detach) == {}
    headers = {"traceparent": INCOMING, "tracestate": "vendor=1", "baggage": "user=a%20b"}
    with current(headers):
        assert telemetry.trigger(TASK, RUN, detach=detach) == headers
    with trying(telemetry, envelope(headers)) as span:
        assert (span.traceparent, span.trace_id) == (None, INCOMING[3:35])
        assert telemetry.trigger("other", "run-2", detach=detach) == headers
        with telemetry.send(NAMES.trigger_route(TASK), trace=headers):
            pass
        span.end(OK, at_ms=now_ms())
    with trying(telemetry, envelope({})) as span:
        assert span.trace_id is None


def test_a_worker_lends_its_own_context_to_no_run(recorded: Recorded) -> None:
    with recorded.tracer.start_as_current_span("worker"):
        token = context.attach(baggage.set_baggage("from", "worker"))
        with trying(recorded.telemetry, envelope({})) as span:
            assert baggage.get_all() == {}
            span.end(OK, at_ms=now_ms())
        context.detach(token)
    assert recorded.span(f"process {TASK}").parent_id == ""


def test_baggage_passes_through_and_is_no_attribute(recorded: Recorded) -> None:
    headers = {"baggage": "tenant=a%2Cb;ttl=1, plan = pro+max ,broken,=x"}
    with trying(recorded.telemetry, envelope(headers)) as span:
        assert baggage.get_all() == {"tenant": "a,b", "plan": "pro max"}
        child = recorded.telemetry.trigger("other", "run-2")
        span.end(OK, at_ms=now_ms())
    assert child["baggage"] == "tenant=a%2Cb,plan=pro%20max"
    assert "pro max" not in repr(recorded.spans())


@pytest.mark.parametrize(
    ("entries", "size", "kept"),
    [(64, 10, True), (65, 10, False), (2, 4_000, True), (2, 4_097, False)],
)
def test_baggage_has_limits_in_both_directions(
    recorded: Recorded, entries: int, size: int, kept: bool
) -> None:
    values = {f"k{number}": "v" * size for number in range(entries)}
    inside = context.Context()
    for name, value in values.items():
        inside = baggage.set_baggage(name, value, inside)
    token = context.attach(inside)
    headers = recorded.telemetry.trigger(TASK, RUN)
    context.detach(token)
    assert ("baggage" in headers) == kept

    written = ",".join(f"{name}={value}" for name, value in values.items())
    assert (baggage.get_all(propagation.context({"baggage": written})) == values) == kept


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        INCOMING.replace("00-", "ff-", 1),
        INCOMING + "-more",
        "00-" + "0" * 32 + INCOMING[35:],
        INCOMING[:36] + "0" * 16 + "-01",
        INCOMING.upper(),
    ],
)
def test_a_malformed_traceparent_is_no_parent(header: str) -> None:
    assert propagation.span_context(header) is None


def test_a_traceparent_of_a_later_version_is_read() -> None:
    read = propagation.span_context("01" + INCOMING[2:-2] + "ff-more", "bad state" * 100)
    assert read is not None
    assert propagation.traceparent(read) == INCOMING[:-2] + "03"


def test_a_publish_is_not_recorded_twice_by_aio_pika_instrumentation(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded.telemetry.send(NAMES.trigger_route(TASK)):
        assert context.get_value("suppress_instrumentation") is None
    name = "opentelemetry.instrumentation.aio_pika"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for telemetry in (recorded.telemetry, Telemetry(NAMES)):
        with telemetry.send(NAMES.trigger_route(TASK)):
            assert context.get_value("suppress_instrumentation") is True
    assert context.get_value("suppress_instrumentation") is None


def test_the_metrics_of_a_run_with_retries(recorded: Recorded) -> None:
    telemetry = recorded.telemetry
    telemetry.triggered(TASK)
    telemetry.triggered(TASK, 2)
    telemetry.active(TASK, 1)
    run_with_retries(telemetry, Failed("max_attempts", failure(4)))
    telemetry.active(TASK, -1)
    telemetry.buried(TASK, "undecodable")
    telemetry.publish_failed("Unroutable")
    telemetry.reconnected()

    task, queue = {"brokertask.task": TASK}, {"brokertask.queue": QUEUE}
    failed = task | queue | {"error.type": "GatewayTimeout"}
    expected: dict[str, list[tuple[dict[str, str], int]]] = {
        "brokertask.runs.triggered": [(task, 3)],
        "brokertask.runs.active": [(task | {"brokertask.state": "executing"}, 0)],
        "brokertask.attempts": [
            (failed | {"brokertask.attempt.outcome": "retry"}, 3),
            (failed | {"brokertask.attempt.outcome": "failed"}, 1),
        ],
        "brokertask.retries": [(task | {"brokertask.reason": "GatewayTimeout"}, 3)],
        "brokertask.retry.delay": [(task, 15)],
        "brokertask.runs.finished": [(task | {"brokertask.run.status": "dead"}, 2)],
        "brokertask.dead_letters": [
            (task | queue | {"brokertask.reason": "max_attempts"}, 1),
            (task | queue | {"brokertask.reason": "undecodable"}, 1),
        ],
        "brokertask.publish.confirm.failures": [({"error.type": "Unroutable"}, 1)],
        "brokertask.connection.reconnects": [({}, 1)],
    }
    assert {name: recorded.points(name) for name in expected} == expected
    assert [labels for labels, _ in recorded.points("brokertask.attempt.duration")] == [
        task | {"brokertask.attempt.outcome": "retry"},
        task | {"brokertask.attempt.outcome": "failed"},
    ]
    assert [labels for labels, _ in recorded.points("brokertask.run.duration")] == [
        task | {"brokertask.run.status": "dead"}
    ]
    assert [labels for labels, _ in recorded.points("brokertask.run.queue_time")] == [task | queue]


def test_two_apps_count_into_one_number() -> None:
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    for namespace in ("bt", "other"):
        Telemetry(Names(namespace), meter_provider=meters).triggered(TASK)
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert [getattr(point, "value", None) for point in metric.data.data_points] == [2]


def test_equal_failures_have_one_fingerprint() -> None:
    def of(message: str, kind: str = "E") -> str:
        return fingerprint(AttemptError(1, kind, message, 0, "w"))

    same = [
        ("no answer in 30 s", "no answer in 5.25 s"),
        ("file 'a.txt' is missing", 'file "b.txt" is missing'),
        ("can't open 'a'", "can't open 'b'"),
        ("at 0x7f10aa deadbeef01", "at 0x9c2b c0ffee0123"),
        (f"run {uuid.uuid4()} failed", f"run {uuid.uuid4()} failed"),
    ]
    for one, other in same:
        assert of(one) == of(other)
    assert of("refused") != of("reset")
    assert of("refused") != of("refused", "F")
    assert len(of("refused")) == 12


WORKING = """
import sys, time
from brokertask.telemetry import Telemetry, configure
from brokertask.topology import Names

stop = configure("documents")
telemetry = Telemetry(Names())
headers = telemetry.trigger("charge_card", "run-1")
with telemetry.send(Names().trigger_route("charge_card"), trace=headers):
    pass
telemetry.triggered("charge_card")
began = time.monotonic()
stop()
stop()
print("sdk" if "opentelemetry.sdk" in sys.modules else "api", time.monotonic() - began)
"""


def work(**variables: str) -> tuple[str, float, str]:
    """Run WORKING; return which of the SDK or API it imported, seconds to stop, and its stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", WORKING],
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported, seconds = done.stdout.split()
    return imported, float(seconds), done.stderr


def test_configure_exports_to_the_collector_of_the_environment() -> None:
    with OtlpReceiver() as receiver:
        imported, _, errors = work(
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
            OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test",
        )
        spans = receiver.wait_for(lambda spans: len(spans) == 2, timeout=5)
        metrics = {metric.name: metric for metric in receiver.metrics()}
    assert (imported, errors) == ("sdk", "")
    assert tree(spans) == "trigger charge_card\n  send charge_card"
    assert spans[0].resource["service.name"] == "documents"
    assert spans[0].resource["deployment.environment.name"] == "test"
    assert spans[0].resource["host.name"] == socket.gethostname()
    assert {"service.instance.id", "brokertask.version"} <= spans[0].resource.keys()
    assert metrics["brokertask.runs.triggered"].points == ({"brokertask.task": TASK},)
    assert metrics["messaging.client.operation.duration"].unit == "s"


def test_the_environment_names_the_service_and_the_signals() -> None:
    with OtlpReceiver() as receiver:
        work(
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{receiver.endpoint}/v1/traces",
            OTEL_SERVICE_NAME="another",
        )
        assert [span.resource["service.name"] for span in receiver.spans()] == ["another"] * 2
        assert receiver.metrics() == []


def test_stopping_is_bounded_when_the_collector_is_gone() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        _, seconds, errors = work(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    assert seconds < 6
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 4


def test_stopping_is_bounded_when_the_collector_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        _, seconds, errors = work(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    assert seconds < 6
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "TRUE"},
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
        },
    ],
)
def test_without_an_endpoint_the_sdk_is_not_imported(variables: dict[str, str]) -> None:
    assert work(**variables)[0] == "api"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")


@pytest.mark.usefixtures("endpoint")
def test_a_missing_exporter_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "brokertask.telemetry.exporter", raising=False)
    with pytest.raises(ConfigurationError, match=r"brokertask\[otlp\]"):
        configure("documents")


@pytest.mark.usefixtures("endpoint")
def test_another_protocol_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigurationError, match="http/protobuf"):
        configure("documents")


@pytest.mark.usefixtures("endpoint")
def test_a_provider_of_the_user_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    stop = configure("documents")
    stop()
    assert trace.get_tracer_provider() is provider
