"""Says which task blocks the event loop. A thread, because the loop cannot say it."""

from __future__ import annotations

import asyncio
import logging
import sys
import sysconfig
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Final

from brokertask.supervisor import BLOCKED_AFTER

log = logging.getLogger("brokertask.worker")

CHECK_EVERY: Final = 1.0
_NOT_OF_USERS: Final = (
    str(Path(__file__).parents[1]),
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    "<frozen",
)


class Watchdog:
    """Watches the loop of the thread that makes it, which has to `tick` more than once a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._ticked = time.monotonic()
        threading.Thread(target=self._watch, name="brokertask watchdog", daemon=True).start()

    def tick(self) -> None:
        """Tell that the loop runs."""
        self._ticked = time.monotonic()

    def _watch(self) -> None:
        said = 0.0
        while not self._loop.is_closed():
            time.sleep(CHECK_EVERY)
            ticked = self._ticked
            late = time.monotonic() - ticked
            if late > BLOCKED_AFTER and ticked != said:
                said = ticked
                self._say(late)

    def _say(self, late: float) -> None:
        task = asyncio.current_task(self._loop)
        log.warning(
            "the event loop is blocked for %.1f s by %s%s; every other run of this process waits. "
            "Make that task a plain def, or move the work into asyncio.to_thread",
            late,
            task.get_name() if task else "a callback",
            _place(sys._current_frames().get(self._thread)),
        )


def _place(frame: FrameType | None) -> str:
    """Return where the innermost frame of the user's own code is."""
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_NOT_OF_USERS):
            return f", at {code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
        frame = frame.f_back
    return ""
