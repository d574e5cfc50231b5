"""What brokertask itself costs a run: `python -m tests.bench.worker [CASE ...] [--profile]`.

A worker in this process executes runs that do nothing, from a transport that costs next to
nothing: it confirms once per turn of the event loop. Cases alternate; what counts is CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import uvloop
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from pydantic import BaseModel

from brokertask import App, Context, Settings, Task
from brokertask.envelope import Envelope, Message
from brokertask.errors import ConfigurationError
from brokertask.telemetry import Telemetry
from brokertask.telemetry.exporter import encode
from brokertask.topology import Binding, Queue, Route, Topology
from brokertask.transport.base import Consumer, Depth, Difference, Receive
from brokertask.worker import Worker

IN_FLIGHT: Final = 100
ROUNDS: Final = 5
TRACE: Final = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


class Named(BaseModel):
    t: int
    name: str


@dataclass(slots=True, eq=False)
class Given:
    """A delivery that is acked by being counted."""

    message: Message
    settled: Callable[[], None]
    queue: str = "bt.q.noop"
    key: str = "noop"
    redelivered: bool = False
    lost: int = 0
    live: bool = True

    async def ack(self) -> None:
        self.live = False
        self.settled()

    async def requeue(self) -> None:
        raise AssertionError("a run of the benchmark failed")


class Subscribed:
    async def limit(self, prefetch: int) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def close(self) -> None:
        pass


@dataclass(slots=True)
class Nowhere:
    """A transport to nowhere, see `transport.base.Transport`."""

    receive: Receive | None = None
    connected: bool = True
    carries_losses: bool = True
    settling: float = 0.0
    waiting: list[asyncio.Future[None]] = field(default_factory=list)

    async def open(self, *, timeout: float) -> None:
        pass

    async def close(self) -> None:
        pass

    async def publish(
        self, route: Route, message: Message, *, timeout: float, mandatory: bool = True
    ) -> None:
        loop = asyncio.get_running_loop()
        confirmed = loop.create_future()
        if not self.waiting:
            loop.call_soon(self._confirm)
        self.waiting.append(confirmed)
        await confirmed

    def _confirm(self) -> None:
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            each.set_result(None)

    async def consume(
        self, queue: str, receive: Receive, *, prefetch: int, limited: bool = False
    ) -> Consumer:
        self.receive = receive
        return Subscribed()

    async def declare(self, topology: Topology) -> None:
        pass

    async def compare(self, topology: Topology) -> list[Difference]:
        return []

    async def depth(self, queue: str) -> Depth | None:
        return Depth(0, 1)

    async def delete(self, queue: str) -> None:
        pass

    async def follow(
        self, stream: str, receive: Callable[[Message], None], *, after: int | None = None
    ) -> Consumer:
        raise ConfigurationError(f"there is no {stream}")

    async def listen(
        self, queue: Queue, bindings: tuple[Binding, ...], receive: Callable[[Message], None]
    ) -> Consumer:
        return Subscribed()


class Dropped(SpanExporter):
    """Exports to nowhere, what it `encodes` before."""

    def __init__(self, *, encodes: bool) -> None:
        self._encodes = encodes

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._encodes:
            encode(spans)
        return SpanExportResult.SUCCESS


def traced(*, encodes: bool) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(Dropped(encodes=encodes), max_queue_size=100_000)
    )
    return provider


async def noop(payload: Named) -> None:
    pass


async def noop_with_context(payload: Named, ctx: Context) -> None:
    pass


def noop_in_a_thread(payload: Named) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of run."""

    name: str
    function: Callable[..., Any] = noop
    timeout: float | None = None
    provider: Callable[[], TracerProvider | None] = lambda: None

    def telemetry(self, app: App) -> Telemetry:
        return Telemetry(app.settings.names, tracer_provider=self.provider())


CASES: Final = (
    Case("no-op"),
    Case("a context", noop_with_context),
    Case("a timeout", timeout=60),
    Case("in a thread", noop_in_a_thread),
    Case("unsampled", provider=lambda: TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)),
    Case("sampled", provider=lambda: traced(encodes=False)),
    Case("exported", provider=lambda: traced(encodes=True)),
)


class Stand:
    """A worker of one case, fed by hand."""

    def __init__(self, case: Case) -> None:
        self.transport = Nowhere()
        self.app = App("bench", settings=Settings(amqp_url="memory:", results=False))
        self.app.connect = lambda: self.transport  # type: ignore[method-assign]
        self.app.telemetry = case.telemetry(self.app)
        self.task: Task[Any, Any] = self.app.task(
            id="noop", concurrency=IN_FLIGHT, timeout=case.timeout
        )(case.function)
        self.worker: Worker = self.app.worker()

    def messages(self, count: int) -> Iterator[Message]:
        payload = self.app.client.encode({"t": 1, "name": "x" * 60})
        now = time.time_ns() // 1_000_000
        for number in range(count):
            yield Envelope(
                run_id=f"0198c0de-0000-7000-8000-{number:012d}",
                task="noop",
                payload=payload,
                triggered_ms=now,
                sent_ms=now,
                app_id="bench",
                trace={"traceparent": TRACE},
            ).message()

    async def cost(self, runs: int) -> float:
        """Return the CPU time of one run in µs."""
        messages = list(self.messages(runs))
        receive = self.transport.receive
        assert receive is not None
        left, done = iter(messages), asyncio.Event()
        settled = 0

        def settle() -> None:
            nonlocal settled
            settled += 1
            if (message := next(left, None)) is not None:
                receive(Given(message, settle))
            elif settled == runs:
                done.set()

        begun = time.process_time()
        for _ in range(IN_FLIGHT):
            receive(Given(next(left), settle))
        await done.wait()
        return (time.process_time() - begun) / runs * 1e6


async def bench(cases: Sequence[Case], runs: int) -> None:
    found: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(ROUNDS):
        for case in cases:
            stand = Stand(case)
            async with stand.worker:
                await stand.cost(runs // 10)
                found[case.name].append(await stand.cost(runs))
    print(f"CPU of a run in µs, {ROUNDS} rounds of {runs}: median, least")
    for name, costs in found.items():
        print(f"{name:12}{median(costs):8.1f}{min(costs):8.1f}")


async def profile(cases: Sequence[Case], runs: int) -> None:
    for case in cases:
        stand = Stand(case)
        async with stand.worker:
            await stand.cost(runs // 10)
            profiler = cProfile.Profile()
            profiler.enable()
            await stand.cost(runs)
            profiler.disable()
        print(case.name)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--profile", action="store_true", help="show where the time goes, instead")
    given = parser.parse_args()
    cases = [case for case in CASES if case.name in given.cases]
    uvloop.run((profile if given.profile else bench)(cases, given.runs))


if __name__ == "__main__":
    main()
