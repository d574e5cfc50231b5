"""`brokertask dead` as people and scripts use it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from brokertask import deadletter
from brokertask.envelope import Envelope, Message
from brokertask.memory import Memory, Step
from brokertask.outcome import Failed
from brokertask.values import decode, encode
from tests.flow.commandline import SECONDS, Place, command, place
from tests.flow.graveyard import (
    NAMES,
    NOW_MS,
    at_work,
    dead,
    dead_raw,
    failure,
    graveyard,
    in_dead,
    put,
    take,
    trigger,
    until_dead,
)

pytestmark = pytest.mark.anyio

HOSTILE = (
    "\x1b[31mred\x1b[0m \u202egnp.exe \x9b2J [bold]x[/] [link=http://e.vil]y[/link] :bomb:\x07"
)
TASKS = """
from pydantic import BaseModel
from brokertask import App

app = App("shop")

class Order(BaseModel):
    order: int

@app.task
async def charge(order: Order) -> None: ...

@app.task
async def refund(order: Order) -> None: ...
"""


@pytest.fixture(params=["socket", "rabbitmq"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """A folder with an app, and a broker that knows its tasks."""
    async with place(request, tmp_path) as shop:
        shop.write("tasks.py", TASKS)
        async with shop.transport() as transport:
            await transport.declare(graveyard("charge", "refund"))
        yield shop


async def bury(shop: Place, *messages: Message) -> None:
    async with shop.transport() as transport:
        await put(transport, *messages)
        await until_dead(transport, len(messages))


STEPS = (
    Step("reserve", "shop.reserve", "", encode("seat 7")),
    Step("charge", "shop.charge", "reserve", encode({"receipt": 1})),
)
DONE = Memory(steps=STEPS, metadata={"customer": "acme"})


def stepped(run_id: str, memory: Memory = DONE, *, seq: int = 2) -> Message:
    """A run that died in its second attempt, with what it had finished by then."""
    run = trigger(run_id, {"order": 7}, attempt=2, seq=seq, memory=memory.with_error(failure()))
    return deadletter.bury(run, Failed("max_attempts", failure(attempt=2)), now_ms=NOW_MS)


async def redriven(shop: Place) -> Envelope:
    """Take the one run that is at work."""
    async with shop.transport() as transport:
        (message,) = await take(transport, NAMES.queue("charge"), 1)
    return Envelope.read(message, task="charge", max_bytes=1_000)


async def counts(shop: Place) -> tuple[int, int]:
    """Return how many runs are dead, and how many are at work."""
    async with shop.transport() as transport:
        return await in_dead(transport), await at_work(transport)


async def test_a_list_has_a_line_for_each_run(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1", tags=("red",))), dead(trigger("run-2", redrives=3)))
    done = await shop.brokertask("dead", "list", "--task", "charge")
    assert (done.code, done.err) == (0, "")
    header, first, second = (re.split(r" {2,}", line) for line in done.out.splitlines())
    assert header == ["RUN", "TASK", "REASON", "ATTEMPTS", "ERROR", "AGE", "REDRIVES"]
    assert first[:5] == ["run-1", "charge", "max_attempts", "2", "GatewayTimeout: 504 upstream"]
    assert second[0] == "run-2"
    assert second[-1] == "3"
    assert await counts(shop) == (2, 0)


async def test_a_list_as_json_has_no_payload(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1", "a secret", tags=("red",))))
    done = await shop.brokertask("dead", "list", "--app", "tasks:app", "--json")
    assert "secret" not in done.out
    told = done.json()
    (run,) = told["dead"]
    assert run["run_id"] == "run-1"
    assert run["error"] == {"type": "GatewayTimeout", "message": "504 upstream"}
    assert run["died_at"] == "2023-11-14T22:13:20.000+00:00"
    assert run["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert set(run) == {
        *("run_id", "task", "reason", "attempts", "error", "fingerprint", "died_at"),
        *("age_seconds", "tags", "redrives", "trace_id"),
    }
    charge, refund = told["queues"]
    assert (charge["task"], charge["ready"], charge["seen"]) == ("charge", 1, 1)
    assert (refund["task"], refund["ready"]) == ("refund", 0)


async def test_groups_are_kinds_of_error(shop: Place) -> None:
    late = [failure(message=f"no answer to order {number}") for number in range(3)]
    await bury(
        shop,
        *(dead(trigger(f"run-{number}"), error=error) for number, error in enumerate(late)),
        dead(trigger("run-9"), "aborted", failure("ValueError", "no such order")),
    )
    done = await shop.brokertask("dead", "list", "--task", "charge", "--group")
    _, first, second = done.out.splitlines()
    assert re.match(r"3 +charge +max_attempts +GatewayTimeout: no answer to order 0", first)
    assert re.match(r"1 +charge +aborted +ValueError: no such order", second)
    told = (await shop.brokertask("dead", "list", "--task", "charge", "--group", "--json")).json()
    assert [group["runs"] for group in told["groups"]] == [3, 1]


@pytest.mark.parametrize("words", [("list",), ("list", "--group"), ("show", "run-1", "--payload")])
@pytest.mark.parametrize("form", [(), ("--json",)])
async def test_hostile_text_is_printed_harmless(
    shop: Place, words: tuple[str, ...], form: tuple[str, ...]
) -> None:
    run = trigger("run-1", {HOSTILE: HOSTILE}, tags=(HOSTILE,), app_id="\x1b]0;x\x07")
    await bury(shop, dead(run, "aborted", failure(HOSTILE, HOSTILE)))
    done = await shop.brokertask("dead", *words, "--task", "charge", *form)
    assert done.code == 0
    for bad in ("\x1b", "\x9b", "\x07", "\u202e"):
        assert bad not in done.out + done.err
    assert "[bold]x[/]" in done.out
    assert ":bomb:" in done.out


async def test_show_tells_everything_but_the_payload(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1", {"order": 7}, tags=("red",))), dead(trigger("run-2")))
    done = await shop.brokertask("dead", "show", "run-1", "--task", "charge")
    assert done.code == 0
    for part in (
        "charge  run-1",
        "max_attempts: every attempt failed",
        "after 2 attempts, never redriven",
        "triggered 2023-11-14T21:13:20.000+00:00 by checkout",
        "tags red",
        "trace 4bf92f3577b34da6a3ce929d0e0e4736",
        "attempt 1  2023-11-14T22:13:20.000+00:00  worker-a1",
        "attempt 2",
        "Traceback: GatewayTimeout",
        "payload 8 bytes of application/msgpack; --payload shows it",
    ):
        assert part in done.out
    assert "order" not in done.out
    told = (await shop.brokertask("dead", "show", "run-1", "--task", "charge", "--json")).json()
    assert [error["attempt"] for error in told[0]["errors"]] == [1, 2]
    assert "payload" not in told[0]


async def test_show_tells_the_payload_if_asked(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1", {"order": 7, b"\xff": float("nan")})))
    words = ("dead", "show", "run-1", "--task", "charge", "--payload")
    done = await shop.brokertask(*words)
    shown = done.out.partition("  payload\n")[2]
    assert json.loads(shown) == {"order": 7, "ff": "nan"}
    told = (await shop.brokertask(*words, "--json")).json()
    assert told[0]["payload"] == {"order": 7, "ff": "nan"}
    assert told[0]["payload_problem"] is None


async def test_show_tells_why_a_payload_is_none(shop: Place) -> None:
    await bury(shop, dead_raw(Message(body=b"\xc1\x00", message_id="run-1")))
    words = ("dead", "show", "run-1", "--task", "charge", "--payload")
    done = await shop.brokertask(*words)
    assert "undecodable: the message is not what its content type and headers say" in done.out
    assert "2 bytes, beginning with c1 00" in done.out
    told = (await shop.brokertask(*words, "--json")).json()
    assert told[0]["payload"] is None
    assert "not application/msgpack" in told[0]["payload_problem"]


async def test_show_of_a_run_that_is_not_there_fails(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1")))
    done = await shop.brokertask("dead", "show", "run-2", "--task", "charge")
    assert (done.code, done.out) == (1, "")
    assert done.err == "no dead run run-2 among the 1 of charge\n"


async def test_redrive_does_what_was_asked(shop: Place) -> None:
    await bury(shop, *(dead(trigger(f"run-{number}")) for number in range(3)))
    done = await shop.brokertask("dead", "redrive", "run-0", "run-2", "--task", "charge", "--yes")
    assert (done.code, done.err) == (0, "")
    frozen, told = done.out.splitlines()
    assert frozen.startswith("Selection frozen: 2 runs, 1 task, 1 error group, oldest ")
    assert told == "2 redriven"
    assert await counts(shop) == (1, 2)


@pytest.mark.parametrize(
    ("words", "memory", "order"),
    [
        ((), DONE, 7),
        (("--forget",), Memory(), 7),
        (("--payload", '{"order": 8}'), Memory(), 8),
    ],
)
async def test_redrive_keeps_finished_steps_unless_they_are_forgotten(
    shop: Place, words: tuple[str, ...], memory: Memory, order: int
) -> None:
    await bury(shop, stepped("run-1"))
    done = await shop.brokertask("dead", "redrive", "--task", "charge", "--yes", *words)
    assert (done.code, done.err) == (0, "")
    envelope = await redriven(shop)
    assert (envelope.run_id, envelope.attempt) == ("run-1", 1)
    assert envelope.memory == memory
    assert envelope.value() == {"order": order}


@pytest.mark.parametrize("older_first", [True, False])
async def test_of_two_dead_letters_of_a_run_the_furthest_is_redriven(
    shop: Place, older_first: bool
) -> None:
    older = stepped("run-1", Memory(steps=STEPS[:1]), seq=2)
    furthest = stepped("run-1", seq=4)
    await bury(shop, *((older, furthest) if older_first else (furthest, older)))
    done = await shop.brokertask("dead", "redrive", "--task", "charge", "--yes", "--json")
    assert done.code == 1
    told = {run["status"]: run for run in done.json()["runs"]}
    assert set(told) == {"redriven", "failed"}
    assert told["failed"]["run_id"] == "run-1"
    assert "it is message 3 of it, and number 5 is dead as well" in told["failed"]["detail"]
    envelope = await redriven(shop)
    assert (envelope.seq, envelope.memory) == (6, DONE)
    async with shop.transport() as transport:
        (left,) = await take(transport, NAMES.dead_queue("charge"), 1)
    assert (left.body, left.headers["bt-seq"]) == (older.body, 3)


async def test_dead_letters_of_one_id_that_may_be_of_two_runs_are_all_redriven(
    shop: Place,
) -> None:
    await bury(shop, *(dead(trigger("run-1", number, id_derived=True)) for number in range(2)))
    done = await shop.brokertask("dead", "redrive", "--task", "charge", "--yes")
    assert (done.code, await counts(shop)) == (0, (0, 2))


async def test_redrive_as_json(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1", 1)), dead_raw(Message(body=b"\xc1", message_id="bad")))
    done = await shop.brokertask("dead", "redrive", "--task", "charge", "--yes", "--json")
    assert done.code == 1
    told = done.json()
    assert told["selected"] == 2
    assert told["counts"] == {"redriven": 1, "failed": 1}
    good, bad = told["runs"]
    assert good == {"run_id": "run-1", "task": "charge", "status": "redriven", "detail": ""}
    assert (bad["run_id"], bad["status"]) == ("bad", "failed")
    assert await counts(shop) == (1, 1)


async def test_a_dry_run_shows_and_does_nothing(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1")))
    done = await shop.brokertask("dead", "redrive", "--task", "charge", "--dry-run")
    assert done.code == 0
    assert "run-1" in done.out
    assert done.out.endswith("dry run: nothing was done\n")
    told = (
        await shop.brokertask("dead", "discard", "--task", "charge", "--dry-run", "--json")
    ).json()
    assert (told["dry_run"], told["selected"], told["counts"]) == (True, 1, {})
    assert await counts(shop) == (1, 0)


async def test_another_count_than_expected_is_a_conflict(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1")))
    words = ("dead", "redrive", "--task", "charge", "--yes", "--expect-count")
    done = await shop.brokertask(*words, "2")
    assert (done.code, done.err) == (6, "1 run, expected 2: nothing was done\n")
    assert await counts(shop) == (1, 0)
    assert (await shop.brokertask(*words, "1")).code == 0
    assert await counts(shop) == (0, 1)


async def test_discard_prints_what_is_gone(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1"), "aborted"), dead(trigger("run-2")))
    words = ("--task", "charge", "--reason", "aborted", "--because", "a duplicate", "--yes")
    done = await shop.brokertask("dead", "discard", *words)
    assert done.code == 0
    assert done.out.splitlines()[1:] == [
        "discarded run-1 charge aborted: a duplicate",
        "1 discarded",
    ]
    assert await counts(shop) == (1, 0)


async def test_a_payload_is_replaced_and_checked_by_the_task(shop: Place) -> None:
    await bury(shop, dead_raw(Message(body=b"garbage \xc1", message_id="run-1")))
    words = ("dead", "redrive", "run-1", "--yes", "--task", "charge", "--app", "tasks", "--payload")
    refused = await shop.brokertask(*words, '{"order": "seven"}')
    assert refused.code == 2
    assert "order: int_parsing" in refused.err
    assert (await shop.brokertask(*words, "{order")).code == 2
    done = await shop.brokertask(*words, "-", stdin='{"order": 7}')
    assert done.code == 0, done.err
    async with shop.transport() as transport:
        (message,) = await take(transport, NAMES.queue("charge"), 1)
    assert message.message_id == "run-1"
    assert decode(message.body, "application/msgpack") == {"order": 7}


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("list",), 2, "which tasks? Name them with --task, or their App with --app"),
        (("list", "--task", "nobody"), 2, "there is no queue 'bt.dead.nobody' on this broker"),
        (("list", "--task", "bad name"), 2, "task id 'bad name'"),
        (("list", "--task", "charge", "--older-than", "soon"), 2, "duration 'soon'"),
        (("list", "--app", "nothing:app"), 3, "there is no module 'nothing' here"),
        (("redrive", "--task", "charge"), 2, "nobody can be asked: add --yes, or --dry-run"),
        (("redrive", "--task", "charge", "--rate", "fast", "--yes"), 2, "write 50/s or 600/m"),
        (("redrive", "--task", "charge", "--rate", "0/s", "--yes"), 2, "write 50/s or 600/m"),
        (("redrive", "gone", "--task", "charge", "--yes"), 1, None),
        (("redrive", "--task", "charge", "--yes"), 0, None),
    ],
)
async def test_mistakes_end_with_a_sentence(
    shop: Place, words: tuple[str, ...], code: int, sentence: str | None
) -> None:
    done = await shop.brokertask("dead", *words)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    if sentence is None:
        assert done.out == "no dead run matches\n"
    else:
        assert sentence in done.err
        assert done.err.count("\n") == 1


async def test_without_a_broker_there_is_a_sentence(tmp_path: Path) -> None:
    nowhere = Place(tmp_path, "amqp://guest:secret@127.0.0.1:1/")
    environment = {"BROKERTASK_CONNECT_TIMEOUT": "0.2"}
    done = await nowhere.brokertask("dead", "list", "--task", "charge", **environment)
    assert done.code == 4
    assert "cannot be reached" in done.err
    assert "secret" not in done.err
    memory = Place(tmp_path, "memory:")
    done = await memory.brokertask("dead", "list", "--task", "charge")
    assert done.code == 2
    assert "lives inside one process" in done.err


async def test_what_another_reader_holds_is_told(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1")))
    async with shop.transport() as transport:
        arrived = asyncio.Event()
        await transport.consume(NAMES.dead_queue("charge"), lambda _: arrived.set(), prefetch=1)
        async with asyncio.timeout(SECONDS):
            await arrived.wait()
        done = await shop.brokertask("dead", "list", "--task", "charge")
    assert done.out == "no dead runs\n"
    assert done.err == "charge: another reader is at work; what it holds is not shown\n"


async def test_an_interrupted_redrive_leaves_the_rest_in_place(shop: Place) -> None:
    await bury(shop, *(dead(trigger(f"run-{number}")) for number in range(5)))
    words = ("dead", "redrive", "--task", "charge", "--yes", "--rate", "1/h")
    process = await shop.start(*words)
    await until_one_is_at_work(shop)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(SECONDS):
        out, err = await process.communicate()
    assert process.returncode == 130
    assert out.decode().endswith("1 redriven\n")
    assert err.decode() == "interrupted: 4 runs left in place\n"
    async with shop.transport() as transport:
        await until_dead(transport, 4)
    assert await counts(shop) == (4, 1)


async def test_a_killed_redrive_loses_nothing(shop: Place) -> None:
    names = {f"run-{number}" for number in range(5)}
    await bury(shop, *(dead(trigger(name)) for name in names))
    process = await shop.start("dead", "redrive", "--task", "charge", "--yes", "--rate", "1/h")
    await until_one_is_at_work(shop)
    process.kill()
    await process.communicate()
    async with shop.transport() as transport:
        (redriven,) = await take(transport, NAMES.queue("charge"), 1)
        async with asyncio.timeout(SECONDS):
            while await in_dead(transport) < 4:  # noqa: ASYNC110 - a broker sets no event
                await asyncio.sleep(0.01)
        left = await take(transport, NAMES.dead_queue("charge"), await in_dead(transport))
    assert {message.message_id for message in (redriven, *left)} == names


async def until_one_is_at_work(shop: Place) -> None:
    async with asyncio.timeout(SECONDS), shop.transport() as transport:
        while await at_work(transport) < 1:  # noqa: ASYNC110 - a broker sets no event
            await asyncio.sleep(0.01)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor
        self._text = ""
        self._more = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    @staticmethod
    async def start(shop: Place, *words: str) -> Terminal:
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *command(*words),
            cwd=shop.folder,
            env=shop.environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        return Terminal(process, ours)

    async def until(self, text: str) -> None:
        async with asyncio.timeout(SECONDS):
            while text not in self._text:
                self._more.clear()
                await self._more.wait()

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    async def end(self) -> tuple[int, str]:
        async with asyncio.timeout(SECONDS):
            code = await self._process.wait()
        self._read()
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        return code, self._text

    def _read(self) -> None:
        try:
            self._text += os.read(self._descriptor, 65_536).decode()
        except OSError:  # the other side is closed
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self._more.set()


@pytest.mark.parametrize(
    ("answer", "code", "told", "left"),
    [
        ("y\n", 0, "2 redriven", (0, 2)),
        ("n\n", 0, "nothing was done", (2, 0)),
        ("\n", 0, "nothing was done", (2, 0)),
        (None, 130, "[y/N]", (2, 0)),
    ],
)
async def test_on_a_terminal_it_asks_first(
    shop: Place, answer: str | None, code: int, told: str, left: tuple[int, int]
) -> None:
    await bury(shop, dead(trigger("run-1")), dead(trigger("run-2")))
    words = ("dead", "redrive", "--task", "charge", "--rate", "100/s")
    terminal = await Terminal.start(shop, *words)
    await terminal.until("Redrive 2 runs at 100/s? [y/N]")
    assert (await counts(shop))[0] == 0
    if answer is None:
        terminal.interrupt()
    else:
        terminal.type(answer)
    ended, text = await terminal.end()
    assert (ended, told in text) == (code, True), text
    async with shop.transport() as transport:
        await until_dead(transport, left[0])
    assert await counts(shop) == left


async def test_the_fields_of_each_command_are_the_same_on_every_broker(shop: Place) -> None:
    await bury(shop, dead(trigger("run-1")))
    done = await shop.brokertask("dead", "show", "run-1", "--task", "charge", "--json", "--payload")
    (run,) = done.json()
    fields: dict[str, Any] = run
    assert set(fields) == {
        *("run_id", "task", "reason", "meaning", "attempts", "error", "errors", "fingerprint"),
        *("died_at", "age_seconds", "triggered_at", "tags", "redrives", "trace_id", "app_id"),
        *("parent", "payload", "payload_problem", "payload_bytes", "content_type"),
    }
