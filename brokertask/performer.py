"""Performs attempts: the task's code, supervised, and what it came to.

The code runs in an asyncio task of its own, so that nothing of ours is cancelled with it, and so
that a lost connection takes the lease on the message, not the work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar

from brokertask.attempt import Attempt, Raised, Returned
from brokertask.clock import Clock
from brokertask.context import Context
from brokertask.envelope import MAX_TRACEBACK, Envelope
from brokertask.errors import (
    BrokertaskError,
    ConfigurationError,
    EnvelopeError,
    InvalidOption,
    InvalidPayload,
    MemoryFull,
    PayloadError,
    PayloadUnavailable,
    Reason,
    StepMismatch,
)
from brokertask.host import AttemptHost
from brokertask.outcome import (
    AttemptError,
    Cancelled,
    Failed,
    Interrupted,
    Outcome,
    Repeated,
    Retrying,
    Sleeping,
    Succeeded,
    Waiting,
)
from brokertask.raised import frames_of, name_of, text_of
from brokertask.run import RunningIn, running_in
from brokertask.settings import Settings
from brokertask.steps import Steps
from brokertask.task import CallNext, Middleware, Task
from brokertask.threads import Threads
from brokertask.typed import dump
from brokertask.values import MSGPACK, clip, decode, encode

log = logging.getLogger("brokertask.worker")
T = TypeVar("T")

LEAVING: Final = 1.0
HOOK_TIMEOUT: Final = 30.0


class Performer:
    """Performs attempts: everything between having a slot and having an outcome."""

    def __init__(
        self,
        *,
        worker: str,
        clock: Clock,
        settings: Settings,
        middleware: Sequence[Middleware],
        state: Any,
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._settings = settings
        self._threads = Threads(settings.thread_limit)
        self._middleware = tuple(middleware)
        self._state = state
        self._code: set[asyncio.Task[Any]] = set()

    async def finish(self) -> None:
        """Cancel code that was left behind and give it a last second, before its pools close."""
        for code in self._code:
            code.cancel("drain")
        if self._code:
            await asyncio.wait(self._code, timeout=LEAVING)
        self._threads.close()

    def _start(
        self, code: Coroutine[Any, Any, T], name: str, ended: Callable[[], None] = lambda: None
    ) -> asyncio.Task[T]:
        """Run user code in a task of its own, remembered until it ends."""

        def end(task: asyncio.Task[T]) -> None:
            self._code.discard(task)
            ended()

        task = asyncio.create_task(code, name=name)
        self._code.add(task)
        task.add_done_callback(end)
        return task

    def shows_context(self, task: Task[Any, Any]) -> bool:
        """Whether somebody gets to see the Context of a task's runs; most functions take none."""
        hooks = task.success_hooks or task.failure_hooks or task.cancel_hooks
        return task.takes_context or bool(hooks or self._around(task))

    async def perform(self, attempt: Attempt, host: AttemptHost | None, *, hurry: bool) -> Outcome:
        """Run the task's code within its timeout and return what it came to, whatever it does.

        Without a host there is nothing that the code may ask for, and no Context.
        In a hurry, no sleep keeps its slot.
        """
        if host is not None:
            attempt.context = self._context(attempt, host)
            if hurry:
                attempt.context.steps.drain()
        if attempt.task.is_async:
            return await self._within_time(attempt)
        # Before the clock starts: a run that waits for a thread has not overrun.
        async with self._threads.slots:
            if attempt.interrupted or attempt.superseded:
                return Repeated() if attempt.superseded else Interrupted()
            return await self._within_time(attempt)

    async def _within_time(self, attempt: Attempt) -> Outcome:
        envelope, timeout = attempt.envelope, attempt.task.options.timeout
        root, loop = envelope.root or envelope.run_id, asyncio.get_running_loop()
        running_in.set(RunningIn(envelope.run_id, envelope.task, envelope.attempt, root, loop))
        name = f"{attempt.task.id} {envelope.run_id}"
        if timeout is not None and attempt.context is not None:
            attempt.context.deadline = self._now() + timedelta(seconds=timeout)
        attempt.left = loop.create_future()
        user = attempt.user = self._start(self._whole(attempt), name, attempt.leave)
        timer = None if timeout is None else loop.call_later(timeout, attempt.expire)
        try:
            await attempt.left
        except asyncio.CancelledError:
            attempt.cancel("drain")
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if not user.done():
            log.error("run %s of %s ignores its cancellation", envelope.run_id, attempt.task.id)
        if attempt.superseded:
            return Repeated()
        if (left := self._left(attempt)) is not None:
            return left
        if user.done() and not user.cancelled():
            return await self._judge(attempt, user.result())
        if attempt.interrupted:
            return Interrupted()
        if timeout is not None and attempt.cause == "timeout":
            late = TimeoutError(f"took longer than {timeout:g} s")
            return await self._judge(attempt, Raised(late))
        return await self._judge(attempt, Raised(RuntimeError("the task cancelled itself")))

    def _left(self, attempt: Attempt) -> Waiting | Sleeping | None:
        """Return what a run came to that left its slot, whatever its code made of that."""
        if attempt.defect is not None:
            return None
        if attempt.waits:
            return Waiting(attempt.waits, attempt.due_ms)
        if attempt.due_ms is not None:
            return Sleeping(max(0, attempt.due_ms - self._clock.now_ms()) / 1000)
        return None

    async def give_up(self, attempt: Attempt, reason: Reason, error: BaseException) -> Failed:
        """Return the end of a run that gets no further attempt, after its failure hooks."""
        record = self.record(attempt, error)
        await self._call_last(attempt, attempt.task.failure_hooks, error)
        return Failed(reason, record)

    async def call_off(self, attempt: Attempt, reason: str) -> Cancelled:
        """Return the end of a run that was cancelled, begun or not, after its hooks."""
        await self._call_last(attempt, attempt.task.cancel_hooks, reason)
        return Cancelled(reason)

    async def _call_last(
        self, attempt: Attempt, hooks: Sequence[Callable[..., Any]], value: object
    ) -> None:
        """Call the hooks of a run that ends, even if its code has not begun here."""
        if attempt.context is None:
            attempt.context = self._context(attempt, None)
            if hooks:
                with suppress(BrokertaskError, TimeoutError):
                    async with asyncio.timeout(HOOK_TIMEOUT):
                        attempt.context.payload = await _payload(attempt.task, attempt.envelope)
        await self._call_hooks(attempt, hooks, value)

    async def _whole(self, attempt: Attempt) -> Returned | Raised:
        """Run the code, and what steps it has left to themselves: they are part of the attempt.

        So is the payload store, before and after: it shares the attempt's timeout and end.
        """
        task, context = attempt.task, attempt.context
        try:
            ended = await self._run(attempt, context)
            if context is not None:
                # A step in an asyncio task that was only just made begins, and is waited for.
                await asyncio.sleep(0)
                forgotten = context.steps.forgotten()
                await context.steps.finish()
                if forgotten and not isinstance(ended, Raised):
                    return Raised(_never_awaited(forgotten, task))
            return ended if isinstance(ended, Raised) else await self._put(task, ended.value)
        except asyncio.CancelledError:
            if context is not None:
                context.steps.abandon()
            raise

    async def _run(self, attempt: Attempt, context: Context | None) -> Returned | Raised:
        """Load the payload and call the task in its middleware; errors of user code end here."""
        task = attempt.task
        if task.is_async and context is not None:
            context.steps.begin()
        try:
            payload = await _payload(task, attempt.envelope)
        except EnvelopeError as error:
            return Raised(error, error.reason)
        except InvalidPayload as error:
            return Raised(error, "invalid")
        except BrokertaskError as error:
            return Raised(error)

        try:
            if context is None:
                return Returned(await task.perform(None, payload, thread=self._threads.run_at_once))
            context.payload = payload
            return Returned(await self._through(task, context))
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: a task must not be able to stop the worker.
            if attempt.cause is not None:
                raise asyncio.CancelledError(attempt.cause) from error
            if isinstance(error, asyncio.CancelledError):
                return Raised(RuntimeError("the task cancelled itself"))
            return Raised(error)

    def _around(self, task: Task[Any, Any]) -> tuple[Middleware, ...]:
        """Return the middleware of a task, the outermost first."""
        return self._middleware + task.options.middleware

    async def _through(self, task: Task[Any, Any], context: Context) -> Any:
        """Call the task in its middleware."""
        payload = context.payload

        async def innermost(inner: Context) -> Any:
            return await task.perform(inner, payload, thread=self._threads.run_at_once)

        call: CallNext = innermost
        for middleware in reversed(self._around(task)):
            call = partial(_wrap, middleware, call)
        return await call(context)

    async def _put(self, task: Task[Any, Any], result: Any) -> Returned | Raised:
        """Return a result with the outcome that carries it; what is too large is in the store."""
        limit = self._settings.max_payload_bytes
        try:
            body = encode(dump(task.result_type, result))
            claims = task.client.claims
            claim = await claims.put(body) if claims.takes(len(body)) else None
            if claim is None and len(body) > limit:
                raise InvalidPayload(
                    f"the result is {len(body)} bytes, the limit is {limit} (max_payload_bytes); "
                    "with BROKERTASK_PAYLOAD_STORE it need not be in a message"
                )
        except (PayloadUnavailable, ConfigurationError) as error:
            return Raised(error)
        except PayloadError as error:
            return Raised(error, "bad_result")
        return Returned((result, Succeeded(body if claim is None else b"", claim)))

    async def _judge(self, attempt: Attempt, ended: Returned | Raised) -> Outcome:
        """Return what follows from how the code ended, and call the hooks if it is the end."""
        defect = attempt.defect
        if isinstance(defect, PayloadUnavailable):
            ended = Raised(defect)
        elif defect is not None:
            # Whatever the code made of it: what it did since may be another run's work.
            return await self.give_up(attempt, _reason(defect), defect)
        if isinstance(ended, Returned):
            returned: tuple[Any, Succeeded] = ended.value
            result, outcome = returned
            if attempt.task.success_hooks:
                await self._call_hooks(attempt, attempt.task.success_hooks, result)
            return outcome
        if ended.reason is not None:
            return await self.give_up(attempt, ended.reason, ended.error)
        decision = attempt.task.options.retry.decide(attempt.envelope.attempt, ended.error)
        if decision.delay is None:
            return await self.give_up(attempt, decision.reason, ended.error)
        return Retrying(decision.delay, self.record(attempt, ended.error))

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

    def _context(self, attempt: Attempt, host: AttemptHost | None) -> Context:
        envelope, options = attempt.envelope, attempt.task.options
        steps = Steps(
            envelope.memory,
            host=host,
            span=attempt.span,
            clock=self._clock,
            # A sync task's thread must not wait for another of the same few.
            thread=self._threads.run if attempt.task.is_async else self._threads.run_at_once,
            max_bytes=self._settings.max_memory_bytes,
            claims=attempt.task.client.claims,
        )
        at = envelope.triggered_ms
        return Context(
            run_id=envelope.run_id,
            task=attempt.task.id,
            attempt=envelope.attempt,
            max_attempts=options.retry.max_attempts,
            tags=envelope.tags,
            triggered_at=None if at is None else datetime.fromtimestamp(at / 1000, UTC),
            parent=envelope.parent,
            root=envelope.root,
            worker=self._worker,
            trace_id=None if attempt.span is None else attempt.span.trace_id,
            state=self._state,
            steps=steps,
            changed=(lambda: None) if host is None else host.report,
        )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC)

    def record(self, attempt: Attempt, error: BaseException) -> AttemptError:
        """Return an error as it travels in the run's memory."""
        return AttemptError(
            attempt=attempt.envelope.attempt,
            type=name_of(error),
            message=clip(text_of(error)),
            at_ms=self._clock.now_ms(),
            worker=self._worker,
            traceback=clip(frames_of(error), MAX_TRACEBACK),
        )


def _reason(defect: BrokertaskError) -> Reason:
    match defect:
        case StepMismatch():
            return "step_mismatch"
        case MemoryFull():
            return "memory_full"
        case _:
            return "never_retried"


def _never_awaited(keys: Sequence[str], task: Task[Any, Any]) -> InvalidOption:
    instead = "await it" if task.is_async else "in a plain function, use step_sync and sleep_sync"
    return InvalidOption(
        f"{', '.join(map(repr, keys))} asked for and never awaited, so not done: {instead}"
    )


async def _payload(task: Task[Any, Any], envelope: Envelope) -> Any:
    """Return the payload of a run, fetched if it is in the payload store."""
    claim = envelope.claim()
    if claim is None:
        return task.load(envelope.value())
    return task.load(decode(await task.client.claims.get(claim), MSGPACK))


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
