"""What must cost next to nothing, held to that by the CPU: this machine may be busy."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quickly(limit: float) -> Iterator[None]:
    """Fail if the block takes more seconds of CPU."""
    # To collect what all the tests before have left can take longer by itself.
    gc.disable()
    try:
        since = time.process_time()
        yield
        assert time.process_time() - since < limit
    finally:
        gc.enable()
