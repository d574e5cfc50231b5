"""Sessions of browsers: a random secret in a cookie, of which the store has a hash.

Every browser has such a secret, also where nobody signs in: what keeps other sites from having its
forms sent is made from it. Signing in writes its hash beside the API token that was given. A
session has what that token has, as long as it has it, for twelve hours at most.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Final

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response

from brokertask.server.api import auth
from brokertask.server.api.auth import Principal
from brokertask.server.store.schema import console_sessions

COOKIE: Final = "brokertask_session"
LASTS_MS: Final = 12 * 3_600_000
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


def new_secret() -> str:
    """Return a secret of 256 random bits."""
    return secrets.token_urlsafe(32)


def secret_of(request: Request) -> str | None:
    """Return the secret that a browser has; None for none that could be one."""
    text = request.cookies.get(COOKIE, "")
    return text if _SECRET.fullmatch(text) else None


def csrf_of(secret: str) -> str:
    """Return what every form of a browser with this secret has to bring."""
    return hmac.new(secret.encode(), b"csrf", hashlib.sha256).hexdigest()


def keep(response: Response, secret: str, request: Request) -> None:
    """Have the browser keep a secret, and tell it to nobody else."""
    # A proxy may have ended TLS before us; the browser knows where it is.
    origin = request.headers.get("origin", "")
    secure = request.url.scheme == "https" or origin.startswith("https:")
    response.set_cookie(COOKIE, secret, httponly=True, samesite="strict", secure=secure, path="/")


async def begin(connection: AsyncConnection, token: str, *, now_ms: int) -> str:
    """Write a session of the API token with this id, and return its secret."""
    secret = new_secret()
    await connection.execute(delete(console_sessions).where(console_sessions.c.until_ms <= now_ms))
    await connection.execute(
        insert(console_sessions).values(hash=_hash(secret), token=token, until_ms=now_ms + LASTS_MS)
    )
    return secret


async def end(connection: AsyncConnection, secret: str) -> None:
    """Forget the session with this secret."""
    await connection.execute(
        delete(console_sessions).where(console_sessions.c.hash == _hash(secret))
    )


async def principal_of(
    connection: AsyncConnection, secret: str, *, now_ms: int
) -> Principal | None:
    """Return who has signed in with this secret; None for nobody, or one whose token has ended.

    Cost: two rows by their keys.
    """
    mine = select(console_sessions.c.token).where(
        console_sessions.c.hash == _hash(secret), console_sessions.c.until_ms > now_ms
    )
    token = await connection.scalar(mine)
    return None if token is None else await auth.principal_with(connection, token, now_ms=now_ms)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
