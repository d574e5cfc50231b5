"""Who is let in, under which name, with what; and what is refused says so as a problem."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from brokertask.server.api import auth
from brokertask.server.api.problems import CONTENT_TYPE
from brokertask.server.store.schema import api_tokens
from brokertask.server.store.schema import audit as audit_table
from tests.api.stage import Stage, stage
from tests.quickly import quickly

pytestmark = pytest.mark.anyio
QUICK = 0.5
"""Seconds of CPU: a refusal takes some milliseconds, and waits for nothing."""


@pytest.fixture
async def staged() -> AsyncIterator[Stage]:
    async with stage() as made:
        yield made


def problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert (response.status_code, response.headers["content-type"]) == (status, CONTENT_TYPE), (
        response.text
    )
    told: dict[str, Any] = response.json()
    assert (told["status"], told["kind"]) == (status, kind)
    return told


# --- tokens -------------------------------------------------------------------------------------


async def test_loopback_is_open_until_there_is_a_token_and_never_again(staged: Stage) -> None:
    async with staged.client() as client:
        assert (await client.get("/me")).json()["name"] == "local"
        text = await staged.token("viewer")
        problem(await client.get("/me"), 401, "unauthenticated")
        async with staged.resources.store.begin() as connection:
            (token,) = await auth.list_tokens(connection)
            assert await auth.revoke(connection, token.id, now_ms=1)
            assert not await auth.revoke(connection, token.id, now_ms=2)
        problem(await client.get("/me"), 401, "unauthenticated")
    async with staged.client(text) as client:
        problem(await client.get("/me"), 401, "unauthenticated")


async def test_another_address_is_never_open() -> None:
    async with stage(open_here=False) as staged, staged.client() as client:
        told = problem(await client.get("/me"), 401, "unauthenticated")
        assert "brokertask tokens create" in told["detail"]


async def test_a_token_is_its_secret_and_only_its_hash_is_kept(staged: Stage) -> None:
    text = await staged.token("operator")
    _, identity, secret = text.split("_", 2)
    async with staged.client(text) as client:
        assert (await client.get("/me")).json() | {"version": ""} == {
            "name": "a operator",
            "role": "operator",
            "payloads": False,
            "version": "",
        }
    for wrong in (f"bt_{identity}_{'x' * 43}", identity, f"bt_{identity}_", "x" * 5000, "bt_\x7f"):
        async with staged.client(wrong) as client:
            problem(await client.get("/me"), 401, "unauthenticated")
    async with staged.resources.store.begin() as connection:
        row = (await connection.execute(select(api_tokens))).one()
    assert secret.encode() not in repr(tuple(row)).encode()


async def test_a_token_ends(staged: Stage) -> None:
    text = await staged.token("admin", ttl_ms=3_600_000)
    async with staged.client(text) as client:
        assert (await client.get("/me")).status_code == 200
        async with staged.resources.store.begin() as connection:
            await connection.execute(update(api_tokens).values(expires_ms=1))
        problem(await client.get("/me"), 401, "unauthenticated")


async def test_roles_are_checked(staged: Stage) -> None:
    async with staged.client(await staged.token("viewer")) as client:
        problem(await client.get("/audit"), 403, "forbidden")
        response = await client.post("/waits/tokens/tok_1/complete", json={})
        assert "operator" in problem(response, 403, "forbidden")["detail"]
        problem(await client.get("/waits/tokens/tok_1/value"), 403, "forbidden")
    async with staged.client(await staged.token("admin")) as client:
        told = problem(await client.get("/waits/tokens/tok_1/value"), 403, "forbidden")
        assert "payloads" in told["detail"]


async def test_each_action_is_in_the_audit_log_with_what_came_of_it(staged: Stage) -> None:
    text = await staged.token("admin", payloads=True)
    async with staged.client(text) as client:
        problem(
            await client.post("/waits/tokens/nothing/reject", json={"reason": "no"}),
            404,
            "not_found",
        )
        await client.get("/waits/tokens/nothing/value")
        await client.get("/me")
        listed = (await client.get("/audit")).json()["items"]
        shown, rejected = listed
        assert (shown["action"], shown["status"]) == ("show_token_value", 200)
        assert (rejected["action"], rejected["target"]) == ("reject_token", "nothing")
        assert (rejected["actor"], rejected["reason"], rejected["status"]) == ("a admin", "no", 404)
        assert text.split("_", 2)[1] == rejected["token"]
        first = (await client.get("/audit", params={"limit": 1})).json()
        second = await client.get("/audit", params={"limit": 1, "cursor": first["next"]})
        assert [*first["items"], *second.json()["items"]] == listed
        for only in ({"action": "reject_token"}, {"target": "nothing", "action": "reject_token"}):
            found = (await client.get("/audit", params=only)).json()
            assert (found["items"], found["next"]) == ([rejected], None)
        assert (await client.get("/audit", params={"actor": "b"})).json()["items"] == []


async def test_a_callback_leaves_no_secret_in_the_audit_log(staged: Stage) -> None:
    async with staged.client() as client:
        response = await client.post("/callbacks/cb_secret_of_somebody", json={"value": 1})
        assert response.status_code in (200, 404)
    async with staged.resources.store.begin() as connection:
        (row,) = await connection.execute(select(audit_table))
    assert (row.action, row.actor) == ("call_back", "callback")
    assert "secret" not in repr(tuple(row))


# --- other sites, sizes, rates ------------------------------------------------------------------


async def test_other_host_names_are_refused(staged: Stage) -> None:
    for base in ("http://evil.example", "http://127.0.0.1.evil.example:8070", "http://8.8.8.8"):
        async with staged.client(base=f"{base}/api/v1") as client:
            problem(await client.get("/me"), 421, "misdirected")
    for base in ("http://127.0.0.1:8070", "http://[::1]:8070", "http://LOCALHOST"):
        async with staged.client(base=f"{base}/api/v1") as client:
            assert (await client.get("/me")).status_code == 200


async def test_another_site_cannot_act(staged: Stage) -> None:
    path = "/waits/tokens/nothing/complete"
    async with staged.client() as client:
        for headers in (
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": "http://localhost:9999"},
            {"origin": "http://["},
        ):
            problem(await client.post(path, json={}, headers=headers), 403, "forbidden")
        same = {"sec-fetch-site": "same-origin", "origin": "http://localhost"}
        problem(await client.post(path, json={}, headers=same), 404, "not_found")
        # A form of another site cannot say that it is JSON.
        form = await client.post(path, content="{}", headers={"content-type": "text/plain"})
        problem(form, 415, "unsupported_media_type")


async def test_a_caller_may_ask_only_so_often() -> None:
    async with stage(rate=5) as staged, staged.client() as client:
        answers = [await client.get("/me") for _ in range(30)]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 200 in {answer.status_code for answer in answers}
        assert int(refused[0].headers["retry-after"]) >= 1
        problem(refused[0], 429, "too_many_requests")


BODIES = [
    (b"", 400),
    (b"{", 400),
    (b'{"value": NaN}', 400),
    (b'{"value": -Infinity}', 400),
    (b"[" * 100_000, 400),
    (b'{"value":' * 65 + b"1" + b"}" * 65, 400),
    (b"\xff\xfe{}", 400),
    (b"[]", 422),
    (b'"text"', 422),
    (b'{"value": 1, "valeu": 2}', 422),
    (b'{"value": 18446744073709551616}', 422),
    (b'{"value": "\\ud800"}', 422),
    (b"9" * 5_000, 400),
    (b'{"value": "' + b"x" * 3_000_000 + b'"}', 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=[repr(body[:24]) for body, _ in BODIES])
async def test_a_body_that_is_none_is_refused_at_once(
    staged: Stage, body: bytes, status: int
) -> None:
    async with staged.client() as client:
        with quickly(QUICK):
            response = await client.post(
                "/waits/tokens/bt_x/complete",
                content=body,
                headers={"content-type": "application/json"},
            )
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == CONTENT_TYPE


PATHS = [
    "/runs/{}/waits",
    "/waits/tokens/{}/value",
    "/waits/tokens?cursor={}",
    "/waits/tokens?limit={}",
    "/audit?cursor={}",
    "/{}",
]
IDS = ["%00", "x" * 60_000, "%ff%fe", "%E2%80%AE", "%2F..%2F..", "..", "-1", "1000000000", "%"]


@pytest.mark.parametrize("identity", IDS, ids=[one[:12] for one in IDS])
@pytest.mark.parametrize("path", PATHS)
async def test_whatever_stands_in_a_path_is_no_defect(
    staged: Stage, path: str, identity: str
) -> None:
    async with staged.client() as client:
        with quickly(QUICK):
            response = await client.get(path.format(identity))
        assert response.status_code < 500
        if response.status_code >= 400:
            told = response.json()
            assert response.headers["content-type"] == CONTENT_TYPE
            assert len(json.dumps(told)) < 2_000


async def test_wrong_methods_and_paths_are_problems(staged: Stage) -> None:
    async with staged.client() as client:
        refused = await client.delete("/me")
        problem(refused, 405, "method_not_allowed")
        assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD"}
        problem(await client.get("/nothing"), 404, "not_found")


async def test_answers_are_for_nobody_else(staged: Stage) -> None:
    async with staged.client() as client:
        for path in ("/me", "/nothing"):
            headers = (await client.get(path)).headers
            assert "no-store" in headers["cache-control"]
            assert headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in headers
