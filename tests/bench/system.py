"""Who is compared: how each system's worker and producer are started, and what is not equal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import unquote, urlsplit

from tests.bench.marks import QUEUE, Kind, Setup
from tests.bench.process import ROOT

Command: TypeAlias = Callable[[Setup], Sequence[str]]

TOOLS: Final = ROOT / ".brokertask/bench"
"""Where `make bench` puts the peers and the C client."""
PYTHON: Final = TOOLS / "venv/bin/python"
CLIENT: Final = TOOLS / "client"
OTLP: Final = "{otlp}"
"""Stands for the endpoint of the sink in an environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row of the tables."""

    name: str
    title: str
    worker: Command
    producer: Command
    kind: Kind = "classic"
    queue: str = QUEUE
    environment: Mapping[str, str] = field(default_factory=dict)
    confirms_fill: bool = True
    """Whether it fills a queue as fast with confirms as without."""
    pipelines: bool = True
    """Whether a producer can have several publishes in flight."""
    sync: bool = False
    """Whether its tasks can be plain functions."""
    compiled: bool = False
    """Its producer reads plain words; see `client.c`."""
    note: str = ""

    @property
    def fast(self) -> bool:
        """Whether it is given the larger amount of work."""
        return self.compiled or (self.ours and "BROKERTASK_DATA_PLANE" not in self.environment)

    @property
    def ours(self) -> bool:
        return self.queue != QUEUE


def _module(name: str, *arguments: str) -> Command:
    return lambda setup: [str(PYTHON), "-m", f"tests.bench.peers.{name}", *arguments]


def _own_worker(setup: Setup) -> Sequence[str]:
    return [
        *(sys.executable, "-m", "brokertask.cli", "worker", "tests.bench.subject:app"),
        *("--processes", str(setup.processes), "--log-level", "warning"),
    ]


def _own_producer(setup: Setup) -> Sequence[str]:
    return [sys.executable, "-m", "tests.bench.subject"]


def _client(mode: str) -> Command:
    def command(setup: Setup) -> Sequence[str]:
        url = urlsplit(setup.url)
        marks = str(Path(setup.folder) / "started")
        vhost = unquote(url.path.removeprefix("/")) or "/"
        return [str(CLIENT), mode, str(url.port), vhost, setup.kind, str(setup.concurrency), marks]

    return command


def _celery(pool: str) -> Command:
    def command(setup: Setup) -> Sequence[str]:
        threads = setup.concurrency if pool == "threads" else setup.processes
        prefetch = 1 if pool == "threads" else max(1, setup.concurrency // setup.processes)
        return [
            *(str(PYTHON), "-m", "celery", "-A", "tests.bench.peers.celery", "worker"),
            *("--pool", pool, "--concurrency", str(threads), "--loglevel", "WARNING"),
            *("--prefetch-multiplier", str(prefetch)),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        ]

    return command


def _dramatiq(setup: Setup) -> Sequence[str]:
    return [
        *(str(PYTHON), "-m", "dramatiq", "tests.bench.peers.dramatiq", "--path", str(ROOT)),
        *("--processes", str(setup.processes), "--threads", str(setup.concurrency)),
    ]


def _taskiq(setup: Setup) -> Sequence[str]:
    return [
        *(str(PYTHON), "-m", "taskiq", "worker", "tests.bench.peers.taskiq:broker"),
        *("--workers", str(setup.processes), "--max-async-tasks", str(setup.concurrency)),
        *("--max-threadpool-threads", str(setup.concurrency), "--log-level", "WARNING"),
    ]


def _faststream(setup: Setup) -> Sequence[str]:
    several = ("--workers", str(setup.processes)) if setup.processes > 1 else ()
    return [*(str(PYTHON), "-m", "faststream", "run", "tests.bench.peers.faststream:app", *several)]


def _own(
    name: str, title: str, kind: Kind, environment: Mapping[str, str], note: str = ""
) -> System:
    return System(
        name=name,
        title=title,
        worker=_own_worker,
        producer=_own_producer,
        kind=kind,
        queue="bt.q.noop",
        environment=environment,
        sync=True,
        note=note,
    )


_TRACES: Final = {"OTEL_EXPORTER_OTLP_ENDPOINT": OTLP, "OTEL_METRICS_EXPORTER": "none"}
_SYNC_PRODUCER: Final = "one publish in flight in a producer; confirms, off by default, are on"

SYSTEMS: Final = (
    _own("brokertask", "brokertask", "classic", {}),
    _own("brokertask-quorum", "brokertask, quorum", "quorum", {}),
    _own(
        "brokertask-unsampled",
        "brokertask, unsampled",
        "classic",
        _TRACES | {"OTEL_TRACES_SAMPLER": "always_off"},
        "the OpenTelemetry SDK is set up, and samples nothing",
    ),
    _own(
        "brokertask-traced",
        "brokertask, traced",
        "classic",
        _TRACES,
        "every run is sampled, and exported over OTLP to a collector that forgets it",
    ),
    _own(
        "brokertask-aio-pika",
        "brokertask, over aio-pika",
        "classic",
        {"BROKERTASK_DATA_PLANE": "aio-pika"},
        "with `BROKERTASK_DATA_PLANE=aio-pika`",
    ),
    System(
        name="celery-prefork",
        title="Celery, prefork",
        worker=_celery("prefork"),
        producer=_module("celery"),
        confirms_fill=False,
        pipelines=False,
        note=f"a child runs one task at a time, so concurrency is its prefetch; {_SYNC_PRODUCER}",
    ),
    System(
        name="celery-threads",
        title="Celery, threads",
        worker=_celery("threads"),
        producer=_module("celery"),
        confirms_fill=False,
        pipelines=False,
        sync=True,
        note=_SYNC_PRODUCER,
    ),
    System(
        name="dramatiq",
        title="Dramatiq",
        worker=_dramatiq,
        producer=_module("dramatiq"),
        environment={"dramatiq_queue_prefetch": "{concurrency}"},
        confirms_fill=False,
        pipelines=False,
        sync=True,
        note=f"its prefetch is set to its threads, half the default; {_SYNC_PRODUCER}",
    ),
    System(
        name="taskiq",
        title="taskiq",
        worker=_taskiq,
        producer=_module("taskiq"),
        sync=True,
        note="taskiq-aio-pika; its default is a quorum queue",
    ),
    System(
        name="taskiq-quorum",
        title="taskiq, quorum",
        worker=_taskiq,
        producer=_module("taskiq"),
        kind="quorum",
    ),
    System(
        name="faststream",
        title="FastStream",
        worker=_faststream,
        producer=_module("faststream"),
        sync=True,
        note="no retries and no task ids: a message handler; its log is off",
    ),
    System(
        name="aio-pika",
        title="aio-pika, bare",
        worker=_module("aiopika", "work"),
        producer=_module("aiopika"),
        note="no tasks: a callback that reads JSON and acks",
    ),
    System(
        name="c",
        title="C client",
        worker=_client("work"),
        producer=_client("produce"),
        compiled=True,
        note="librabbitmq; no tasks: it marks and acks each delivery",
    ),
    System(
        name="c-quorum",
        title="C client, quorum",
        worker=_client("work"),
        producer=_client("produce"),
        kind="quorum",
        compiled=True,
    ),
)
BY_NAME: Final = {system.name: system for system in SYSTEMS}
