"""The spans of a run: `trigger` and, below it, `process` for each attempt.

    trigger charge_card            PRODUCER, instant; its context travels with the run
     ├ send charge_card            CLIENT, until the broker's confirm
     ├ process charge_card         CONSUMER, attempt 1, ERROR
     │  └ step fetch               INTERNAL, what is executed of the task's steps
     ├ send charge_card.delay      CLIENT, the retry on its way
     ├ wait retry                  INTERNAL, back-dated by the worker of the next attempt
     ├ attempt lost                INTERNAL, ERROR, back-dated: attempt 2, whose worker died
     └ process charge_card         attempt 3, linked to attempt 1

    resume charge_card             CONSUMER, behind a wait of over five minutes: a trace of its own,
                                   linked to the attempt before it and to the trigger

Names hold the task, not the destination, because viewers group by span name and a destination is
the same for many tasks or different for one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Token
from functools import cached_property, lru_cache
from importlib import metadata
from time import perf_counter
from typing import Final

from opentelemetry import context as contexts
from opentelemetry import trace as traces
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Span, SpanKind, Tracer

from brokertask.envelope import Envelope
from brokertask.raised import name_of
from brokertask.telemetry import attributes as keys
from brokertask.telemetry import propagation
from brokertask.telemetry.attempt import AttemptSpan
from brokertask.telemetry.attributes import Attributes
from brokertask.telemetry.beginning import begin, queued_ms, unrecorded
from brokertask.telemetry.failure import mark_raised
from brokertask.telemetry.metrics import Metrics, shared_metrics
from brokertask.topology import Names, Route

_AIO_PIKA: Final = "opentelemetry.instrumentation.aio_pika"
_SUPPRESS: Final = "suppress_instrumentation"
_NO_PARENT: Final = traces.set_span_in_context(traces.INVALID_SPAN, Context())


class Telemetry:
    """Spans and metrics of one App. Cheap when no SDK is configured.

    The global providers are looked up at first use, so that `configure` or the user's own set-up
    may come after `App(...)`. Cost without an SDK: 2 µs a trigger, 4 a send, 10 an attempt.
    """

    def __init__(
        self,
        names: Names,
        *,
        tracer_provider: traces.TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self._names = names
        self._tracer_provider = tracer_provider
        self._meter_provider = meter_provider
        self._known_tracer: Tracer | None = None

    @cached_property
    def _metrics(self) -> Metrics:
        # Before a provider is set the API gives stand-ins that follow it, so this may be kept.
        return shared_metrics(installed_version(), self._meter_provider)

    def _tracer(self) -> Tracer | None:
        """Return the tracer, or None as long as nobody has set a provider."""
        if self._known_tracer is None:
            # Before a provider is set the API gives a stand-in that follows it. To ask that is
            # ten times as quick as to ask for the provider, which looks into the environment.
            provider = self._tracer_provider = self._tracer_provider or traces.get_tracer_provider()
            tracer = provider.get_tracer("brokertask", installed_version(), keys.SCHEMA_URL)
            if isinstance(tracer, traces.ProxyTracer):
                return None
            self._known_tracer = _lean(tracer)
        return self._known_tracer

    def trigger(
        self,
        task: str,
        run_id: str,
        *,
        parent_run: str | None = None,
        links: Sequence[tuple[str, Mapping[str, str]]] = (),
        detach: bool = False,
        attributes: Mapping[str, str | int] | None = None,
    ) -> Mapping[str, str]:
        """Record the instant `trigger <task>` span and return the trace headers of the message.

        Args:
            task: The task's id.
            run_id: The run asked for.
            parent_run: The run that asks.
            links: Further spans this is about, as traceparents, each with its link's attributes.
            detach: Begin a new trace, linked to the current span: for runs that start much later
                or are too many for one readable trace.
            attributes: More attributes of the span.

        Returns:
            traceparent, tracestate and baggage. Without an SDK, those of the current context, so
            that a trace passes through; empty if there is none.
        """
        current = contexts.get_current()
        caller = traces.get_current_span(current).get_span_context()
        tracer = self._tracer()
        if tracer is None:
            return propagation.headers(caller, current)
        values: Attributes = self._published(Route(self._names.tasks, task), "trigger", "create")
        values |= {keys.MESSAGE_ID: run_id, keys.RUN_ID: run_id, keys.TASK: task}
        if parent_run is not None:
            values[keys.PARENT_RUN] = parent_run
        wanted = list(links)
        if detach and caller.is_valid:
            wanted.append((propagation.traceparent(caller), {keys.LINK: keys.TRIGGERED_BY}))
        linked, said = propagation.links(wanted)
        span = tracer.start_span(
            f"trigger {task}",
            _NO_PARENT if detach else current,
            SpanKind.PRODUCER,
            {**values, **said, **(attributes or {})},
            linked,
        )
        span.end()
        made = span.get_span_context()
        return propagation.headers(made if made.is_valid else caller, current)

    @contextmanager
    def send(
        self, route: Route, *, count: int = 1, trace: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Span and time a publish until its confirm; what is raised inside marks it as failed.

        Args:
            route: Where the messages go.
            count: How many messages share this confirm.
            trace: The trace headers of the message, to be the parent; else the current span is.
        """
        span, token = self._start_send(route, count, trace)
        started = perf_counter()
        error: str | None = None
        try:
            yield
        except BaseException as problem:
            error = name_of(problem)
            mark_raised(span, problem)
            raise
        finally:
            seconds = perf_counter() - started
            self._metrics.sent(_destination(route), count, seconds, error)
            span.end()
            if token is not None:
                contexts.detach(token)

    def attempt(
        self,
        envelope: Envelope,
        *,
        lost: int,
        max_attempts: int,
        queue: str,
        worker: str,
        now_ms: int,
    ) -> AttemptSpan:
        """Return the recording of one attempt: its `process <task>` span is current inside.

        Before it, the wait that led to it is recorded, if it was a second or more, and the
        attempts that were lost. A wait of over five minutes begins a new trace instead.

        Args:
            envelope: The message that asks for the attempt.
            lost: How many attempts right before this one ended with their worker.
            max_attempts: How many the task may have.
            queue: The queue it came from.
            worker: The worker's id.
            now_ms: The present, in ms since the epoch.
        """
        waited_ms = queued_ms(envelope, now_ms)
        self._metrics.started(envelope.task, queue, waited_ms)
        tracer = self._tracer()
        if tracer is None:
            began = unrecorded(envelope)
        else:
            values = self._received(envelope, queue, lost)
            values[keys.MAX_ATTEMPTS] = max_attempts
            values[keys.QUEUE_WAIT] = waited_ms
            values[keys.WORKER] = worker
            began = begin(tracer, envelope, values, lost=lost, now_ms=now_ms)
        return AttemptSpan(self._metrics, tracer, began=began, envelope=envelope, queue=queue)

    def triggered(self, task: str, count: int = 1) -> None:
        """Count runs asked for and confirmed."""
        self._metrics.triggered(task, count)

    def active(self, task: str, change: int) -> None:
        """Add `change` to the number of runs executing in this process."""
        self._metrics.active(task, change)

    def buried(self, task: str, reason: str) -> None:
        """Count a dead letter that never became an attempt."""
        self._metrics.died(task, self._names.queue(task), reason)
        self._metrics.finished(task, keys.DEAD, None)

    def publish_failed(self, kind: str) -> None:
        """Count a publish without a confirm; `kind` is the class of its error."""
        self._metrics.publish_failed(kind)

    def reconnected(self) -> None:
        """Count a lost connection that was made anew."""
        self._metrics.reconnected()

    def _start_send(
        self, route: Route, count: int, headers: Mapping[str, str] | None
    ) -> tuple[Span, Token[Context] | None]:
        tracer = self._tracer()
        inside = contexts.get_current()
        span: Span = traces.INVALID_SPAN
        if tracer is not None:
            values = self._published(route, "send", "send")
            if count > 1:
                values[keys.BATCH_COUNT] = count
            parent = propagation.context(headers) if headers else inside
            span = tracer.start_span(self._send_name(route), parent, SpanKind.CLIENT, values)
            inside = traces.set_span_in_context(span, inside)
        if _AIO_PIKA in sys.modules:
            # Its span for the same publish would double ours, and replace our traceparent.
            inside = contexts.set_value(_SUPPRESS, True, inside)
        elif tracer is None:
            return span, None
        return span, contexts.attach(inside)

    def _send_name(self, route: Route) -> str:
        match route.exchange:
            case self._names.tasks | self._names.resume:
                return f"send {route.key}"
            case self._names.delay:
                return f"send {route.key}.delay"
            case self._names.dead:
                return f"send {route.key}.dead"
            case exchange:
                return f"send {exchange or route.key}"

    def _published(self, route: Route, operation: str, kind: str) -> Attributes:
        return {
            keys.SYSTEM: keys.RABBITMQ,
            keys.DESTINATION: _destination(route),
            keys.ROUTING_KEY: route.key,
            keys.OPERATION_NAME: operation,
            keys.OPERATION_TYPE: kind,
        }

    def _received(self, envelope: Envelope, queue: str, lost: int) -> Attributes:
        resumed = envelope.seq > 0 or envelope.due_ms is not None
        exchange = self._names.resume if resumed else self._names.tasks
        values: Attributes = {
            keys.SYSTEM: keys.RABBITMQ,
            keys.DESTINATION: f"{exchange}:{envelope.task}:{queue}",
            keys.ROUTING_KEY: envelope.task,
            keys.OPERATION_NAME: "process",
            keys.OPERATION_TYPE: "process",
            keys.MESSAGE_ID: envelope.run_id,
            keys.RUN_ID: envelope.run_id,
            keys.TASK: envelope.task,
            keys.QUEUE: queue,
            keys.ATTEMPT: envelope.attempt,
        }
        if lost:
            values[keys.LOST_ATTEMPTS] = lost
        if envelope.parent is not None:
            values[keys.PARENT_RUN] = envelope.parent
        if envelope.root is not None:
            values[keys.ROOT_RUN] = envelope.root
        if envelope.redrives:
            values[keys.REDRIVES] = envelope.redrives
        return values


def _lean(tracer: Tracer) -> Tracer:
    if "opentelemetry.sdk.trace" not in sys.modules:
        return tracer
    # Who has no SDK does not import it.
    from brokertask.telemetry.tracer import lean

    return lean(tracer)


def _destination(route: Route) -> str:
    if route.exchange and route.key:
        return f"{route.exchange}:{route.key}"
    return route.exchange or route.key or "amq.default"


@lru_cache(1)
def installed_version() -> str:
    """Return brokertask's own version."""
    try:
        return metadata.version("brokertask")
    except metadata.PackageNotFoundError:
        return "0"
