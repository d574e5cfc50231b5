"""What was raised, as text that can be sent: its class, what it says, where it came from."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from brokertask.typed import explain

MAX_CAUSES: Final = 5
_PACKAGE: Final = str(Path(__file__).parent)


def frames_of(error: BaseException) -> str:
    """Return where an error and its causes came from, from the user's first frame on.

    Our own frames are the same for every error. Values that a validation refused are left out.
    """
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(parts) < MAX_CAUSES:
        trace = seen.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            trace = trace.tb_next
        frames = "".join(traceback.format_tb(trace))
        parts.append(
            f"Traceback (most recent call last):\n{frames}{name_of(seen)}: {text_of(seen)}\n"
        )
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\nand before it\n".join(parts) if error.__traceback__ else ""


def name_of(error: BaseException) -> str:
    """Return what an error's class is called, with its module unless everybody knows it."""
    kind = type(error)
    own = kind.__module__ in ("builtins", "__main__", "brokertask.errors")
    return kind.__qualname__ if own else f"{kind.__module__}.{kind.__qualname__}"


def text_of(error: BaseException) -> str:
    """Return what an error says, as text that can be sent, whatever its class does."""
    try:
        text = explain(error) if isinstance(error, ValidationError) else str(error)
    except Exception as problem:
        text = f"(its text cannot be had: {type(problem).__name__})"
    return text.encode("utf-8", "replace").decode()
