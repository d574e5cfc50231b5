"""Who gets to the pages of the console, with what; and what is refused is refused at once."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy import select

from brokertask.server.api import auth
from brokertask.server.console.app import SECTIONS
from brokertask.server.console.desk import Page
from brokertask.server.console.sessions import COOKIE
from brokertask.server.runs import Fact, record
from brokertask.server.store.schema import audit
from tests.api.stage import Stage, stage
from tests.quickly import quickly

pytestmark = pytest.mark.anyio
BASE = "http://localhost/"
QUICK = 0.2
"""Seconds of CPU."""
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202etxt.exe\x1b[31m'
PAGES = [page for section in SECTIONS for page in section.list]
OWN = ("sign-in", "sign-out")
"""Are for everybody."""
ACTIONS = [page for page in PAGES if page.method == "POST" and page.path not in OWN]


@pytest.fixture
async def staged() -> AsyncIterator[Stage]:
    async with stage() as made:
        yield made


def told(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text[:2_000]
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    return response.text


async def csrf(client: httpx.AsyncClient, path: str = "sign-in") -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]{64})"', (await client.get(path)).text)
    assert found is not None
    return found[1]


async def sign_in(client: httpx.AsyncClient, token: str, *, wanted: str = "") -> httpx.Response:
    form = {"csrf": await csrf(client), "token": token, "next": wanted}
    return await client.post("sign-in", data=form)


async def add_run(
    staged: Stage, run_id: str = "run-1", text: str = HOSTILE, *, fingerprint: str | None = None
) -> None:
    now_ms = staged.resources.clock.now_ms()
    fact = Fact(
        run_id=run_id,
        task="mail",
        place=10**16,
        at_ms=now_ms,
        latest={
            "status": "failed",
            "redrives": 0,
            "attempt": 1,
            "worker": text,
            "reason": text,
            "error_type": text,
            "error_message": text,
            "fingerprint": fingerprint,
            "ended_ms": now_ms,
        },
        asked={"triggered_ms": now_ms, "tags": f"\x1f{text}\x1f", "app_id": text, "parent": text},
    )
    async with staged.resources.store.begin() as connection:
        await record(connection, [fact])


def path_of(page: Page) -> str:
    return re.sub(r"\{(\w+)\}", lambda part: {"how": "redrive"}.get(part[1], "x"), page.path)


# --- sessions -------------------------------------------------------------------------------------


async def test_a_session_is_a_cookie_that_no_script_and_no_other_site_gets(staged: Stage) -> None:
    token = await staged.token("viewer")
    async with staged.client(base=BASE) as client:
        asked = await client.get("runs?task=mail")
        assert asked.headers["location"] == "./sign-in?next=%2Fruns%3Ftask%3Dmail"
        await client.get("sign-in")
        first = client.cookies[COOKIE]
        response = await sign_in(client, token, wanted="/runs?task=mail")
        assert response.headers["location"] == "./runs?task=mail"
        cookie = response.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert client.cookies[COOKIE] != first, "a secret from before is not signed in"
        told(await client.get("runs"), 200)
        secure = {"csrf": await csrf(client, "runs"), "token": token}
        again = await client.post("sign-out", data=secure, headers={"origin": "http://localhost"})
        assert again.headers["location"] == "./sign-in"
        assert (await client.get("runs")).status_code == 303


async def test_a_session_ends_with_its_token(staged: Stage) -> None:
    token = await staged.token("admin", payloads=True)
    async with staged.client(base=BASE) as client:
        await sign_in(client, token)
        told(await client.get("runs"), 200)
        async with staged.resources.store.begin() as connection:
            (known,) = await auth.list_tokens(connection)
            await auth.revoke(connection, known.id, now_ms=1)
        assert (await client.get("runs")).headers["location"].startswith("./sign-in")


async def test_signing_in_leads_nowhere_else(staged: Stage) -> None:
    token = await staged.token("viewer")
    for wanted in (
        "//evil.example/x",
        "https://evil.example",
        "\\\\evil.example",
        "/\\evil.example",
    ):
        async with staged.client(base=BASE) as client:
            response = await sign_in(client, token, wanted=wanted)
            where = httpx.URL("http://localhost/sign-in").join(response.headers["location"])
            assert where.host == "localhost"


# --- roles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.method} {page.path}")
async def test_who_has_not_signed_in_gets_to_no_page(staged: Stage, page: Page) -> None:
    await staged.token("admin")
    async with staged.client(base=BASE) as client:
        form = {"csrf": await csrf(client)} if page.method == "POST" else None
        response = await client.request(page.method, path_of(page), data=form)
        if page.path == "sign-in":
            assert response.status_code in (200, 401)
        else:
            assert "sign-in" in response.headers["location"]


@pytest.mark.parametrize("page", ACTIONS, ids=lambda page: page.path)
async def test_a_viewer_does_nothing(staged: Stage, page: Page) -> None:
    token = await staged.token("viewer")
    await add_run(staged, "x")
    async with staged.client(base=BASE) as client:
        await sign_in(client, token)
        form = {"csrf": await csrf(client, "runs"), "payload": "1"}
        response = await client.post(path_of(page), data=form)
        # A form that is not filled in right is told so before its sender is looked at.
        assert response.status_code in (403, 404, 422), response.text[:500]
    async with staged.resources.store.read() as connection:
        done = await connection.execute(select(audit.c.action).where(audit.c.status < 400))
    assert set(done.scalars()) <= {"sign_in"}


async def test_payloads_are_for_those_with_the_right(staged: Stage) -> None:
    token = await staged.token("operator")
    await add_run(staged)
    async with staged.client(base=BASE) as client:
        await sign_in(client, token)
        for part in ("payload", "payload.json", "result.json", "steps/results"):
            told(await client.get(f"runs/run-1/{part}"), 403)


# --- other sites ----------------------------------------------------------------------------------


async def test_a_form_of_another_site_does_nothing(staged: Stage) -> None:
    await add_run(staged)
    path = "runs/run-1/cancel"
    async with staged.client(base=BASE) as client, staged.client(base=BASE) as other:
        good = await csrf(client, "runs/run-1")
        with quickly(QUICK):
            for wrong in ({"reason": ""}, {"csrf": ""}, {"csrf": "0" * 64}):
                told(await client.post(path, data=wrong), 403)
        theirs = await csrf(other, "runs/run-1")
        told(await client.post(path, data={"csrf": theirs}), 403)
        form = {"csrf": good}
        for headers in (
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
            {"origin": "http://evil.example"},
            {"origin": "null"},
        ):
            refused = await client.post(path, data=form, headers=headers)
            assert refused.status_code == 403
        told(await client.post(path, json=form), 415)
        # The run has ended: that is what a good form hears.
        told(await client.post(path, data=form), 409)


async def test_a_link_of_another_site_is_followed_with_the_session(staged: Stage) -> None:
    async with staged.client(base=BASE) as client:
        first = await client.get("runs", headers={"sec-fetch-site": "cross-site"})
        assert 'http-equiv="refresh"' in told(first, 200)
        assert "set-cookie" not in first.headers


async def test_other_host_names_are_refused(staged: Stage) -> None:
    async with staged.client(base="http://evil.example/") as client:
        with quickly(QUICK):
            assert (await client.get("runs")).status_code == 421


# --- what is hostile ------------------------------------------------------------------------------


async def test_hostile_text_is_shown_and_does_nothing(staged: Stage) -> None:
    await add_run(staged)
    async with staged.client(base=BASE) as client:
        for path in (
            "runs",
            "runs/run-1",
            "runs/run-1/raw",
            "tasks/mail",
            "",
            "runs/run-1/related",
        ):
            text = told(await client.get(path), 200)
            assert "<script>alert" not in text
            assert "<img src=x" not in text
            assert not set("\u202e\x1b") & set(text), path


WRONG = [
    ("static/x/../../app.py", 404),
    ("static/x/..%2f..%2fapp.py", 404),
    ("static/x/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
    ("static/..%2f/console.css/..", 404),
    ("runs/..%2f..%2fetc%2fpasswd", 404),
    ("runs/%00", 422),
    ("runs/%ff%fe", 400),
    ("runs/" + "x" * 60_000, 422),
    ("runs/of-somebody-else", 404),
    ("runs/of-somebody-else/payload", 404),
    ("runs/of-somebody-else/timeline.json", 404),
    ("runs/of-somebody-else/related", 404),
    ("tasks/of-somebody-else", 404),
    ("tasks/%20", 422),
    ("runs?limit=100000000", 422),
    ("runs?cursor=" + "x" * 5_000, 422),
    ("runs?cursor=bm9uZQ", 422),
    ("runs?as_of=-1", 422),
    ("runs?as_of=99999999999999999999", 422),
    ("runs?status=%3Cscript%3E", 422),
    ("runs?tag=" + "x" * 5_000, 422),
    ("runs?" + "tag=x&" * 500, 422),
    ("runs/x/logs?limit=1000000", 422),
    ("runs?task=a&task=b", 422),
]


@pytest.mark.parametrize(("path", "status"), WRONG, ids=[path[:40] for path, _ in WRONG])
async def test_what_is_wrong_is_refused_at_once(staged: Stage, path: str, status: int) -> None:
    async with staged.client(base=BASE) as client:
        await client.get("sign-in")
        with quickly(QUICK):
            response = await client.get(path)
        assert response.status_code == status, response.text[:1_000]
        assert len(response.content) < 20_000


async def test_a_form_that_is_too_large_is_refused(staged: Stage) -> None:
    async with staged.client(base=BASE) as client:
        kind = {"content-type": "application/x-www-form-urlencoded"}
        for body, status in ((b"a=" + b"x" * 30_000_000, 413), (b"a=1&" * 1_000, 400)):
            with quickly(QUICK):
                response = await client.post("runs/x/cancel", content=body, headers=kind)
            assert response.status_code == status


async def test_the_console_holds_under_a_prefix(staged: Stage) -> None:
    await add_run(staged)
    transport = httpx.ASGITransport(staged.asgi, root_path="/tasks/console")
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        page = await client.get("/tasks/console/runs")
        text = told(page, 200)
        links = re.findall(r'(?:href|src|action|data-live|data-refresh)="([^"]+)"', text)
        assert links
        for link in links:
            assert page.url.join(link).path.startswith("/tasks/console/"), link
        style = next(link for link in links if link.endswith("console.css"))
        assert (await client.get(page.url.join(style))).status_code == 200


async def test_the_dead_without_an_error_are_a_group_of_their_own(staged: Stage) -> None:
    await add_run(staged, "silent")
    await add_run(staged, "loud", fingerprint="abc")
    async with staged.client(base=BASE) as client:
        groups = told(await client.get("dead"), 200)
        assert "dead/mail/-" in groups
        assert "dead/mail/abc" in groups
        page = told(await client.get("dead/mail/-"), 200)
        assert "Discard 1 run<" in page
        assert 'data-row="silent"' in page
        assert 'data-row="loud"' not in page
