"""`brokertask asyncapi` describes what another language may publish, and a worker takes it."""

from __future__ import annotations

from pathlib import Path

import jsonschema_rs
import pytest

from tests.flow.commandline import Place

pytestmark = pytest.mark.anyio
APP = """
from pydantic import BaseModel
from brokertask import App

app = App("shop")

class Line(BaseModel):
    sku: str

class Order(BaseModel):
    number: int
    lines: list[Line] = []

@app.task()
async def fulfil(order: Order) -> int:
    "Send what was ordered."
    return order.number

@app.task(id="tidy:up.all")
def tidy() -> None: ...
"""


async def test_an_app_describes_its_triggers_and_events(tmp_path: Path) -> None:
    place = Place(tmp_path, "amqp://nobody:secret@127.0.0.1:1/")
    place.write("shop.py", APP)
    done = await place.brokertask("asyncapi", "--app", "shop:app")
    assert done.code == 0, done.err
    assert "secret" not in done.out
    document = done.json()
    assert document["operations"]["run.fulfil"] == {
        "action": "receive",
        "channel": {"$ref": "#/channels/trigger.fulfil"},
        "summary": "Send what was ordered.",
    }
    channel = document["channels"]["trigger.fulfil"]
    assert channel["bindings"]["amqp"]["exchange"]["name"] == "bt.tasks"
    assert document["channels"]["trigger.tidy-up.all"]["address"] == "tidy:up.all"
    payload = channel["messages"]["trigger"]["payload"]
    checks = jsonschema_rs.validator_for({**payload, "components": document["components"]})
    assert checks.is_valid({"number": 7, "lines": [{"sku": "a"}]})
    assert not checks.is_valid({"number": 7, "lines": [{}]})
