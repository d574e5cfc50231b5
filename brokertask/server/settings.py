"""What a server may be told: each setting is `BROKERTASK_SERVER_` and its name in capitals."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from brokertask.errors import ConfigurationError
from brokertask.settings import Environment, Seconds

SCHEMES = ("sqlite+aiosqlite://", "postgresql+asyncpg://")


def _store(url: str) -> str:
    if not url.startswith(SCHEMES):
        # Whatever it is, there may be a password in it.
        raise ValueError(f"begins with {' or '.join(SCHEMES)}")
    return url


def _array(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


class ServerSettings(Environment):
    """Everything about a server beside its broker, which is in `Settings`."""

    prefix = "BROKERTASK_SERVER_"

    store_url: Annotated[str, AfterValidator(_store), Field(repr=False)] = (
        "sqlite+aiosqlite:///.brokertask/server.db"
    )
    """The store: SQLite for one machine, `postgresql+asyncpg://user:password@host/database`."""
    bind: str = "127.0.0.1:8070"
    """Where the API listens. Any address but one of loopback needs an API token to start."""
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_array)] = ()
    """Host names that the API answers to beside those of loopback, as a JSON array: the name that
    a proxy in front of it is known by."""
    keep_for: Annotated[Seconds, Field(ge=60)] = 30 * 86_400.0
    """How long the history of a run is kept after its end: 1 minute or more."""
    keep_runs: int | None = Field(default=None, ge=1)
    """How many runs that have ended are kept, the latest; without it all, within `keep_for`."""


def server_settings() -> ServerSettings:
    """Return the settings in the environment.

    Raises:
        ConfigurationError: A variable is not understood.
    """
    try:
        return ServerSettings()
    except ValidationError as error:
        raise ConfigurationError(f"BROKERTASK_SERVER_*: {error}") from None
