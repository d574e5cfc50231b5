"""The tasks that servers know: what workers say that they take and return, as JSON Schema."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import jsonschema_rs
from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.manifest import Manifest
from brokertask.server.store.schema import known_tasks
from brokertask.server.store.upsert import put
from brokertask.topology import check_task_id
from brokertask.values import clip

log = logging.getLogger("brokertask.server")

MAX_SCHEMAS: Final = 262_144
"""Characters of a task's schemas; larger ones are not kept, and payloads not checked here."""
MAX_WRONG: Final = 10


@dataclass(frozen=True, slots=True)
class Wrong:
    """A part of a payload that is not as its schema says."""

    path: tuple[str, ...]
    what: str


async def declare(connection: AsyncConnection, manifest: Manifest) -> None:
    """Take in the schemas in a manifest; of several workers, the one that started last is right."""
    for task, schemas in sorted(manifest.schemas.items()):
        text = json.dumps(schemas)
        if len(text) > MAX_SCHEMAS:
            log.warning("the JSON Schema of %s is too large to keep: %d bytes", task, len(text))
            continue
        check_task_id(task)
        await put(connection, known_tasks, [{"task": task, "since_ms": manifest.at_ms}])
        older = known_tasks.c.schemas_ms
        newest = or_(older.is_(None), older < manifest.at_ms)
        mine = update(known_tasks).where(known_tasks.c.task == task, newest)
        await connection.execute(mine.values(schemas=text, schemas_ms=manifest.at_ms))


async def schemas_of(connection: AsyncConnection, task: str) -> Mapping[str, Any] | None:
    """Return the schemas of `payload` and `result` of a task; None if it is not known."""
    row = (
        await connection.execute(select(known_tasks.c.schemas).where(known_tasks.c.task == task))
    ).one_or_none()
    if row is None:
        return None
    return {} if row.schemas is None else dict(json.loads(row.schemas))


def wrongs(schema: Any, payload: object) -> list[Wrong]:
    """Return what of a payload is not as its JSON Schema says; the first ten.

    Nothing is fetched for it. A schema that is none says nothing: the worker checks again.
    """
    try:
        validator = _validator(json.dumps(schema))
    except ValueError as error:
        log.warning("a task's JSON Schema cannot be used: %s", clip(str(error), 200))
        return []
    found = []
    for wrong in validator.iter_errors(payload):
        found.append(Wrong(tuple(str(part) for part in wrong.instance_path), wrong.message))
        if len(found) == MAX_WRONG:
            break
    return found


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    return jsonschema_rs.validator_for(json.loads(schema), mask="it", offline=True)
