"""Triggering runs."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, Field, JsonValue, StringConstraints

from brokertask.admission import DEFAULT_TTL, Admission, Debounce, Singleton
from brokertask.durations import seconds
from brokertask.envelope import MAX_TAGS
from brokertask.server import catalog
from brokertask.server.api.operations import (
    PRINTABLE,
    Call,
    DurationText,
    Routes,
    RunId,
    Strict,
    TaskId,
)
from brokertask.server.api.problems import InvalidValue, Problem
from brokertask.server.triggers import Wish, trigger

routes: Final = Routes("runs")
Key: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=PRINTABLE)]


class DebounceOption(Strict):
    """One run for the triggers that come with this key in quick succession."""

    key: Key
    delay: DurationText
    mode: Literal["leading", "trailing"] = "trailing"
    max_delay: DurationText | None = None


class SingletonOption(Strict):
    """No run while another one of this key is unfinished, or in place of that one."""

    key: Key
    ttl: DurationText = DEFAULT_TTL
    mode: Literal["skip", "replace"] = "skip"


class NewRun(Strict):
    """A run to begin."""

    payload: JsonValue = None
    """As the task's JSON Schema says."""
    delay: DurationText = 0.0
    expires: DurationText | None = None
    tags: list[RunId] = Field(default=[], max_length=MAX_TAGS)
    run_id: RunId | None = None
    """To repeat a trigger whose outcome is unknown: the id that the problem told."""
    idempotency_key: Key | None = None
    """Of triggers with the same key only the first makes a run."""
    idempotency_ttl: DurationText = DEFAULT_TTL
    debounce: DebounceOption | None = None
    singleton: SingletonOption | None = None

    def admission(self) -> Admission | None:
        """Return what of it a server has to decide on."""
        debounce, singleton = self.debounce, self.singleton
        return Admission.of(
            self.idempotency_key,
            self.idempotency_ttl,
            None if debounce is None else Debounce(**debounce.model_dump()),
            None if singleton is None else Singleton(**singleton.model_dump()),
        )


class TriggeredRun(BaseModel):
    """The run that a trigger stands for."""

    run_id: str
    task: str
    own: bool
    """False: it is a run from before, by the key that it came with."""


@routes.post(
    "/tasks/{task}/runs",
    status=201,
    problems=("conflict", "broker_unavailable", "unknown_outcome"),
)
async def trigger_run(call: Call, task: TaskId, body: NewRun) -> TriggeredRun:
    """Trigger a run of a task.

    When this answers, it is on the disk. After `unknown_outcome`, ask again with the same `run_id`.
    """
    await check_payload(call, task, body.payload)
    done = await trigger(
        call.resources,
        Wish(
            task=task,
            payload=body.payload,
            delay=seconds(body.delay),
            expires=None if body.expires is None else seconds(body.expires),
            tags=body.tags,
            run_id=body.run_id,
            admission=body.admission(),
        ),
    )
    if done.refused is not None:
        raise Problem("conflict", done.refused, run_id=done.run_id)
    return TriggeredRun(run_id=done.run_id, task=task, own=done.own)


async def check_payload(call: Call, task: str, payload: object) -> None:
    """Refuse a payload that is not what the task's workers say it takes.

    Raises:
        Problem: It is not.
    """
    async with call.resources.store.read() as connection:
        schemas = await catalog.schemas_of(connection, task)
    if schemas is None or schemas.get("payload") is None:
        return
    found = [
        InvalidValue(where=".".join(["body", "payload", *wrong.path])[:200], what=wrong.what[:200])
        for wrong in catalog.wrongs(schemas["payload"], payload)
    ]
    if found:
        raise Problem("invalid", f"{found[0].where}: {found[0].what}", invalid=found)
