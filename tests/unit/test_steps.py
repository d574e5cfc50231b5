"""Steps without a broker: what comes back as what, names and numbers, and what a replay refuses.

Each test runs a program twice: what the first attempt remembers is all that the second one has.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import partial, wraps
from typing import Any, NoReturn, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from brokertask import (
    Abort,
    Context,
    InvalidOption,
    InvalidPayload,
    MemoryFull,
    Retry,
    RetryAfter,
    StepMismatch,
    UnsupportedType,
)
from brokertask.memory import Memory
from brokertask.steps import Steps

pytestmark = pytest.mark.anyio

Program: TypeAlias = Callable[[Context], Awaitable[Any]]

REPLAY_MS = 20
"""A thousand remembered steps."""
ELSEWHERE = timezone(timedelta(hours=5, minutes=30))


class Order(BaseModel):
    number: int
    at: datetime


@dataclasses.dataclass
class Parcel:
    order: Order
    size: tuple[int, int] = (1, 2)


class Colour(Enum):
    RED = "red"


class Shop:
    def __init__(self, name: str) -> None:
        self.name = name

    async def called(self) -> str:
        return self.name

    def sized(self, number: int) -> tuple[str, int]:
        return self.name, number

    @classmethod
    def made(cls) -> Parcel:
        return Parcel(Order(number=1, at=datetime(2026, 1, 1, tzinfo=UTC)))

    async def __call__(self, number: int) -> Decimal:
        return Decimal(number) / 4


@dataclasses.dataclass
class Counter:
    """No hash, as usual for what can be compared."""

    number: int

    def __call__(self) -> int:
        return self.number


async def one() -> int:
    return 1


async def two() -> int:
    return 2


async def echo(value: str) -> str:
    return value


async def fails() -> int:
    raise OSError("down")


def give(annotation: object, value: object) -> Callable[[], Any]:
    """Return a function that returns `value` and says that it is of that type."""

    async def given() -> Any:
        return value

    given.__annotations__ = {"return": annotation}
    return given


async def attempt(program: Program, memory: Memory = Memory()) -> tuple[Any, Memory]:  # noqa: B008
    """Run a program with what it remembers; return what it came to, and what it remembers then."""
    steps = Steps(memory)
    steps.begin()
    try:
        outcome = await program(Context(run_id="run", task="task", steps=steps))
    except Exception as error:
        outcome = error
    return steps.defect or outcome, steps.memory


def keys(memory: Memory) -> list[str]:
    return [step.key for step in memory.steps]


# --- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Order, Order(number=1, at=datetime(2026, 1, 1, tzinfo=UTC))),
        (Parcel, Parcel(Order(number=1, at=datetime(2026, 1, 1, tzinfo=UTC)), (3, 4))),
        (list[Order] | None, [Order(number=1, at=datetime(2026, 1, 1, tzinfo=UTC))]),
        (datetime, datetime(2026, 1, 1, 9, 30, 15, 123456, tzinfo=UTC)),
        (datetime, datetime(1960, 1, 1, 9, 30, 15, 123456, tzinfo=ELSEWHERE)),
        (date, date(2026, 1, 1)),
        (timedelta, timedelta(days=1, microseconds=5)),
        (tuple[int, str], (1, "a")),
        (dict[uuid.UUID, set[int]], {uuid.UUID(int=5): {1, 2}}),
        (frozenset[str], frozenset({"a", "b"})),
        (Colour, Colour.RED),
        (Decimal, Decimal("1.10")),
        (bytes, b"\xff\x00"),
        (None, None),
        (Any, {"a": [1, 2.5, None, True, b"x", "y"]}),
    ],
    ids=str,
)
async def test_a_result_comes_back_as_its_type_the_first_time_too(
    annotation: object, value: object
) -> None:
    calls = 0

    async def program(ctx: Context) -> Any:
        return await ctx.step("given", counted)

    def counted() -> Any:
        nonlocal calls
        calls += 1
        return value

    counted.__annotations__ = {"return": annotation}
    first, memory = await attempt(program)
    second, _ = await attempt(program, memory)
    assert (first, second) == (value, value)
    assert type(first) is type(second) is type(value)
    assert calls == 1


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
    | st.datetimes(timezones=st.just(UTC)).map(lambda at: at.replace(fold=0)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abc") | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(plain)
def test_any_plain_value_comes_back_unannotated(value: object) -> None:
    async def program(ctx: Context) -> Any:
        return await ctx.step("given", lambda: value)

    async def both() -> tuple[Any, Any]:
        first, memory = await attempt(program)
        second, _ = await attempt(program, memory)
        return first, second

    for result in asyncio.run(both()):
        assert result == value
        assert repr(result) == repr(value), "of the same types all the way down"


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        {1, 2},
        {"a": [(1, 2)]},
        Order(number=1, at=datetime(2026, 1, 1, tzinfo=UTC)),
        [Parcel(Order(number=1, at=datetime(2026, 1, 1, tzinfo=UTC)))],
        Colour.RED,
        uuid.UUID(int=5),
        Decimal(1),
        datetime(2026, 1, 1),
        bytearray(b"a"),
        2**70,
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_unannotated_what_would_come_back_as_something_else_is_refused(value: object) -> None:
    error, memory = await attempt(lambda ctx: ctx.step("given", lambda: value))
    assert isinstance(error, UnsupportedType)
    assert "step 'given'" in str(error)
    assert memory == Memory()


async def test_a_datetime_without_a_zone_is_refused_in_words() -> None:
    naive = datetime(2026, 1, 1)
    error, _ = await attempt(lambda ctx: ctx.step("given", give(datetime, naive)))
    assert isinstance(error, UnsupportedType)
    assert "step 'given': a datetime without a time zone" in str(error)


async def test_what_does_not_fit_the_annotation_is_not_remembered() -> None:
    error, memory = await attempt(lambda ctx: ctx.step("given", give(int, "many")))
    assert isinstance(error, UnsupportedType)
    assert "annotation" in str(error)
    assert "many" not in str(error)
    # Else the mended function would never be called.
    assert memory == Memory()


async def test_an_annotation_that_names_nothing_is_refused_before_the_call() -> None:
    def unknown() -> Any:
        raise AssertionError("it was called")

    unknown.__annotations__ = {"return": "Nowhere"}
    error, _ = await attempt(lambda ctx: ctx.step("given", unknown))
    assert isinstance(error, UnsupportedType)
    assert "Nowhere" in str(error)


async def doubled(number: int) -> Parcel:
    return Parcel(Order(number=number * 2, at=datetime(2026, 1, 1, tzinfo=UTC)))


def promised(number: int) -> Awaitable[Parcel]:
    return doubled(number)


def promising(number: int) -> Coroutine[Any, Any, Parcel]:
    return doubled(number)


@wraps(doubled)
def wrapped(number: int) -> Awaitable[Parcel]:
    return doubled(number)


DOUBLED = Parcel(Order(number=8, at=datetime(2026, 1, 1, tzinfo=UTC)))


@pytest.mark.parametrize(
    ("function", "arguments", "result"),
    [
        (doubled, (4,), DOUBLED),
        (partial(doubled, 4), (), DOUBLED),
        (wrapped, (4,), DOUBLED),
        (promised, (4,), DOUBLED),
        (promising, (4,), DOUBLED),
        (Shop("books").called, (), "books"),
        (Shop("books").sized, (4,), ("books", 4)),
        (Shop.made, (), Shop.made()),
        (Shop("books"), (3,), Decimal("0.75")),
        (partial(Shop("books"), 3), (), Decimal("0.75")),
        (Counter(7), (), 7),
        (lambda number: number + 1, (4,), 5),
        (len, ("abc",), 3),
        (str.upper, ("abc",), "ABC"),
    ],
    ids=str,
)
async def test_whatever_can_be_called_can_be_a_step(
    function: Callable[..., Any], arguments: tuple[Any, ...], result: object
) -> None:
    async def program(ctx: Context) -> Any:
        return await ctx.step("given", function, *arguments)

    first, memory = await attempt(program)
    second, _ = await attempt(program, memory)
    assert (first, second) == (result, result)


async def test_a_function_that_never_returns_raises_what_it_raises() -> None:
    async def refuses() -> NoReturn:
        raise Abort("not today")

    error, _ = await attempt(lambda ctx: ctx.step("refused", refuses))
    assert isinstance(error, Abort)


# --- names and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a#2", "x" * 129, None, 5, "odd \udcff file"])
async def test_a_name_that_cannot_be_is_refused_before_the_call(name: Any) -> None:
    called: list[int] = []
    error, memory = await attempt(lambda ctx: ctx.step(name, called.append, 1))
    assert isinstance(error, InvalidOption)
    assert "step name" in str(error)
    assert (called, memory) == ([], Memory())


async def test_a_name_used_again_is_numbered_in_the_order_of_the_calls() -> None:
    async def program(ctx: Context) -> list[str]:
        return [await ctx.step("fetch", echo, letter) for letter in "abc"]

    first, memory = await attempt(program)
    assert keys(memory) == ["fetch", "fetch#2", "fetch#3"]
    second, _ = await attempt(program, memory)
    assert first == second == ["a", "b", "c"]


async def test_in_gather_a_name_is_numbered_as_written_not_as_finished() -> None:
    async def program(ctx: Context, order: str) -> list[str]:
        gates = {letter: asyncio.Event() for letter in "abc"}

        async def gated(letter: str) -> str:
            await gates[letter].wait()
            return letter

        asking = asyncio.gather(*(ctx.step("fetch", gated, letter) for letter in "abc"))
        for letter in order:
            gates[letter].set()
            for _ in range(5):
                await asyncio.sleep(0)
        return await asking

    first, memory = await attempt(lambda ctx: program(ctx, "cab"))
    assert keys(memory) == ["fetch#3", "fetch", "fetch#2"]
    second, _ = await attempt(lambda ctx: program(ctx, ""), memory)
    assert first == second == ["a", "b", "c"]


async def test_the_branches_of_a_task_group_are_remembered_each() -> None:
    called: list[str] = []

    async def work(what: str) -> str:
        called.append(what)
        return what

    async def program(ctx: Context) -> list[str]:
        async def branch(letter: str) -> str:
            one = await ctx.step(f"first {letter}", work, f"1{letter}")
            return one + await ctx.step(f"second {letter}", work, f"2{letter}")

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(branch(letter)) for letter in "ab"]
        return [task.result() for task in tasks]

    first, memory = await attempt(program)
    second, _ = await attempt(program, memory)
    assert first == second == ["1a2a", "1b2b"]
    assert sorted(called) == ["1a", "1b", "2a", "2b"]


@pytest.mark.parametrize("caught", [False, True])
async def test_one_name_from_two_asyncio_tasks_is_a_mismatch(caught: bool) -> None:
    async def program(ctx: Context) -> None:
        async def branch() -> None:
            try:
                await ctx.step("fetch", one)
            except Exception:
                if not caught:
                    raise

        await asyncio.gather(branch(), branch())

    error, _ = await attempt(program)
    assert isinstance(error, StepMismatch)
    assert "'fetch' is asked for in two asyncio tasks" in str(error)


async def test_a_step_within_a_step_is_refused() -> None:
    async def program(ctx: Context) -> Any:
        async def outer() -> Any:
            return await ctx.step("inner", one)

        return await ctx.step("outer", outer)

    error, memory = await attempt(program)
    assert isinstance(error, InvalidOption)
    assert "'inner' is within a step" in str(error)
    assert memory == Memory()


async def test_a_sleep_within_a_step_is_refused() -> None:
    async def program(ctx: Context) -> Any:
        return await ctx.step("outer", lambda: ctx.sleep(1))

    error, _ = await attempt(program)
    assert isinstance(error, InvalidOption)


async def test_a_step_of_another_run_within_a_step_is_none_of_this_one() -> None:
    async def inner(ctx: Context) -> int:
        return await ctx.step("inner", one)

    async def program(ctx: Context) -> Any:
        other = Context(run_id="other", task="task")
        return await ctx.step("outer", inner, other)

    assert (await attempt(program))[0] == 1


# --- retries and time-outs of a step -------------------------------------------------------------


class Flaky:
    """Fails some times, then answers."""

    def __init__(self, failures: int, error: BaseException | None = None) -> None:
        self.failures = failures
        self.error = error or OSError("down")
        self.calls = 0

    async def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return self.calls


SOON = Retry(max_attempts=3, min_delay=0)


@pytest.mark.parametrize(
    ("flaky", "retry", "calls", "outcome"),
    [
        (Flaky(2), SOON, 3, 3),
        (Flaky(3), SOON, 3, OSError),
        (Flaky(1), None, 1, OSError),
        (Flaky(1, Abort("no")), SOON, 1, Abort),
        (Flaky(1, RetryAfter(0)), SOON, 2, 2),
        (Flaky(1, RetryAfter(9)), None, 1, RetryAfter),
        (Flaky(1, KeyError("k")), Retry(min_delay=0, on=OSError), 1, KeyError),
        (Flaky(1, OSError("o")), Retry(min_delay=0, never_on=OSError), 1, OSError),
    ],
)
async def test_a_step_is_tried_again_as_its_retry_says(
    flaky: Flaky, retry: Retry | None, calls: int, outcome: Any
) -> None:
    result, _ = await attempt(lambda ctx: ctx.step("flaky", flaky, retry=retry))
    assert flaky.calls == calls
    assert result == outcome or isinstance(result, outcome)


async def test_each_try_has_the_time_of_its_own() -> None:
    calls = 0

    async def slow() -> int:
        nonlocal calls
        calls += 1
        if calls < 3:
            await asyncio.Event().wait()
        return calls

    result, _ = await attempt(lambda ctx: ctx.step("slow", slow, retry=SOON, timeout=0.01))
    assert result == 3
    error, _ = await attempt(lambda ctx: ctx.step("slow", asyncio.Event().wait, timeout="10ms"))
    assert isinstance(error, TimeoutError)
    assert str(error) == "step 'slow' took longer than 0.01 s"


async def test_a_timeout_of_the_functions_own_is_its_own() -> None:
    async def impatient() -> int:
        raise TimeoutError("mine")

    error, _ = await attempt(lambda ctx: ctx.step("slow", impatient, timeout=5))
    assert (type(error), str(error)) == (TimeoutError, "mine")


# --- replays that must not be --------------------------------------------------------------------

CALLS: dict[str, Callable[[], Awaitable[int]]] = {"1": one, "2": two}


def steps_of(text: str) -> Program:
    """Return a program of steps in a row: `a b:2` are a, which calls `one`, and b, `two`."""

    async def program(ctx: Context) -> Any:
        results = []
        for word in text.split():
            name, _, function = word.partition(":")
            results.append(await ctx.step(name, CALLS[function or "1"]))
        return results

    return program


def caught(program: Program) -> Program:
    """Return it as part of a task that survives whatever happens in it."""

    async def calm(ctx: Context) -> Any:
        try:
            return await program(ctx)
        except Exception:
            return await ctx.step("after all", one)

    return calm


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("a b c", "a c b", "after 'a' 'b' when it ran, now 'c'|'c' comes after 'b'.*now 'a'"),
        ("a b c", "b c", "step 'b' comes after 'a' when it ran, now 'nothing'"),
        ("a b c", "a c", "step 'c' comes after 'b' when it ran, now 'a'"),
        ("a b", "a new", "after 'a' 'b' when it ran, now 'new'"),
        ("a b", "new", "first 'a' when it ran, now 'new'"),
        ("a b", "a:2 b", "step 'a' calls 'one' when it ran, now 'two'"),
        ("a b", "new a b", "first 'a' when it ran, now 'new'"),
        ("a b", "a new b", "after 'a' 'b' when it ran, now 'new'"),
        ("a a a", "a a:2", "step 'a#2' calls 'one' when it ran, now 'two'"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda program: program, caught], ids=["raised", "caught"])
async def test_a_run_refuses_code_that_asks_for_other_steps(
    before: str, now: str, said: str, wrap: Callable[[Program], Program]
) -> None:
    _, memory = await attempt(steps_of(before))
    defect, after = await attempt(wrap(steps_of(now)), memory)
    assert isinstance(defect, StepMismatch)
    with pytest.raises(StepMismatch, match=said):
        raise defect
    assert "Bring back" in str(defect)
    assert after.steps == memory.steps, "nothing was done under the wrong name"


@pytest.mark.parametrize(
    ("before", "now"),
    [("", "a"), ("a", "a b"), ("a b", "a b c d"), ("a b", "a b a b"), ("a a", "a a a")],
)
async def test_steps_at_the_end_may_be_added(before: str, now: str) -> None:
    _, memory = await attempt(steps_of(before))
    result, _ = await attempt(steps_of(now), memory)
    assert result == [1] * len(now.split())


async def test_a_sleep_that_moved_is_a_mismatch_too() -> None:
    async def asleep_first(ctx: Context) -> None:
        await ctx.sleep(0)
        await ctx.step("a", one)

    _, memory = await attempt(asleep_first)
    defect, _ = await attempt(steps_of("a"), memory)
    assert isinstance(defect, StepMismatch)
    assert "comes after 'sleep' when it ran" in str(defect)


async def test_a_branch_is_held_to_its_own_order() -> None:
    def side_by_side(*texts: str) -> Program:
        async def program(ctx: Context) -> Any:
            return await asyncio.gather(*(steps_of(text)(ctx) for text in texts))

        return program

    _, memory = await attempt(side_by_side("a1 a2", "b1 b2 b3"))
    again, _ = await attempt(side_by_side("b1 b2 b3", "a1 a2"), memory)
    assert again == [[1, 1, 1], [1, 1]]
    defect, _ = await attempt(side_by_side("a1 a2", "b1 b3 b2"), memory)
    assert isinstance(defect, StepMismatch)


# --- failures that the task caught ---------------------------------------------------------------


class Down:
    """A service that is down during the first attempt."""

    def __init__(self) -> None:
        self.down = True

    async def ask(self) -> str:
        if self.down:
            raise OSError("down")
        return "answer"

    async def ask_late(self) -> str:
        if self.down:
            await asyncio.Event().wait()
        return "answer"

    def plainly(self) -> None:
        if self.down:
            raise OSError("down")


async def fallback(ctx: Context, service: Down) -> Any:
    try:
        await ctx.step("ask", service.ask)
    except OSError:
        await ctx.step("instead", one)
        await ctx.step("and", one)
    else:
        await ctx.step("normal", one)
    return await ctx.step("end", one)


async def fallback_of_the_same_name(ctx: Context, service: Down) -> Any:
    try:
        await ctx.step("ask", service.ask)
    except OSError:
        await ctx.step("ask", one)
    await ctx.step("ask", two)
    return await ctx.step("end", one)


async def gathered(ctx: Context, service: Down) -> Any:
    asked = [ctx.step("one", one), ctx.step("ask", service.ask), ctx.step("two", two)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    for result in results:
        if isinstance(result, OSError):
            await ctx.step("mend", one)
    return await ctx.step("end", one)


async def grouped(ctx: Context, service: Down) -> Any:
    async def branch(name: str) -> None:
        await ctx.step(f"first {name}", one)
        await ctx.step(f"ask {name}", service.ask)
        await ctx.step(f"last {name}", one)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(branch("a"))
            group.create_task(branch("b"))
    except* OSError:
        await ctx.step("mend", one)
    return await ctx.step("end", one)


async def out_of_time(ctx: Context, service: Down) -> Any:
    try:
        async with asyncio.timeout(0.01):
            await ctx.step("ask", service.ask_late)
    except TimeoutError:
        await ctx.step("instead", one)
    else:
        await ctx.step("normal", one)
    return await ctx.step("end", one)


async def out_of_time_between_steps(ctx: Context, service: Down) -> Any:
    try:
        async with asyncio.timeout(0.01):
            await ctx.step("before", one)
            await service.ask_late()
            await ctx.step("after", one)
    except TimeoutError:
        await ctx.step("instead", one)
    return await ctx.step("end", one)


async def out_of_time_asleep(ctx: Context, service: Down) -> Any:
    try:
        async with asyncio.timeout(0.01 if service.down else None):
            await ctx.sleep(0.05)
    except TimeoutError:
        await ctx.step("instead", one)
    else:
        await ctx.step("normal", one)
    return await ctx.step("end", one)


async def compensated(ctx: Context, service: Down) -> Any:
    await ctx.step("reserve", one)
    try:
        service.plainly()
        await ctx.step("charge", one)
    except OSError:
        await ctx.step("release", one)
        raise
    return await ctx.step("end", one)


async def tidied(ctx: Context, service: Down) -> Any:
    await ctx.step("before", one)
    try:
        service.plainly()
        await ctx.step("work", one)
    finally:
        await ctx.step("tidy", one)
    return await ctx.step("end", one)


async def first_that_answers(ctx: Context, service: Down) -> Any:
    asking = {
        asyncio.ensure_future(ctx.step("ask", service.ask_late)),
        asyncio.ensure_future(ctx.step("other", one)),
    }
    done, rest = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await asyncio.wait(asking)
    for _ in done:
        await ctx.step("answered", one)
    return await ctx.step("end", one)


@pytest.mark.parametrize(
    "task",
    [
        fallback,
        fallback_of_the_same_name,
        gathered,
        grouped,
        out_of_time,
        out_of_time_between_steps,
        out_of_time_asleep,
        compensated,
        tidied,
        first_that_answers,
    ],
)
@pytest.mark.parametrize("downs", [(True, False), (False, True, False), (True, True, False)])
async def test_a_way_that_a_failure_chose_need_not_be_taken_again(
    task: Callable[[Context, Down], Awaitable[Any]], downs: tuple[bool, ...]
) -> None:
    service = Down()
    outcome, memory = None, Memory()
    for down in downs:
        service.down = down
        outcome, memory = await attempt(lambda ctx: task(ctx, service), memory)
        assert not isinstance(outcome, StepMismatch), str(outcome)
    assert outcome == 1


@pytest.mark.parametrize("down", [[True, True], [True, False], [False, True], [False, False]])
@pytest.mark.parametrize("again", [False, True], ids=["skipped", "again"])
async def test_after_a_caught_failure_no_call_gets_the_result_of_another(
    down: list[bool], again: bool
) -> None:
    """The numbers of a name must not shift, whatever succeeds next time."""

    async def convert(letter: str, broken: bool) -> str:
        if broken and letter in "ad":
            raise OSError("down")
        return letter.upper()

    async def program(ctx: Context, down: bool) -> dict[str, str]:
        results = {}
        for letter in "abcde":
            for broken in (down, False)[: 1 + again]:
                with suppress(OSError):
                    results[letter] = await ctx.step("convert", convert, letter, broken)
                    break
        return results

    memory = Memory()
    for is_down in [*down, False]:
        results, memory = await attempt(partial(program, down=is_down), memory)
        assert results.items() <= {letter: letter.upper() for letter in "abcde"}.items()
        assert len(results) >= (5 if again else 3)


# --- what a run may remember ---------------------------------------------------------------------


async def test_a_full_memory_names_what_fills_it(caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(max_bytes=10_000)
    ctx = Context(run_id="run", task="task", steps=steps)
    for number in range(4):
        await ctx.step(f"page {number}", echo, "x" * (2_000 + number * 100))
    with pytest.raises(MemoryFull) as full:
        await ctx.step("picture", echo, "x" * 5_000)
    for part in (
        "'picture'",
        "'picture' 5",
        "'page 3' 2",
        "'page 2' 2",
        "max_memory_bytes",
        "10000",
    ):
        assert part in str(full.value)
    assert "'page 0' 2" not in str(full.value)
    assert len(keys(steps.memory)) == 4
    assert steps.defect is full.value
    with pytest.raises(MemoryFull):
        await ctx.step("small", one)


async def test_a_memory_that_is_nearly_full_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ctx = Context(run_id="run", task="task", steps=Steps(max_bytes=10_000))
    for number in range(19):
        await ctx.step(f"page {number}", echo, "x" * 460)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("brokertask.task", "WARNING")
    assert "the limit is 10000" in record.message


async def test_metadata_counts_and_is_refused_as_a_whole() -> None:
    steps = Steps(max_bytes=1_000)
    ctx = Context(run_id="run", task="task", steps=steps)
    ctx.metadata["small"] = "x" * 900
    with pytest.raises(MemoryFull, match="'metadata'"):
        ctx.metadata["large"] = "x" * 900
    assert dict(ctx.metadata) == {"small": "x" * 900}


async def test_metadata_is_a_mapping_of_plain_values_from_the_first_moment() -> None:
    steps = Steps()
    ctx = Context(run_id="run", task="task", steps=steps)
    ctx.metadata["pair"] = [1, {"two": 2.5}]
    ctx.metadata["at"] = datetime(2026, 1, 1, tzinfo=UTC)
    seen = dict(ctx.metadata)
    again = Context(run_id="run", task="task", steps=Steps(Memory.unpack(steps.memory.pack())))
    assert dict(again.metadata) == seen
    del ctx.metadata["pair"]
    with pytest.raises(KeyError):
        del ctx.metadata["pair"]
    for odd in (object(), (1, 2), Order(number=1, at=datetime(2026, 1, 1, tzinfo=UTC))):
        with pytest.raises(InvalidPayload):
            ctx.metadata["thing"] = odd
    assert list(ctx.metadata) == ["at"]


async def test_metadata_cannot_be_spoilt_behind_its_back() -> None:
    steps = Steps()
    ctx = Context(run_id="run", task="task", steps=steps)
    noted: list[Any] = [1]
    ctx.metadata["noted"] = noted
    noted.append(object())
    ctx.metadata["noted"].append(object())
    await ctx.step("one", one)
    assert Memory.unpack(steps.memory.pack()).metadata == {"noted": [1]}


@pytest.mark.parametrize("depth", [62, 63, 64])
async def test_metadata_that_nobody_could_read_is_refused_at_once(depth: int) -> None:
    steps = Steps()
    ctx = Context(run_id="run", task="task", steps=steps)
    value: Any = 1
    for _ in range(depth):
        value = [value]
    try:
        ctx.metadata["deep"] = value
    except InvalidPayload:
        assert depth > 60
    assert Memory.unpack(steps.memory.pack()) == steps.memory


# --- the rest ------------------------------------------------------------------------------------


async def test_a_key_against_doing_things_twice_is_of_the_run_and_the_name() -> None:
    ctx = Context(run_id="run", task="task", attempt=1)
    later = Context(run_id="run", task="task", attempt=3)
    assert ctx.once_key("charge") == later.once_key("charge")
    assert len(ctx.once_key("charge")) == 32
    others = {
        ctx.once_key("refund"),
        Context(run_id="other", task="task").once_key("charge"),
        Context(run_id="run", task="other").once_key("charge"),
    }
    assert len(others | {ctx.once_key("charge")}) == 4


async def test_a_step_in_a_sync_function_has_its_own_call() -> None:
    ctx = Context(run_id="run", task="task")
    with pytest.raises(Exception, match=r"use await ctx\.step"):
        ctx.step_sync("fetch", len, "abc")
    with pytest.raises(Exception, match=r"use await ctx\.sleep"):
        ctx.sleep_sync(1)


async def test_a_plain_call_does_what_a_run_does() -> None:
    ctx = Context(run_id="run", task="task")
    began = time.monotonic()
    assert await ctx.step("fetch", echo, "a") == "a"
    await ctx.sleep(0.02)
    await ctx.sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
    assert time.monotonic() - began >= 0.019
    with pytest.raises(InvalidOption, match="time zone"):
        await ctx.sleep_until(datetime(2020, 1, 1))


async def test_a_thousand_remembered_steps_pass_in_a_moment() -> None:
    async def work(number: int) -> int:
        return number

    async def program(ctx: Context) -> int:
        return sum([await ctx.step("work", work, number) for number in range(1_000)])

    total, memory = await attempt(program)
    times = []
    for _ in range(9):
        began = time.process_time()
        again, _ = await attempt(program, memory)
        times.append((time.process_time() - began) * 1000)
        assert again == total == sum(range(1_000))
    median = statistics.median(times)
    print(f"1,000 remembered steps: {median:.1f} ms of CPU")
    assert median < REPLAY_MS
