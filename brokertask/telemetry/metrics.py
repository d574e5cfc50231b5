"""The metrics of a process. No run id, key, worker or user is ever a metric attribute.

Counts are kept here and read by the SDK when it exports, because its own counters cost some 7 µs
each time; durations go to its histograms, which have no such form.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from threading import Lock
from typing import Final

from opentelemetry import metrics
from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    Meter,
    MeterProvider,
    Observation,
)

from brokertask.telemetry import attributes as keys
from brokertask.telemetry.attributes import SCHEMA_URL

_BROKER_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ATTEMPT_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 7200)
_RUN_SECONDS: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
_RETRY_SECONDS: Final = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)


class Metrics:
    """The instruments. Cost without an SDK: 0.2 to 0.5 µs a call."""

    def __init__(self, version: str, provider: MeterProvider | None = None) -> None:
        meter = metrics.get_meter("brokertask", version, provider, SCHEMA_URL)
        self._count_messages(meter)
        self._count_runs(meter)
        self._time_them(meter)

    def _count_messages(self, meter: Meter) -> None:
        self._sent = _Tally(
            keys.SYSTEM, keys.DESTINATION, keys.OPERATION_NAME, keys.ERROR_TYPE
        ).counts(meter, "messaging.client.sent.messages", "{message}", "Messages published")
        self._unconfirmed = _Tally(keys.ERROR_TYPE).counts(
            meter,
            "brokertask.publish.confirm.failures",
            "{message}",
            "Publishes the broker refused, returned or did not answer",
        )
        self._reconnects = _Tally().counts(
            meter, "brokertask.connection.reconnects", "{reconnect}", "Connections made anew"
        )

    def _count_runs(self, meter: Meter) -> None:
        self._triggered = _Tally(keys.TASK).counts(
            meter, "brokertask.runs.triggered", "{run}", "Runs asked for and confirmed"
        )
        self._attempts = _Tally(keys.TASK, keys.QUEUE, keys.OUTCOME, keys.ERROR_TYPE).counts(
            meter, "brokertask.attempts", "{attempt}", "Attempts ended"
        )
        self._finished = _Tally(keys.TASK, keys.RUN_STATUS).counts(
            meter, "brokertask.runs.finished", "{run}", "Runs that are over"
        )
        self._retries = _Tally(keys.TASK, keys.REASON).counts(
            meter, "brokertask.retries", "{retry}", "Retries scheduled"
        )
        self._dead = _Tally(keys.TASK, keys.QUEUE, keys.REASON).counts(
            meter, "brokertask.dead_letters", "{run}", "Runs put into a dead-letter queue"
        )
        self._active = _Tally(keys.TASK, keys.STATE).measures(
            meter, "brokertask.runs.active", "{run}", "Runs in this state now"
        )

    def _time_them(self, meter: Meter) -> None:
        self._operation = _seconds(
            meter,
            "messaging.client.operation.duration",
            "From the publish to the broker's confirm",
            _BROKER_SECONDS,
        )
        self._attempt = _seconds(
            meter, "brokertask.attempt.duration", "One attempt", _ATTEMPT_SECONDS
        )
        self._run = _seconds(
            meter, "brokertask.run.duration", "From the trigger to the end", _RUN_SECONDS
        )
        self._queued = _seconds(
            meter,
            "brokertask.run.queue_time",
            "From ready to started; intended delays are not counted",
            _RUN_SECONDS,
        )
        self._delay = _seconds(
            meter, "brokertask.retry.delay", "Chosen before a retry", _RETRY_SECONDS
        )

    def sent(self, destination: str, count: int, seconds: float, error: str | None) -> None:
        """Record one publish of `count` messages."""
        self._sent.add(count, keys.RABBITMQ, destination, "send", error)
        labels = {
            keys.SYSTEM: keys.RABBITMQ,
            keys.DESTINATION: destination,
            keys.OPERATION_NAME: "send",
        }
        if error is not None:
            labels[keys.ERROR_TYPE] = error
        self._operation.record(seconds, labels)

    def triggered(self, task: str, count: int) -> None:
        """Record that runs were asked for."""
        self._triggered.add(count, task)

    def publish_failed(self, kind: str) -> None:
        """Record a publish without a confirm, by the class of its error."""
        self._unconfirmed.add(1, kind)

    def reconnected(self) -> None:
        """Record that a lost connection was made anew."""
        self._reconnects.add(1)

    def active(self, task: str, change: int) -> None:
        """Record that the number of executing runs changed."""
        self._active.add(change, task, "executing")

    def started(self, task: str, queue: str, queued_ms: int) -> None:
        """Record how long a run that was ready waited for a worker."""
        self._queued.record(queued_ms / 1000, {keys.TASK: task, keys.QUEUE: queue})

    def attempted(
        self, task: str, queue: str, outcome: str, error: str | None, seconds: float
    ) -> None:
        """Record that an attempt ended."""
        self._attempts.add(1, task, queue, outcome, error)
        self._attempt.record(seconds, {keys.TASK: task, keys.OUTCOME: outcome})

    def finished(self, task: str, status: str, seconds: float | None) -> None:
        """Record that a run is over, and how long after its trigger if that is known."""
        self._finished.add(1, task, status)
        if seconds is not None:
            self._run.record(seconds, {keys.TASK: task, keys.RUN_STATUS: status})

    def retried(self, task: str, reason: str, seconds: float) -> None:
        """Record that a retry was scheduled after `seconds`."""
        self._retries.add(1, task, reason)
        self._delay.record(seconds, {keys.TASK: task})

    def died(self, task: str, queue: str, reason: str) -> None:
        """Record that a run was buried."""
        self._dead.add(1, task, queue, reason)


@lru_cache(8)
def shared_metrics(version: str, provider: MeterProvider | None) -> Metrics:
    """Return the metrics of a provider (None: the global one), the same for every App.

    An SDK reads a count from the first instrument of its name alone.
    """
    return Metrics(version, provider)


class _Tally:
    """A number for each combination of attribute values; None stands for an absent attribute."""

    def __init__(self, *labels: str) -> None:
        self._labels = labels
        self._numbers: dict[tuple[str | None, ...], int] = {}
        self._lock = Lock()  # triggers may come from any thread

    def counts(self, meter: Meter, name: str, unit: str, description: str) -> _Tally:
        meter.create_observable_counter(name, [self._observe], unit, description)
        return self

    def measures(self, meter: Meter, name: str, unit: str, description: str) -> _Tally:
        meter.create_observable_up_down_counter(name, [self._observe], unit, description)
        return self

    def add(self, amount: int, *values: str | None) -> None:
        with self._lock:
            self._numbers[values] = self._numbers.get(values, 0) + amount

    def _observe(self, options: CallbackOptions) -> Iterable[Observation]:
        with self._lock:
            numbers = dict(self._numbers)
        for values, number in numbers.items():
            pairs = zip(self._labels, values, strict=True)
            yield Observation(number, {label: value for label, value in pairs if value is not None})


def _seconds(meter: Meter, name: str, description: str, bounds: tuple[float, ...]) -> Histogram:
    return meter.create_histogram(
        name, "s", description, explicit_bucket_boundaries_advisory=bounds
    )
