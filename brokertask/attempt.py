"""One execution of a run in this worker: the task's code, supervised, and what it came to.

The code runs in an asyncio task of its own, so that nothing of ours is cancelled with it, and so
that a lost connection takes the lease on the message, not the work.
"""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import anyio
from pydantic import ValidationError

from brokertask.clock import Clock
from brokertask.context import Context
from brokertask.envelope import MAX_TRACEBACK, Envelope
from brokertask.errors import EnvelopeError, InvalidPayload, Reason
from brokertask.outcome import (
    AttemptError,
    Failed,
    Interrupted,
    Outcome,
    Retrying,
    Succeeded,
)
from brokertask.run import RunningIn, running_in
from brokertask.task import CallNext, Middleware, Task
from brokertask.telemetry import AttemptSpan
from brokertask.transport.base import Delivery
from brokertask.typed import dump, explain
from brokertask.values import clip, encode

log = logging.getLogger("brokertask.worker")
T = TypeVar("T")

CANCEL_GRACE: Final = 5.0
"""How long a cancelled task may clean up before it is left behind."""
INTERRUPT_GRACE: Final = 3.0
"""The same at the end of a drain; shorter than a worker's time for handing back."""
LEAVING: Final = 1.0
HOOK_TIMEOUT: Final = 30.0
MAX_CAUSES: Final = 5
_PACKAGE: Final = str(Path(__file__).parent)
Key: TypeAlias = tuple[str, str, int]


@dataclass(slots=True, eq=False)
class Attempt:
    """One execution, and the deliveries that its outcome settles.

    There is one delivery, unless the connection was lost meanwhile or the message was doubled.
    """

    task: Task[Any, Any]
    envelope: Envelope
    deliveries: list[Delivery] = field(default_factory=list)
    lost: int = 0
    """How many of the attempts so far were deliveries that ended unsettled."""
    unread: EnvelopeError | None = None
    """Why the message is no run at all."""
    user: asyncio.Task[_Returned | _Raised] | None = None
    left: asyncio.Future[None] | None = None
    """Done when an interrupted attempt is not waited for any longer."""
    context: Context | None = None
    traceparent: str | None = None
    interrupted: bool = False
    followed: bool = False
    """What follows it is on the broker's disk."""
    told: bool = False
    """Its event was published, or given up."""

    @property
    def key(self) -> Key:
        """What a second delivery of the same message has in common with the first."""
        return self.task.id, self.envelope.run_id, self.envelope.seq

    @property
    def live(self) -> bool:
        """Whether there is a delivery that can still be settled."""
        return any(delivery.live for delivery in self.deliveries)

    def interrupt(self) -> None:
        """Cancel it because the worker goes away; it will not count."""
        self.interrupted = True
        self.cancel("drain")
        if self.left is not None:
            # Code that ignores its cancellation is left behind; its run is handed back anyway.
            self.left.get_loop().call_later(INTERRUPT_GRACE, _resolve, self.left)

    def cancel(self, cause: str) -> None:
        """Cancel the task's code and tell it why."""
        if self.context is not None:
            self.context.cancelled = cause
        if self.user is not None:
            self.user.cancel(cause)


class Performer:
    """Performs attempts: everything between having a slot and having an outcome."""

    def __init__(
        self,
        *,
        worker: str,
        clock: Clock,
        max_result_bytes: int,
        threads: int,
        middleware: Sequence[Middleware],
        state: Any,
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._max_result_bytes = max_result_bytes
        self._threads = anyio.CapacityLimiter(threads)
        self._counted = anyio.CapacityLimiter(math.inf)
        self._middleware = tuple(middleware)
        self._state = state
        self._code: set[asyncio.Task[Any]] = set()

    async def finish(self) -> None:
        """Cancel code that was left behind and give it a last second, before its pools close."""
        for code in self._code:
            code.cancel("drain")
        if self._code:
            await asyncio.wait(self._code, timeout=LEAVING)

    def _start(self, code: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run user code in a task of its own, remembered until it ends."""
        task = asyncio.create_task(code, name=name)
        self._code.add(task)
        task.add_done_callback(self._code.discard)
        return task

    async def perform(self, attempt: Attempt, span: AttemptSpan) -> Outcome:
        """Run the task's code within its timeout and return what it came to, whatever it does."""
        if attempt.task.is_async:
            return await self._within_time(attempt, span)
        # Before the clock starts: a run that waits for a thread has not overrun.
        async with self._threads:
            return Interrupted() if attempt.interrupted else await self._within_time(attempt, span)

    async def _within_time(self, attempt: Attempt, span: AttemptSpan) -> Outcome:
        attempt.context = self._context(attempt, span.trace_id)
        envelope, timeout = attempt.envelope, attempt.task.options.timeout
        root, loop = envelope.root or envelope.run_id, asyncio.get_running_loop()
        running_in.set(RunningIn(envelope.run_id, envelope.task, envelope.attempt, root, loop))
        name = f"{attempt.task.id} {envelope.run_id}"
        user = self._start(self._run(attempt.task, attempt.context, envelope), name)
        attempt.user, attempt.left = user, loop.create_future()
        ends: set[asyncio.Future[Any]] = {user, attempt.left}
        try:
            done, _ = await asyncio.wait(ends, timeout=timeout, return_when=FIRST_COMPLETED)
            if not done:
                attempt.cancel("timeout")
                await asyncio.wait(ends, timeout=CANCEL_GRACE, return_when=FIRST_COMPLETED)
        except asyncio.CancelledError:
            attempt.cancel("drain")
            raise
        if user.done() and not user.cancelled():
            return await self._judge(attempt, user.result())
        if not user.done():
            log.error("run %s of %s ignores its cancellation", envelope.run_id, attempt.task.id)
        if attempt.interrupted:
            return Interrupted()
        return await self._judge(attempt, _Raised(TimeoutError(f"took longer than {timeout:g} s")))

    async def give_up(self, attempt: Attempt, reason: Reason, error: BaseException) -> Failed:
        """Return the end of a run that gets no further attempt, after its failure hooks."""
        if attempt.context is None:
            attempt.context = self._context(attempt, None)
            with suppress(EnvelopeError, InvalidPayload):
                attempt.context.payload = attempt.task.load(attempt.envelope.value())
        record = self.record(attempt, error)
        await self._call_hooks(attempt, attempt.task.failure_hooks, error)
        return Failed(reason, record)

    async def _run(
        self, task: Task[Any, Any], context: Context, envelope: Envelope
    ) -> _Returned | _Raised:
        """Load the payload and call the task in its middleware; errors of user code end here."""
        try:
            payload = context.payload = task.load(envelope.value())
        except EnvelopeError as error:
            return _Raised(error, error.reason)
        except InvalidPayload as error:
            return _Raised(error, "invalid")

        async def innermost(inner: Context) -> Any:
            return await task.call(inner, payload, threads=self._counted)

        call: CallNext = innermost
        for middleware in reversed((*self._middleware, *task.options.middleware)):
            call = partial(_wrap, middleware, call)
        try:
            return _Returned(await call(context))
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: a task must not be able to stop the worker.
            if context.cancelled is not None:
                raise asyncio.CancelledError(context.cancelled) from error
            if isinstance(error, asyncio.CancelledError):
                return _Raised(RuntimeError("the task cancelled itself"))
            return _Raised(error)

    async def _judge(self, attempt: Attempt, ended: _Returned | _Raised) -> Outcome:
        """Return what follows from how the code ended, and call the hooks if it is the end."""
        if isinstance(ended, _Returned):
            return await self._succeeded(attempt, ended.value)
        if ended.reason is not None:
            return await self.give_up(attempt, ended.reason, ended.error)
        decision = attempt.task.options.retry.decide(attempt.envelope.attempt, ended.error)
        if decision.delay is None:
            return await self.give_up(attempt, decision.reason, ended.error)
        return Retrying(decision.delay, self.record(attempt, ended.error))

    async def _succeeded(self, attempt: Attempt, result: Any) -> Outcome:
        try:
            body = encode(dump(attempt.task.result_type, result))
            if len(body) > self._max_result_bytes:
                raise InvalidPayload(
                    f"the result is {len(body)} bytes, the limit is {self._max_result_bytes} "
                    "(max_payload_bytes)"
                )
        except InvalidPayload as error:
            return await self.give_up(attempt, "bad_result", error)
        await self._call_hooks(attempt, attempt.task.success_hooks, result)
        return Succeeded(body)

    async def _call_hooks(
        self, attempt: Attempt, hooks: Sequence[Callable[..., Any]], value: object
    ) -> None:
        """Call hooks one after the other, each in a task of its own; none changes the outcome."""
        for hook in hooks:
            call = self._start(_hook(hook, attempt.context, value), f"hook of {attempt.task.id}")
            done, _ = await asyncio.wait({call}, timeout=HOOK_TIMEOUT)
            if not done:
                call.cancel("timeout")
                log.error("a hook of %s took over %g s; left", attempt.task.id, HOOK_TIMEOUT)
            elif (error := call.result()) is not None:
                log.error("a hook of %s failed; its run goes on", attempt.task.id, exc_info=error)

    def _context(self, attempt: Attempt, trace_id: str | None) -> Context:
        envelope, options = attempt.envelope, attempt.task.options
        at, timeout = envelope.triggered_ms, options.timeout
        now = datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC)
        return Context(
            run_id=envelope.run_id,
            task=attempt.task.id,
            attempt=envelope.attempt,
            max_attempts=options.retry.max_attempts,
            tags=envelope.tags,
            triggered_at=None if at is None else datetime.fromtimestamp(at / 1000, UTC),
            deadline=now + timedelta(seconds=timeout) if timeout else None,
            parent=envelope.parent,
            root=envelope.root,
            worker=self._worker,
            trace_id=trace_id,
            state=self._state,
        )

    def record(self, attempt: Attempt, error: BaseException) -> AttemptError:
        """Return an error as it travels in the run's memory."""
        return AttemptError(
            attempt=attempt.envelope.attempt,
            type=_name(error),
            message=clip(_text(error)),
            at_ms=self._clock.now_ms(),
            worker=self._worker,
            traceback=clip(_frames(error), MAX_TRACEBACK),
        )


@dataclass(frozen=True, slots=True)
class _Returned:
    """The task's code returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Raised:
    """The task's code raised; with a `reason`, nothing is to be decided any more."""

    error: BaseException
    reason: Reason | None = None


async def _hook(
    hook: Callable[..., Any], context: Context | None, value: object
) -> BaseException | None:
    """Return what a hook raised: even SystemExit must not stop the worker."""
    try:
        await hook(context, value)
    except BaseException as error:
        return error
    return None


async def _wrap(middleware: Middleware, call: CallNext, context: Context) -> Any:
    return await middleware(context, call)


def _frames(error: BaseException) -> str:
    """Return where an error and its causes came from, from the user's first frame on.

    Our own frames are the same for every error. Values that a validation refused are left out.
    """
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(parts) < MAX_CAUSES:
        trace = seen.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            trace = trace.tb_next
        frames = "".join(traceback.format_tb(trace))
        parts.append(f"Traceback (most recent call last):\n{frames}{_name(seen)}: {_text(seen)}\n")
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\nand before it\n".join(parts) if error.__traceback__ else ""


def _name(error: BaseException) -> str:
    kind = type(error)
    own = kind.__module__ in ("builtins", "__main__", "brokertask.errors")
    return kind.__qualname__ if own else f"{kind.__module__}.{kind.__qualname__}"


def _text(error: BaseException) -> str:
    """Return what an error says, as text that can be sent, whatever its class does."""
    try:
        text = explain(error) if isinstance(error, ValidationError) else str(error)
    except Exception as problem:
        text = f"(its text cannot be had: {type(problem).__name__})"
    return text.encode("utf-8", "replace").decode()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
