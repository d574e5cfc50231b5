"""The composition root: an `App` holds the tasks, and is the only place that chooses adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from pydantic import ValidationError

from brokertask.claims import Claims
from brokertask.client import Client
from brokertask.clock import Clock, SystemClock
from brokertask.errors import ConfigurationError, DuplicateTask, InvalidOption
from brokertask.settings import Settings
from brokertask.task import Middleware, Task, TaskDecorator, check_async
from brokertask.telemetry import Telemetry
from brokertask.topology import Topology, topology
from brokertask.transport.base import Transport
from brokertask.transport.memory import MemoryBroker, MemoryTransport
from brokertask.worker import Worker

Lifespan = Callable[["App"], AbstractAsyncContextManager[Any]]


class App:
    """Tasks that belong together, the client that triggers them, and the workers that run them.

    Declaring connects to nothing. The client connects at the first trigger, a worker when it
    starts; `async with app:` connects the client now and closes it at the end.
    """

    def __init__(self, name: str, *, settings: Settings | None = None) -> None:
        self.name = name
        self.settings = settings or _settings_of_the_environment()
        self.tasks: dict[str, Task[Any, Any]] = {}
        self.telemetry = Telemetry(self.settings.names)
        self.client = Client(
            app_id=name,
            settings=self.settings,
            telemetry=self.telemetry,
            now_ms=lambda: self.clock.now_ms(),
            connect=self.connect,
            topology=self.topology,
            claims=self._claims(),
        )
        self._middleware: list[Middleware] = []
        self._lifespan: Lifespan = _no_lifespan
        self._embedded: MemoryBroker | None = None

    def __repr__(self) -> str:
        return f"<App {self.name}: {', '.join(self.tasks) or 'no tasks'}>"

    @property
    def task(self) -> TaskDecorator:
        """Declare a function as a task: `@app.task` or `@app.task(retry=..., timeout=...)`."""
        return TaskDecorator(self._register, self.client)

    @property
    def clock(self) -> Clock:
        """What due times are told by: the embedded broker's clock, or the system's."""
        return _SYSTEM_CLOCK if self._embedded is None else self._embedded.clock

    @contextmanager
    def on(self, broker: MemoryBroker) -> Iterator[None]:
        """Use `broker`, and its clock, in place of the broker of the settings."""
        before, self._embedded = self._embedded, broker
        try:
            with self.client.afresh():
                yield
        finally:
            self._embedded = before

    def middleware(self, middleware: Middleware) -> Middleware:
        """Wrap every task's call: `async (context, call_next) -> result`, the first outermost."""
        self._middleware.append(check_async(middleware, "a middleware"))
        return middleware

    def lifespan(self, function: Callable[[App], AsyncIterator[Any]]) -> Lifespan:
        """Run an async generator around each worker's life; what it yields is `ctx.state`."""
        self._lifespan = asynccontextmanager(function)
        return self._lifespan

    async def __aenter__(self) -> App:
        await self.client.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.client.close()

    def worker(
        self,
        *,
        tasks: Iterable[str] | None = None,
        concurrency: int | Mapping[str, int] | None = None,
    ) -> Worker:
        """Return a worker for this process.

        Args:
            tasks: Only these; by default all that are declared.
            concurrency: In place of the tasks' own, for all or by task.

        Raises:
            InvalidOption: A task that is not declared, or there is none at all.
            ConfigurationError: What the payload store needs is not installed.
        """
        self.client.claims.open()
        chosen = [self._known(task) for task in (self.tasks if tasks is None else tasks)]
        if not chosen:
            raise InvalidOption(f"app {self.name!r} has no tasks to work on")
        if isinstance(concurrency, int):
            concurrency = {task.id: concurrency for task in chosen}
        for task, count in (concurrency or {}).items():
            self._known(task)
            if not 1 <= count <= 65_535:
                raise InvalidOption(f"concurrency of {task!r} is 1 to 65535, not {count}")
        return Worker(
            tasks=chosen,
            concurrency=concurrency or {},
            connect=self.connect,
            topology=self.topology,
            lifespan=lambda: self._lifespan(self),
            middleware=self._middleware,
            settings=self.settings,
            telemetry=self.telemetry,
            clock=self.clock,
        )

    def topology(self) -> Topology:
        """Return everything this app needs on the broker."""
        return topology(self.settings.names, (task.queue for task in self.tasks.values()))

    def connect(self) -> Transport:
        """Return a new transport to the broker of the settings; it connects when opened."""
        url = self.settings.broker_url()
        if self._embedded is None and url.startswith("memory:"):
            self._embedded = MemoryBroker(_SYSTEM_CLOCK)
        if self._embedded is not None:
            return MemoryTransport(self._embedded)
        if url.startswith("unix:"):
            from brokertask.transport.socket import SocketTransport

            return SocketTransport(Path(url.removeprefix("unix:")))
        # Embedded use, tests and the first five minutes do not pay for importing aio-pika.
        from brokertask.transport.rabbitmq import RabbitTransport

        return RabbitTransport(
            url,
            heartbeat=self.settings.heartbeat,
            name=self.name,
            data_plane=self.settings.data_plane,
            reconnected=self.telemetry.reconnected,
        )

    def _claims(self) -> Claims:
        above = min(self.settings.claim_above_bytes, self.settings.max_payload_bytes)
        return Claims(self.settings.payload_store, above=above)

    def _register(self, task: Task[Any, Any]) -> None:
        other = self.tasks.get(task.id)
        if other is not None:
            raise DuplicateTask(
                f"task id {task.id!r} is declared twice: at {other.where} and at {task.where}. "
                "The id names the queue, so the two would steal each other's messages; "
                "give one of them another id="
            )
        self.tasks[task.id] = task

    def _known(self, task: str) -> Task[Any, Any]:
        if task not in self.tasks:
            declared = ", ".join(sorted(self.tasks)) or "none"
            raise InvalidOption(f"app {self.name!r} has no task {task!r}; it declares: {declared}")
        return self.tasks[task]


_SYSTEM_CLOCK: Final = SystemClock()


@asynccontextmanager
async def _no_lifespan(_: App) -> AsyncIterator[None]:
    yield


def _settings_of_the_environment() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(
            f"BROKERTASK_{'_'.join(str(part) for part in problem['loc']).upper()}: {problem['msg']}"
            for problem in error.errors(include_input=False, include_url=False)
        )
        raise ConfigurationError(f"the environment is not understood: {problems}") from None
