"""What the API answers when it cannot do what it was asked: problems, as RFC 9457 has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from brokertask import errors
from brokertask.values import clip

Kind: TypeAlias = Literal[
    "malformed",
    "unauthenticated",
    "forbidden",
    "not_found",
    "method_not_allowed",
    "conflict",
    "too_large",
    "unsupported_media_type",
    "misdirected",
    "invalid",
    "too_many_requests",
    "internal",
    "broker_unavailable",
    "store_unavailable",
    "unknown_outcome",
]
KINDS: Final[Mapping[Kind, tuple[int, str]]] = {
    "malformed": (400, "The request cannot be read"),
    "unauthenticated": (401, "An API token is needed"),
    "forbidden": (403, "This API token may not do that"),
    "not_found": (404, "There is no such thing"),
    "method_not_allowed": (405, "Not with this method"),
    "conflict": (409, "It cannot be done to what is there now"),
    "too_large": (413, "The request is too large"),
    "unsupported_media_type": (415, "Bodies are JSON"),
    "misdirected": (421, "This server does not answer to that host name"),
    "invalid": (422, "A value is not what it must be"),
    "too_many_requests": (429, "Too many requests"),
    "internal": (500, "A defect of the server"),
    "broker_unavailable": (503, "The broker cannot be used now"),
    "store_unavailable": (503, "The store cannot be used now"),
    "unknown_outcome": (503, "Nobody knows whether it was done"),
}
"""Status and title by kind."""
CONTENT_TYPE: Final = "application/problem+json"
MAX_INVALID: Final = 10
MAX_DETAIL: Final = 500


class InvalidValue(BaseModel):
    """One value of a request that is not what it must be."""

    where: str
    """Such as `body.payload.number` or `query.limit`."""
    what: str


class ProblemView(BaseModel):
    """Why a request was not done."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    kind: Kind
    detail: str
    run_id: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of a trigger whose outcome is unknown: repeat it with this id."""
    invalid: list[InvalidValue] = Field(default=[], exclude_if=lambda value: not value)


class Problem(Exception):
    """Raised in a handler; becomes the answer."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        run_id: str | None = None,
        invalid: list[InvalidValue] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind: Kind = kind
        self.status = KINDS[kind][0]
        self.headers = dict(headers or {})
        self.view = ProblemView(
            type=f"urn:brokertask:problem:{kind}",
            title=KINDS[kind][1],
            status=self.status,
            kind=kind,
            detail=clip(detail, MAX_DETAIL),
            run_id=run_id,
            invalid=invalid or [],
        )

    def response(self) -> Response:
        """Return the answer that tells of it."""
        return Response(
            self.view.model_dump_json(),
            self.status,
            headers={"cache-control": "no-store", **self.headers},
            media_type=CONTENT_TYPE,
        )


def invalid_values(where: str, error: ValidationError) -> Problem:
    """Return the problem with a part of a request, without the values in it."""
    found = [
        InvalidValue(
            where=clip(".".join([where, *(str(part) for part in each["loc"])]), 200),
            what=clip(each["msg"], 200),
        )
        for each in error.errors(include_input=False, include_url=False)[:MAX_INVALID]
    ]
    return Problem("invalid", f"{found[0].where}: {found[0].what}", invalid=found)


def problem_of(error: errors.BrokertaskError) -> Problem:
    """Return the problem that an error of ours is to a caller."""
    run_id = getattr(error, "run_id", None)
    match error:
        case errors.StoreUnavailable():
            kind: Kind = "store_unavailable"
        case errors.PublishError(unknown=True):
            kind = "unknown_outcome"
        case errors.Unroutable():
            kind = "not_found"
        case errors.PublishError():
            kind = "broker_unavailable"
        case errors.PayloadTooLarge():
            kind = "too_large"
        case errors.PayloadUnavailable():
            kind = "store_unavailable"
        case errors.PayloadError() | errors.InvalidOption() | errors.EnvelopeError():
            kind = "invalid"
        case _:
            kind = "conflict"
    headers = {"retry-after": "2"} if KINDS[kind][0] == 503 else None
    return Problem(kind, str(error), run_id=run_id, headers=headers)
