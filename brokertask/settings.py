"""The one reader of the environment: each setting is `BROKERTASK_` and its name in capitals."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from brokertask.durations import seconds
from brokertask.errors import ConfigurationError, InvalidOption
from brokertask.payloads import check_url
from brokertask.topology import Names

DEFAULT_URL: Final = "amqp://guest:guest@127.0.0.1:5672/"
DataPlane: TypeAlias = Literal["direct", "aio-pika"]
DEV_SOCKET: Final = Path(".brokertask/dev.sock")
"""Where `brokertask dev` listens, below the folder it was started in."""
_SCHEMES: Final = ("amqp://", "amqps://", "memory:", "unix:")


def _known_scheme(url: str | None) -> str | None:
    if url is not None and not url.startswith(_SCHEMES):
        # Whatever it is, there may be a password in it.
        raise ValueError(f"begins with {', '.join(_SCHEMES)}, or is not set")
    return url


def _store(url: str | None) -> str | None:
    try:
        return url if url is None else check_url(url)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


def mask(url: str) -> str:
    """Return a URL without its password, for logs and errors."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def _seconds(value: Any) -> float:
    """Read "2.5" from the environment as the number it is, and leave "1h" to `seconds`."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    try:
        return seconds(value)
    except InvalidOption as error:
        raise ValueError(str(error)) from None


Seconds = Annotated[float, BeforeValidator(_seconds)]


class Environment(BaseModel):
    """Settings, each from a variable of a prefix and its name in capitals; arguments win."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    prefix: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _read_environment(cls, given: Any) -> Any:
        # Not by pydantic-settings: its import takes longer than all of this package's.
        written = {name.lower(): value for name, value in os.environ.items() if value}
        known = {name: written.get(f"{cls.prefix.lower()}{name}") for name in cls.model_fields}
        return {name: value for name, value in known.items() if value is not None} | given


class Settings(Environment):
    """Everything a deployment may set. Arguments given in code win over the environment."""

    prefix = "BROKERTASK_"

    amqp_url: Annotated[str | None, AfterValidator(_known_scheme), Field(repr=False)] = None
    """The broker: `amqp(s)://user:password@host:port/vhost`, or the embedded one: `memory:` in
    this process, `unix:PATH` of a running `brokertask dev`. Unset: a `brokertask dev` started in
    this folder if there is one, else RabbitMQ on 127.0.0.1:5672."""
    namespace: str = "bt"
    """The prefix of every exchange and queue: several applications can share a broker."""
    declare: bool = True
    """Declare the topology when a worker or client starts. Production: false, and
    `brokertask topology apply` at deployment, so that services need no configure right."""
    heartbeat: int = Field(default=30, ge=2, le=600)
    """Seconds between AMQP heartbeats; a dead peer is noticed after about three."""
    connect_timeout: Seconds = 10.0
    """How long a caller waits for a connection before `BrokerUnavailable`."""
    publish_timeout: Seconds = 30.0
    """How long a publish may take before `PublishUnknown` or `BrokerBlocked`."""
    data_plane: DataPlane = "direct"
    """Who handles the frames that carry messages, acks and confirms: brokertask itself, or
    aio-pika at many times the cost."""
    max_payload_bytes: int = Field(default=1_048_576, ge=1_024, le=16_777_216)
    """The largest payload or result in a message, in msgpack; 16 MiB is RabbitMQ's own limit."""
    max_memory_bytes: int = Field(default=1_048_576, ge=1_024, le=8_388_608)
    """What a run may remember: the results of its finished steps and its metadata, in msgpack.
    All of it is written again with each checkpoint."""
    payload_store: Annotated[str | None, AfterValidator(_store)] = None
    """Where payloads and results go that are too large for a message: `file:///absolute/folder`
    or `s3://bucket/prefix`, the same for publishers and workers."""
    claim_above_bytes: int = Field(default=65_536, ge=1_024, le=16_777_216)
    """With a payload store: what is larger than this, in msgpack, leaves its message as a claim;
    so does what is over `max_payload_bytes`."""
    grace: Seconds = 60.0
    """How long a worker told to stop lets its runs finish before it hands them back."""
    results: bool = True
    """Listen for results, so that `Run.result()` works. False for services that only trigger
    and whose broker user may not declare a reply queue."""
    consumer_timeout: Seconds = 1_800.0
    """The broker's consumer timeout as configured there. A message held for a third of it is
    renewed, so that a run may last longer."""
    thread_limit: int = Field(default=40, ge=1, le=1_000)
    """Threads a worker process uses for tasks that are sync functions, all tasks together."""

    @property
    def names(self) -> Names:
        """The names below the namespace."""
        return Names(self.namespace)

    def broker_url(self) -> str:
        """Return the URL of the broker to use, by the rule of `amqp_url`."""
        if self.amqp_url is not None:
            return self.amqp_url
        # Only our own: payloads do not go to whoever left a socket in this folder.
        ours = DEV_SOCKET.is_socket() and DEV_SOCKET.stat().st_uid == os.getuid()
        return f"unix:{DEV_SOCKET}" if ours else DEFAULT_URL
