"""Style sheets, scripts and pictures of the console: read once, under a name that tells of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Final

from starlette.responses import Response

from brokertask.server.api.problems import Problem
from brokertask.statuses import STATUSES

KINDS: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
FOREVER: Final = "public, max-age=31536000, immutable"


class Static:
    """The files, all in memory.

    Attributes:
        version: Changes with any of them: it is in their addresses, so that browsers keep them.
    """

    def __init__(self) -> None:
        self._files = _read()
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(name.encode() + b"\0" + content + b"\0")
        self.version = digest.hexdigest()[:16]

    def response(self, version: str, name: str) -> Response:
        """Return the answer with a file.

        Raises:
            Problem: There is none of this name.
        """
        content = self._files.get(name)
        if content is None:
            raise Problem("not_found", "there is no such file")
        kept = FOREVER if version == self.version else "no-store"
        kind = KINDS[name.rpartition(".")[2]]
        return Response(content, media_type=kind, headers={"cache-control": kept})


def _read() -> Mapping[str, bytes]:
    folder = files("brokertask.server.console") / "static"
    found = {each.name: each.read_bytes() for each in folder.iterdir()}
    found["statuses.css"] = _statuses()
    return dict(sorted(found.items()))


def _statuses() -> bytes:
    rules = (
        f".status-{each.name} {{ --status: light-dark({each.light}, {each.dark}); }}\n"
        for each in STATUSES.values()
    )
    return "".join(rules).encode()
