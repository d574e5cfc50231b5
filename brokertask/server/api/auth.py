"""API tokens: who asks, and what he may. Only hashes are kept.

A token is `bt_<id>_<secret>`; its secret has 256 random bits, so that one SHA-256 protects it as
well as a slow hash would. Without any token, whoever reaches a loopback address may do everything;
the first one that is made closes that for ever, also after it was revoked.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from brokertask.errors import InvalidOption
from brokertask.server.store.schema import api_tokens

Role: TypeAlias = Literal["viewer", "operator", "admin"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
"""From the least to the most: each may what those before may."""
MAX_NAME: Final = 80
USED_EVERY_MS: Final = 60_000
"""That a token was used is noted once in so long."""
_TOKEN: Final = re.compile(r"bt_([a-z2-7]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
_BEARER: Final = "bearer "


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    name: str
    role: Role
    payloads: bool
    """May see payloads and results."""
    token: str | None = None
    """The id of its API token."""

    def may(self, role: Role) -> bool:
        """Whether it may what takes this role."""
        return ROLES.index(self.role) >= ROLES.index(role)


LOCAL: Final = Principal("local", "admin", payloads=True)
"""Who reaches a loopback address as long as there was never a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiToken:
    """What is known of a token."""

    id: str
    name: str
    role: Role
    payloads: bool
    created_ms: int
    expires_ms: int | None
    revoked_ms: int | None
    used_ms: int | None

    def valid(self, now_ms: int) -> bool:
        """Whether it opens anything now."""
        return self.revoked_ms is None and (self.expires_ms is None or now_ms < self.expires_ms)


async def create(
    connection: AsyncConnection,
    name: str,
    role: Role,
    *,
    payloads: bool,
    now_ms: int,
    expires_ms: int | None = None,
) -> tuple[ApiToken, str]:
    """Make a token; the text, which comes second, cannot be had again.

    Raises:
        InvalidOption: A name that is no printable text of 1 to 80 characters.
    """
    if not (0 < len(name) <= MAX_NAME and name.isprintable()):
        raise InvalidOption(f"a token's name is printable text of 1 to {MAX_NAME} characters")
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    identity = "".join(secrets.choice(alphabet) for _ in range(16))
    secret = secrets.token_urlsafe(32)
    token = ApiToken(
        id=identity,
        name=name,
        role=role,
        payloads=payloads,
        created_ms=now_ms,
        expires_ms=expires_ms,
        revoked_ms=None,
        used_ms=None,
    )
    await connection.execute(
        insert(api_tokens).values(
            id=identity,
            name=name,
            hash=_hash(secret),
            role=role,
            payloads=payloads,
            created_ms=now_ms,
            expires_ms=expires_ms,
        )
    )
    return token, f"bt_{identity}_{secret}"


async def list_tokens(connection: AsyncConnection) -> list[ApiToken]:
    """Return every token that was made, the latest first."""
    rows = await connection.execute(select(api_tokens).order_by(api_tokens.c.created_ms.desc()))
    return [_token(row) for row in rows]


async def revoke(connection: AsyncConnection, identity: str, *, now_ms: int) -> bool:
    """Make a token useless; False if there is none of this id that was not yet."""
    done = await connection.execute(
        update(api_tokens)
        .where(api_tokens.c.id == identity, api_tokens.c.revoked_ms.is_(None))
        .values(revoked_ms=now_ms)
    )
    return done.rowcount == 1


async def closed(connection: AsyncConnection) -> bool:
    """Whether a token was ever made, so that everybody needs one."""
    return (await connection.execute(select(api_tokens.c.id).limit(1))).first() is not None


async def principal_of(
    connection: AsyncConnection, authorization: str | None, *, now_ms: int
) -> Principal | None:
    """Return whom the `Authorization` header is of; None for no valid token.

    Cost: one row by its key.
    """
    if authorization is None or not authorization.lower().startswith(_BEARER):
        return None
    match = _TOKEN.fullmatch(authorization[len(_BEARER) :].strip())
    if match is None:
        return None
    rows = await connection.execute(select(api_tokens).where(api_tokens.c.id == match[1]))
    row = rows.first()
    if row is None or not hmac.compare_digest(row.hash, _hash(match[2])):
        return None
    token = _token(row)
    if not token.valid(now_ms):
        return None
    return Principal(token.name, token.role, token.payloads, token.id)


async def principal_with(
    connection: AsyncConnection, identity: str, *, now_ms: int
) -> Principal | None:
    """Return whom the token with this id is of; None if it is not valid any longer."""
    rows = await connection.execute(select(api_tokens).where(api_tokens.c.id == identity))
    row = rows.first()
    if row is None or not (token := _token(row)).valid(now_ms):
        return None
    return Principal(token.name, token.role, token.payloads, token.id)


async def note_use(connection: AsyncConnection, token: str, *, now_ms: int) -> None:
    """Write that a token was used now."""
    mine = update(api_tokens).where(api_tokens.c.id == token)
    await connection.execute(mine.values(used_ms=now_ms))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _token(row: Row[Any]) -> ApiToken:
    return ApiToken(
        id=row.id,
        name=row.name,
        role=row.role,
        payloads=row.payloads,
        created_ms=row.created_ms,
        expires_ms=row.expires_ms,
        revoked_ms=row.revoked_ms,
        used_ms=row.used_ms,
    )
