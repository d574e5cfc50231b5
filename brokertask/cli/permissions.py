"""`brokertask permissions`: what the users of a broker may do at least, as commands."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, get_args

import typer

from brokertask import permissions as rights
from brokertask.cli import console
from brokertask.errors import BrokertaskError
from brokertask.settings import Settings


class Role(StrEnum):
    """What a user of the broker is there for."""

    PUBLISHER = "publisher"
    WORKER = "worker"
    SERVER = "server"
    TOPOLOGY = "topology"


assert set(Role) == set(get_args(rights.Role))


def permissions(
    role: Annotated[Role, typer.Option(help="What the user is there for.")],
    user: Annotated[
        str | None, typer.Option(metavar="NAME", help="The broker's user; by default the role.")
    ] = None,
    vhost: Annotated[str, typer.Option(metavar="NAME", help="The virtual host.")] = "/",
    as_json: console.Json = False,
) -> None:
    """Print the rabbitmqctl command that gives a user the rights of a role, and no others.

    They are enough with BROKERTASK_DECLARE=false, after `brokertask topology apply` by a user
    with the rights of the role topology. The broker is not asked.
    """
    try:
        found = rights.permissions(Settings().names, role.value)
    except BrokertaskError as error:
        console.fail(error)
    if as_json:
        console.show_json(asdict(found))
    else:
        typer.echo(found.command(user or role.value, vhost))
