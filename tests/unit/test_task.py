from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, computed_field, field_validator
from typing_extensions import TypedDict

from brokertask import (
    App,
    ConfigurationError,
    Context,
    DuplicateTask,
    InvalidOption,
    InvalidPayload,
    Queue,
    Retry,
    Settings,
    Task,
    UnsupportedType,
)
from brokertask.values import MSGPACK, decode, encode

pytestmark = pytest.mark.anyio


class Colour(Enum):
    RED = "red"


class Order(BaseModel):
    number: int
    item: str = "book"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    id: UUID
    colour: Colour
    at: datetime
    pair: tuple[int, str]
    seen: set[int]
    raw: bytes

    @computed_field
    def count(self) -> int:
        return len(self.seen)


class Aliased(BaseModel):
    both: int = Field(alias="oneName")
    read: int = Field(1, validation_alias="readName")
    written: int = Field(2, serialization_alias="writtenName")


@dataclass
class Point:
    x: float
    y: Decimal


class Movie(TypedDict):
    title: str
    year: int


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Login(BaseModel):
    password: SecretStr


class Fussy(BaseModel):
    name: str

    @field_validator("name")
    @classmethod
    def known(cls, name: str) -> str:
        return {"a": name}[name]


@pytest.fixture
def app() -> App:
    return App("unit", settings=Settings(amqp_url="memory:"))


# --- shapes --------------------------------------------------------------------------------------


async def nothing() -> str:
    return "nothing"


async def context_only(ctx: Context) -> str:
    return ctx.task


async def payload_only(order: Order) -> str:
    return order.item


async def both(order: Order, ctx: Context) -> str:
    return f"{order.item} {ctx.task}"


async def turned(context: Context, *, order: Order) -> str:
    return f"{order.item} {context.task}"


def plain_nothing() -> str:
    return threading.current_thread().name


def plain_both(order: Order, ctx: Context) -> str:
    return f"{order.item} {ctx.task}"


@pytest.mark.parametrize(
    ("function", "payload", "expected"),
    [
        (nothing, None, "nothing"),
        (context_only, None, "context_only"),
        (payload_only, Order(number=1), "book"),
        (both, Order(number=1), "book both"),
        (turned, Order(number=1), "book turned"),
        (plain_both, Order(number=1), "book plain_both"),
    ],
)
async def test_a_task_of_any_shape_can_be_called(
    app: App, function: Callable[..., Any], payload: Any, expected: str
) -> None:
    task: Task[Any, Any] = app.task(function)
    assert task.id == function.__name__
    assert await task(payload) == expected


async def test_a_sync_function_runs_in_a_thread(app: App) -> None:
    assert await app.task(plain_nothing)() != threading.current_thread().name


async def test_the_context_that_is_given_is_passed_on(app: App) -> None:
    assert await app.task(context_only)(ctx=Context(run_id="r", task="mine")) == "mine"


def test_options_may_come_in_steps_and_the_id_is_free(app: App) -> None:
    usual = app.task(concurrency=3, timeout="1m")
    task = usual(retry=Retry(max_attempts=7), id="other.name")(payload_only)
    assert (task.id, task.options.concurrency, task.options.timeout) == ("other.name", 3, 60)
    assert task.options.retry.max_attempts == 7
    assert usual(nothing).options.retry.max_attempts == 3
    assert app.tasks == {"other.name": task, "nothing": app.tasks["nothing"]}


# --- declarations that cannot work ---------------------------------------------------------------


def test_a_duplicate_names_both_places(app: App) -> None:
    app.task(nothing)
    with pytest.raises(DuplicateTask) as caught:
        app.task(id="nothing")(both)
    for function in (nothing, both):
        place = f"{__file__}:{function.__code__.co_firstlineno}"
        assert place in str(caught.value)
    assert app.tasks["nothing"].function is nothing


async def two_payloads(one: int, other: int) -> None: ...


async def unnamed(*orders: Order) -> None: ...


async def positional(order: Order, /) -> None: ...


async def untyped(order) -> None: ...  # type: ignore[no-untyped-def]


async def unknown(order: NoSuchType) -> None: ...  # type: ignore[name-defined]  # noqa: F821


async def unserializable(lock: threading.Lock) -> None: ...


async def bad_result() -> threading.Lock:
    return threading.Lock()


async def yielding() -> Any:
    yield 1


def generating() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (two_payloads, "'one' and 'other'"),
        (unnamed, r"\*orders"),
        (positional, "has to have a name"),
        (untyped, "'order' needs a type"),
        (unknown, "NoSuchType"),
        (unserializable, "the payload has a type"),
        (bad_result, "the result has a type"),
        (yielding, "generator"),
        (generating, "generator"),
    ],
)
def test_what_no_message_can_carry_is_refused_with_its_place(
    app: App, function: Callable[..., Any], complaint: str
) -> None:
    with pytest.raises(UnsupportedType, match=complaint) as caught:
        app.task(function)
    assert f"{__file__}:{function.__code__.co_firstlineno}" in str(caught.value)
    assert not app.tasks


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"retires": Retry()}, "task has no option 'retires'; did you mean 'retry'"),
        ({"Timeout": 5}, "did you mean 'timeout'"),
        ({"xyz": 5}, "there are: id, retry, concurrency"),
        ({"concurrency": 0}, "concurrency is 1 to 65535, not 0"),
        ({"concurrency": True}, "concurrency is a whole number, not True"),
        ({"concurrency": "5"}, "concurrency is a whole number"),
        ({"retry": 3}, r"retry is a Retry\(...\), not 3"),
        ({"queue": "fast"}, r"queue is a Queue\(...\), not 'fast'"),
        ({"timeout": 0}, "a timeout is more than 0"),
        ({"timeout": "soon"}, "'soon' is not understood"),
        ({"id": "a b"}, "task id 'a b'"),
        ({"id": 5}, "task id 5"),
    ],
)
def test_a_wrong_option_is_refused(app: App, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidOption, match=complaint):
        app.task(**options)(nothing)
    assert not app.tasks


def test_only_functions_are_tasks(app: App) -> None:
    class Thing:
        __name__ = "callable"

        def __call__(self) -> None: ...

    with pytest.raises(ConfigurationError, match="a task is a function"):
        app.task(Thing())
    with pytest.raises(InvalidOption, match="task id '<lambda>'"):
        app.task(lambda: None)
    with pytest.raises(InvalidOption, match="by name only"):
        app.task("name")  # type: ignore[call-overload]


async def test_a_misspelt_trigger_option_is_refused(app: App) -> None:
    task = app.task(nothing)
    with pytest.raises(InvalidOption, match="trigger has no option 'dealy'; did you mean 'delay'"):
        await task.trigger(dealy=5)  # type: ignore[call-overload]
    with pytest.raises(InvalidOption, match="trigger_many has no option 'tag'; did you mean 'tags"):
        await task.trigger_many([], tag="a")  # type: ignore[call-arg]
    with pytest.raises(InvalidOption, match="trigger_many has no option 'run_id'"):
        await task.trigger_many([None], run_id="a")  # type: ignore[call-arg]


def test_the_queue_of_a_task_is_what_was_asked_for(app: App) -> None:
    task = app.task(queue=Queue(max_length=5))(nothing)
    assert task.queue.options.max_length == 5


# --- payloads there and back ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Order, Order(number=1)),
        (Point, Point(1.5, Decimal("0.1"))),
        (Movie, Movie(title="Metropolis", year=1927)),
        (Aliased, Aliased.model_validate({"oneName": 3, "readName": 4, "written": 5})),
        (list[Order], [Order(number=1), Order(number=2)]),
        (dict[int, date], {1: date(2024, 2, 29)}),
        (tuple[int, str], (1, "a")),
        (frozenset[UUID], frozenset({UUID(int=7)})),
        (Cat | Dog, Dog(kind="dog")),
        (datetime, datetime(2024, 1, 2, 3, 4, 5, 678901, UTC)),
        (timedelta, timedelta(days=-1, microseconds=5)),
        (Path, Path("/a/b")),
        (bytes, b"\xff\x00"),
        (Colour, Colour.RED),
        (float, float("-inf")),
        (int, -(2**63)),
        (int, 2**64 - 1),
        (None, None),
        (
            Strict,
            Strict(
                id=uuid4(),
                colour=Colour.RED,
                at=datetime(2024, 1, 1, tzinfo=UTC),
                pair=(1, "a"),
                seen={3, 4},
                raw=b"\x00",
            ),
        ),
    ],
    ids=str,
)
def test_a_payload_comes_back_as_it_went(app: App, kind: Any, value: Any) -> None:
    task = _task_of(app, kind)
    assert task.load(decode(encode(task.dump(value)), MSGPACK)) == value


def _task_of(app: App, kind: Any) -> Task[Any, None]:
    async def function(payload: Any) -> None: ...

    function.__annotations__["payload"] = kind
    return app.task(function)


def test_foreign_publishers_may_use_the_alias(app: App) -> None:
    assert _task_of(app, Aliased).load({"oneName": 3}) == Aliased.model_validate({"oneName": 3})


@pytest.mark.parametrize(
    ("kind", "value"),
    [(Order, {"number": "secret"}), (Order, 5), (Order, None), (int, "secret"), (None, "secret")],
)
def test_what_does_not_match_is_refused_on_both_sides(app: App, kind: Any, value: Any) -> None:
    task = _task_of(app, kind)
    with pytest.raises(InvalidPayload, match="payload of 'function': ") as caught:
        task.dump(value)
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidPayload):
        task.load(value)


@pytest.mark.parametrize(
    "payload",
    [
        Login(password=SecretStr("hunter2")),
        [SecretStr("hunter2")],
        {SecretStr("hunter2")},
    ],
)
def test_secrets_are_refused_in_any_wrapping(app: App, payload: Any) -> None:
    for task in (_task_of(app, Any), None):
        with pytest.raises(InvalidPayload, match="asterisks") as caught:
            encode(task.dump(payload) if task else payload)
        assert "hunter2" not in str(caught.value)


def test_a_strict_model_is_strict_to_its_own_callers(app: App) -> None:
    with pytest.raises(InvalidPayload):
        _task_of(app, Strict).dump({"id": str(uuid4())})


def test_a_validator_that_fails_in_its_own_way_is_no_surprise(app: App) -> None:
    task = _task_of(app, Fussy)
    with pytest.raises(InvalidPayload, match="a validator failed: KeyError"):
        task.load({"name": "secret"})
    with pytest.raises(InvalidPayload, match=r"payload of 'function'.* KeyError") as caught:
        task.dump({"name": "secret"})
    assert "secret" not in str(caught.value)


class Pets(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")
    count: int = 0
    names: list[Literal["a", "b"]] = []
    when: datetime | None = None
    id: UUID | None = None

    @field_validator("count")
    @classmethod
    def few(cls, count: int) -> int:
        if count > 3:
            raise ValueError(f"too many: {count}")
        return count


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"pet": {"kind": "hunter2"}}, "pet: union_tag_invalid"),
        ({"pet": {"kind": "cat"}, "count": 77777}, "count: value_error"),
        ({"pet": {"kind": "cat"}, "count": "hunter2"}, "count: int_parsing (Input should be"),
        ({"pet": {"kind": "cat"}, "names": ["hunter2"]}, "names.0: literal_error"),
        ({"pet": {"kind": "cat"}, "when": "hunter2"}, "when: datetime_"),
        ("hunter2", "value: model_"),
    ],
)
def test_an_explanation_names_fields_and_no_values(app: App, wrong: Any, expected: str) -> None:
    with pytest.raises(InvalidPayload) as caught:
        _task_of(app, Pets).load(wrong)
    assert str(caught.value).startswith(expected)
    assert "hunter2" not in str(caught.value)
    assert "77777" not in str(caught.value)


def test_an_explanation_stays_short(app: App) -> None:
    with pytest.raises(InvalidPayload) as caught:
        _task_of(app, dict[str, int]).load({f"{n}" * 1_000: "x" for n in range(1_000)})
    assert len(str(caught.value)) < 2_000


def test_a_default_that_would_never_be_used_is_refused(app: App) -> None:
    with pytest.raises(UnsupportedType, match="default of 'number'"):

        @app.task
        async def count(number: int = 5) -> int:
            return number


def test_a_context_is_never_optional(app: App) -> None:
    with pytest.raises(UnsupportedType, match="annotate it as Context alone"):

        @app.task
        async def count(ctx: Context | None) -> None: ...


def test_hooks_and_middleware_are_async(app: App) -> None:
    @app.task
    async def count(number: int) -> int:
        return number

    def plain(*args: object) -> None: ...

    with pytest.raises(InvalidOption, match="a hook is an async function"):
        count.on_failure(plain)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="a middleware is an async function"):
        app.middleware(plain)  # type: ignore[arg-type]
