"""The row of a run is the same whatever the order of what is heard of it, and however often."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from brokertask.envelope import Envelope
from brokertask.events import Event
from brokertask.memory import Metadata
from brokertask.outcome import AttemptError
from brokertask.server.redactor import kept, redact
from brokertask.server.runs import Fact, event_fact, record, trigger_fact
from brokertask.server.store.engine import Database
from brokertask.server.store.schema import attempts, runs
from brokertask.values import encode

pytestmark = pytest.mark.anyio
STATUSES = ("retrying", "sleeping", "waiting", "progress", "completed", "failed")


def asked(redrives: int = 0, payload: object = None) -> Fact:
    envelope = Envelope(
        run_id="r",
        task="t",
        payload=encode(payload),
        triggered_ms=1_000,
        sent_ms=1_000 + 10_000 * redrives,
        seq=20 * redrives,
        redrives=redrives,
        tags=("a", "b"),
    )
    return trigger_fact(envelope, kept(envelope), now_ms=2_000)


def told(event: str, attempt: int, seq: int, redrives: int = 0) -> Fact:
    metadata: Metadata = {"at": attempt * 100 + seq}
    return event_fact(
        Event(
            event=event,
            run_id="r",
            task="t",
            attempt=attempt,
            at_ms=2_000 + 10_000 * redrives + 100 * attempt + seq,
            worker="w",
            error=AttemptError(attempt, "E", "no", 0, "w") if event == "failed" else None,
            done=float(attempt) if event == "progress" else None,
            redrives=redrives or None,
            seq=20 * redrives + seq or None,
            metadata=metadata,
        )
    )


async def rows(batches: list[list[Fact]]) -> list[Any]:
    """What the store has after these were written, each batch in a transaction."""
    store = Database("sqlite+aiosqlite://")
    await store.open()
    try:
        for batch in batches:
            async with store.begin() as connection:
                await record(connection, batch)
        async with store.begin() as connection:
            found = (await connection.execute(select(runs))).all()
            ended = select(attempts).order_by(attempts.c.redrives, attempts.c.attempt)
            return [tuple(row) for row in [*found, *await connection.execute(ended)]]
    finally:
        await store.close()


FACTS = st.lists(
    st.builds(
        told,
        st.sampled_from(STATUSES[:4]),
        st.integers(1, 3),
        st.integers(0, 3),
        st.integers(0, 1),
    ),
    max_size=6,
)


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(facts=FACTS, end=st.booleans(), seed=st.integers(0, 9_999))
async def test_order_and_repetition_change_nothing(facts: list[Fact], end: bool, seed: int) -> None:
    by_place = {(fact.place, fact.at_ms): fact for fact in [asked(), *facts]}
    if end:
        last = told("completed", 3, 4, 1)
        by_place[last.place, last.at_ms] = last
    heard = list(by_place.values())
    source = random.Random(seed)
    again = [*heard, *source.choices(heard, k=4)]
    source.shuffle(again)
    cut = source.randrange(len(again))
    assert await rows([again[:cut], again[cut:]]) == await rows([heard])


async def test_the_first_end_counts_until_the_run_is_redriven() -> None:
    first, second = told("completed", 1, 0), told("failed", 2, 0)
    for order in ([asked(), first, second], [second, first, asked()]):
        ((_, _, status, *_), *_) = await rows([order])
        assert status == "completed"
    again = [asked(1, payload={"new": 1}), told("failed", 1, 0), asked()]
    ((_, _, status, *_), *_) = await rows([again])
    assert status == "queued"


def test_secrets_are_not_kept() -> None:
    value = {"user": "ada", "Password": "x", "deep": [{"api_key": 1, "note": "token"}]}
    assert redact(value) == {
        "user": "ada",
        "Password": "[redacted]",
        "deep": [{"api_key": "[redacted]", "note": "token"}],
    }
