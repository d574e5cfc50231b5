"""What a run carries from one delivery to the next: errors, finished steps, metadata. Pure.

On the wire it is one msgpack map behind the payload; what a newer minor version adds to it, or to
a step, is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, TypeAlias

import msgpack

from brokertask.claim import Claim
from brokertask.errors import EnvelopeError, MemoryFull
from brokertask.outcome import AttemptError
from brokertask.values import MSGPACK, decode, pack
from brokertask.wait import WAIT, reopened

KEPT_ERRORS: Final = 20
MAX_ERRORS_BYTES: Final = 1_048_576
"""Far above what 20 errors with their tracebacks take."""
Metadata: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One finished step."""

    key: str
    """Its name, with its number if the name was used before: `fetch`, `fetch#2`."""
    function: str
    """The qualified name of what it called."""
    after: str | None
    """The key of the step that was asked for before it in its branch, "" for the first of all;
    None where that says nothing, as after a step whose failure the task caught."""
    result: bytes | Claim
    """In msgpack; or the claim for that."""
    packed: bytes = field(default=b"", repr=False, compare=False)

    def __post_init__(self) -> None:
        result = self.result
        # A claim is not where a reader that knows no claims would take it for the result.
        last = [None, asdict(result)] if isinstance(result, Claim) else [result]
        # Once: the memory is written again with each checkpoint.
        object.__setattr__(self, "packed", pack([self.key, self.function, self.after, *last]))

    @staticmethod
    def read(raw: Any) -> Step:
        """Return the step in a decoded array.

        Raises:
            TypeError: It is no such array.
            EnvelopeError: It has a claim that is none.
        """
        match raw:
            case [str(key), str(function), str() | None as after, bytes(result), *_]:
                return Step(key, function, after, result)
            case [str(key), str(function), str() | None as after, None, claim, *_]:
                return Step(key, function, after, Claim.read(claim))
            case _:
                raise TypeError("a step is an array of key, function, place and result")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a run remembers."""

    errors: tuple[AttemptError, ...] = ()
    steps: tuple[Step, ...] = ()
    metadata: Metadata = field(default_factory=dict)

    def with_error(self, error: AttemptError) -> Memory:
        """Return this memory with one more error, the oldest but the first dropped beyond 20."""
        errors = (*self.errors, error)
        if len(errors) > KEPT_ERRORS:
            errors = (errors[0], *errors[-(KEPT_ERRORS - 1) :])
        return replace(self, errors=errors)

    def with_step(self, step: Step) -> Memory:
        """Return this memory with one more finished step."""
        return replace(self, steps=(*self.steps, step))

    def with_result(self, key: str, result: bytes) -> Memory:
        """Return this memory with another result for one of its steps."""
        steps = (replace(step, result=result) if step.key == key else step for step in self.steps)
        return replace(self, steps=tuple(steps))

    def redriven(self) -> Memory:
        """Return what a dead run remembers when it is put back to work.

        A wait that failed is asked for anew: what it was for may have come to another end.
        """
        steps = (
            replace(step, result=reopened(step.result))
            if step.function == WAIT and isinstance(step.result, bytes)
            else step
            for step in self.steps
        )
        return replace(self, errors=(), steps=tuple(steps))

    @property
    def size(self) -> int:
        """The bytes that its steps and metadata take in a message."""
        metadata = len(pack(self.metadata)) if self.metadata else 0
        return metadata + sum(len(step.packed) for step in self.steps)

    def check(self, limit: int, what: str) -> None:
        """Return if it fits into `limit` bytes, with `what` newly in it.

        Raises:
            MemoryFull: It does not.
        """
        if (size := self.size) <= limit:
            return
        sizes = sorted(((len(step.packed), step.key) for step in self.steps), reverse=True)
        largest = ", ".join(f"{key!r} {size} bytes" for size, key in sizes[:3])
        raise MemoryFull(
            f"with {what!r} the run remembers {size} bytes, the limit is {limit} "
            f"(max_memory_bytes); the largest steps: {largest or 'none'}. Let steps return "
            "references to large data, or raise the limit"
        )

    def pack(self) -> bytes:
        """Return it as msgpack; empty bytes when there is nothing to remember."""
        parts: list[bytes] = []
        if self.errors:
            parts += pack("errors"), _array(pack(asdict(error)) for error in self.errors)
        if self.steps:
            parts += pack("steps"), _array(step.packed for step in self.steps)
        if self.metadata:
            parts += pack("metadata"), pack(self.metadata)
        if not parts:
            return b""
        return bytes(msgpack.Packer().pack_map_header(len(parts) // 2)) + b"".join(parts)

    @staticmethod
    def unpack(data: bytes) -> Memory:
        """Read what `pack` wrote.

        Raises:
            EnvelopeError: It is damaged.
        """
        if not data:
            return _NOTHING
        try:
            raw = decode(data, MSGPACK)
            metadata = raw.get("metadata", {})
            if not isinstance(metadata, dict):
                raise TypeError("its metadata is no map")
            return Memory(
                errors=tuple(AttemptError.read(error) for error in raw.get("errors", ())),
                steps=tuple(Step.read(step) for step in raw.get("steps", ())),
                metadata=metadata,
            )
        except (TypeError, AttributeError) as error:
            raise EnvelopeError(
                f"the run's memory is damaged: {error}", reason="undecodable"
            ) from None


_NOTHING: Final = Memory()


def _array(items: Iterable[bytes]) -> bytes:
    packed = list(items)
    return bytes(msgpack.Packer().pack_array_header(len(packed))) + b"".join(packed)
