"""`brokertask tokens`: who may use a server's API. It works on the server's store itself."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import typer

from brokertask.cli import console
from brokertask.cli.console import Exit, printable
from brokertask.cli.worker import parse_duration
from brokertask.errors import ConfigurationError

app = typer.Typer(
    help="API tokens of a server: make, list and revoke them, where its store is reached.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
T = TypeVar("T")


class Role(StrEnum):
    """What a token's holder may do, each with all that those before may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is, or what it is for.")],
    role: Annotated[Role, typer.Option(help="viewer reads; operator acts; admin audits.")],
    payloads: Annotated[
        bool, typer.Option("--payloads", help="May see payloads and results, too.")
    ] = False,
    ttl: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Valid for so long, as in 30d.")
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Make a token, and print it: only its hash is kept. From the first one on, all need one."""
    now_ms = time.time_ns() // 1_000_000

    async def make(connection: Any) -> tuple[dict[str, Any], str]:
        from brokertask.server.api import auth

        token, text = await auth.create(
            connection,
            name,
            role.value,
            payloads=payloads,
            now_ms=now_ms,
            expires_ms=None if ttl is None else now_ms + round(parse_duration(ttl) * 1000),
        )
        return asdict(token), text

    token, text = _stored(make)
    if as_json:
        console.show_json({**token, "token": text})
    else:
        typer.echo(text)


@app.command("list")
def list_tokens(as_json: console.Json = False) -> None:
    """List every token that was made."""

    async def read(connection: Any) -> list[dict[str, Any]]:
        from brokertask.server.api import auth

        return [asdict(token) for token in await auth.list_tokens(connection)]

    found = _stored(read)
    if as_json:
        console.show_json(found)
        return
    columns = ("ID", "NAME", "ROLE", "PAYLOADS", "MADE", "EXPIRES", "USED", "REVOKED")
    rows = [
        (
            one["id"],
            one["name"],
            one["role"],
            "yes" if one["payloads"] else "",
            *(_day(one[key]) for key in ("created_ms", "expires_ms", "used_ms", "revoked_ms")),
        )
        for one in found
    ]
    console.show_table(columns, rows, empty="no token was ever made", elastic="NAME")


@app.command()
def revoke(
    identity: Annotated[str, typer.Argument(metavar="ID", help="As `tokens list` shows it.")],
) -> None:
    """Make a token useless at once; exit code 6: there is none that was not."""

    async def end(connection: Any) -> bool:
        from brokertask.server.api import auth

        return await auth.revoke(connection, identity, now_ms=time.time_ns() // 1_000_000)

    if not _stored(end):
        console.err.print(f"there is no token {printable(identity)} that was not revoked before")
        raise typer.Exit(Exit.CONFLICT)
    console.out.print(f"{printable(identity)} is revoked")


def _stored(work: Callable[[Any], Awaitable[T]]) -> T:
    """Return what is done in one transaction with the store of the environment's server."""
    try:
        from brokertask.server.settings import server_settings
        from brokertask.server.store.engine import Database
    except ModuleNotFoundError as error:
        console.fail(
            ConfigurationError(f"{error.name} is not installed: pip install 'brokertask[server]'")
        )

    async def do() -> T:
        store = Database(server_settings().store_url)
        try:
            await store.open()
            async with store.begin() as connection:
                return await work(connection)
        finally:
            await store.close()

    return console.run(do)


def _day(instant_ms: int | None) -> str:
    if instant_ms is None:
        return ""
    return datetime.fromtimestamp(instant_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
