"""Triggers that a server decides on: idempotency keys, debounces, singletons. Pure.

Such a trigger is an ordinary one, published to the servers with the headers below and a
`correlation_id` of its own; a server answers to its `reply_to`.

| header            | value                                                                |
| ----------------- | -------------------------------------------------------------------- |
| `bt-admit`        | `idempotency`, `debounce` or `singleton`                             |
| `bt-key`          | the key, of the task and of this kind                                |
| `bt-mode`         | of a debounce: `leading`, `trailing`                                 |
|                   | of a singleton: `skip`, `replace`                                    |
| `bt-ttl`          | ms that the key is kept at most; of a debounce: ms of quiet          |
| `bt-max-delay`    | of a debounce: ms after which it ends, quiet or not                  |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from brokertask.durations import Duration, seconds
from brokertask.envelope import Headers, Message
from brokertask.errors import EnvelopeError, InvalidOption
from brokertask.typed import explain
from brokertask.values import LAST_INSTANT_MS, MSGPACK, decode, pack

ADMITTED: Final = "admitted"
"""The `type` of a server's answer."""
MAX_KEY: Final = 512
"""Bytes of UTF-8."""
DEFAULT_TTL: Final = "24h"

Kind: TypeAlias = Literal["idempotency", "debounce", "singleton"]
Mode: TypeAlias = Literal["", "leading", "trailing", "skip", "replace"]


@dataclass(frozen=True, slots=True)
class Debounce:
    """Makes one run of the triggers that come with this key in quick succession.

    Attributes:
        key: What they have in common, beside the task.
        delay: So long without another, and the next is a new run.
        mode: `trailing`: the run starts when it is quiet, with the last payload. `leading`: it
            starts at once, with the first; what comes until it is quiet adds nothing.
        max_delay: Do not wait for quiet longer than this after the first.
    """

    key: str
    delay: Duration
    mode: Literal["leading", "trailing"] = "trailing"
    max_delay: Duration | None = None


@dataclass(frozen=True, slots=True)
class Singleton:
    """Keeps two runs of one key from being wanted at a time.

    Attributes:
        key: What only one run at a time shall be for, beside the task.
        ttl: A run of which no end was heard holds the key no longer than this.
        mode: `skip`: a trigger that comes while a run is unfinished gives back that run.
            `replace`: it cancels that run, and its own begins; until the first has cleaned up,
            there are two.
    """

    key: str
    ttl: Duration = DEFAULT_TTL
    mode: Literal["skip", "replace"] = "skip"


def _is_key(key: object) -> bool:
    return (
        isinstance(key, str)
        and key.isprintable()
        and 0 < len(key.encode("utf-8", "replace")) <= MAX_KEY
    )


def _readable_key(key: str) -> str:
    if not _is_key(key):
        raise ValueError("not a key")
    return key


Milliseconds: TypeAlias = Annotated[int, Field(strict=True, gt=0, le=LAST_INSTANT_MS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a trigger asks of the servers. Durations are ms."""

    kind: Kind
    key: Annotated[str, AfterValidator(_readable_key)]
    ttl_ms: Milliseconds
    mode: Mode = ""
    max_delay_ms: Milliseconds | None = None

    @staticmethod
    def of(
        idempotency_key: str | None,
        idempotency_ttl: Duration,
        debounce: Debounce | None,
        singleton: Singleton | None,
    ) -> Admission | None:
        """Return what the options of a trigger come to; None: no server is needed.

        Raises:
            InvalidOption: More than one of them is given, or one is out of range.
        """
        if sum(each is not None for each in (idempotency_key, debounce, singleton)) > 1:
            raise InvalidOption("a trigger has one of idempotency_key, debounce and singleton")
        if idempotency_key is not None:
            key, ttl_ms = _key(idempotency_key, "idempotency_key"), _ms(idempotency_ttl, "the ttl")
            return Admission(kind="idempotency", key=key, ttl_ms=ttl_ms)
        if debounce is not None:
            return _debounce(debounce)
        return None if singleton is None else _singleton(singleton)

    def headers(self) -> dict[str, object]:
        """Return it as headers."""
        values = ((header, getattr(self, name)) for name, header in ADMISSION_HEADERS.items())
        return {header: value for header, value in values if value not in (None, "")}

    @staticmethod
    def read(headers: Headers) -> Admission:
        """Return what a trigger asks for.

        Raises:
            EnvelopeError: It asks for nothing that is known.
        """
        given = {
            name: headers[header] for name, header in ADMISSION_HEADERS.items() if header in headers
        }
        try:
            return _ADMISSION.validate_python(given)
        except ValidationError as error:
            raise EnvelopeError(f"no admission: {explain(error)}", reason="undecodable") from None


ADMISSION_HEADERS: Final = {
    "kind": "bt-admit",
    "key": "bt-key",
    "mode": "bt-mode",
    "ttl_ms": "bt-ttl",
    "max_delay_ms": "bt-max-delay",
}
"""Each field of an admission and its header. They end with the server's decision."""
_ADMISSION: Final = TypeAdapter(Admission)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says to such a trigger."""

    run_id: str
    """The run that it stands for now; not its own, if there was one already."""
    refused: str | None = None
    """Why there is none for it."""

    def message(self, correlation_id: str | None) -> Message:
        """Return it as the message to publish."""
        body: Mapping[str, Any] = {"run_id": self.run_id, "refused": self.refused}
        return Message(
            body=pack(body), type=ADMITTED, correlation_id=correlation_id, content_type=MSGPACK
        )

    @staticmethod
    def read(message: Message) -> Answer:
        """Return the answer in `message`.

        Raises:
            EnvelopeError: There is none in it.
        """
        match decode(message.body, message.content_type or MSGPACK):
            case {"run_id": str(run_id), "refused": None | str() as refused}:
                return Answer(run_id, refused)
            case _:
                raise EnvelopeError("not an answer of a server", reason="undecodable")


def _debounce(debounce: Debounce) -> Admission:
    if not isinstance(debounce, Debounce):
        raise InvalidOption(f"debounce is a Debounce(...), not {debounce!r:.80}")
    if debounce.mode not in ("leading", "trailing"):
        raise InvalidOption(f"debounce: mode is 'leading' or 'trailing', not {debounce.mode!r}")
    delay, longest = _ms(debounce.delay, "debounce: delay"), debounce.max_delay
    longest_ms = None if longest is None else _ms(longest, "debounce: max_delay")
    if longest_ms is not None and longest_ms < delay:
        raise InvalidOption("debounce: max_delay is no less than delay")
    key = _key(debounce.key, "debounce: key")
    return Admission(
        kind="debounce", key=key, ttl_ms=delay, mode=debounce.mode, max_delay_ms=longest_ms
    )


def _singleton(singleton: Singleton) -> Admission:
    if not isinstance(singleton, Singleton):
        raise InvalidOption(f"singleton is a Singleton(...), not {singleton!r:.80}")
    if singleton.mode not in ("skip", "replace"):
        raise InvalidOption(f"singleton: mode is 'skip' or 'replace', not {singleton.mode!r}")
    return Admission(
        kind="singleton",
        key=_key(singleton.key, "singleton: key"),
        ttl_ms=_ms(singleton.ttl, "singleton: ttl"),
        mode=singleton.mode,
    )


def _key(key: str, what: str) -> str:
    if not _is_key(key):
        raise InvalidOption(f"{what} is printable text of 1 to {MAX_KEY} bytes, not {key!r:.80}")
    return key


def _ms(duration: Duration, what: str) -> int:
    value = round(seconds(duration) * 1000)
    if value == 0:
        raise InvalidOption(f"{what} is more than 0")
    return value
