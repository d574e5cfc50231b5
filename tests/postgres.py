"""A PostgreSQL of the tests' own: a private cluster on a Unix socket, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PROGRAMS: Final = Path("/usr/lib/postgresql")
PORT: Final = 5432
"""Names the socket only: nothing listens on the network."""
USER: Final = "brokertask"


@contextmanager
def cluster() -> Iterator[str]:
    """Start a cluster, and give the URL of a database in it, for SQLAlchemy."""
    found = sorted(PROGRAMS.glob("*/bin"))
    if not found:
        raise RuntimeError(f"there is no PostgreSQL below {PROGRAMS}: apt-get install postgresql")
    programs = found[-1]
    # A short name: a socket's path has room for some 100 letters.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    owner = _owner()
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    try:
        data = folder / "data"
        _run(programs / "initdb", "-D", data, "-A", "trust", "-U", USER, "--no-sync")
        # What is tested is our side of a crash; the disk is trusted.
        options = f"-p {PORT} -k {folder} -c listen_addresses= -c max_connections=60 -c fsync=off"
        log = folder / "log"
        _run(programs / "pg_ctl", "-D", data, "-o", options, "-l", log, "-w", "start")
        try:
            yield f"postgresql+asyncpg://{USER}@/postgres?host={folder}"
        finally:
            _run(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def _owner() -> pwd.struct_passwd:
    """Return who runs it: PostgreSQL refuses root."""
    return pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())


def _run(*command: object) -> None:
    owner = _owner()
    done = subprocess.run(
        [str(part) for part in command],
        user=owner.pw_uid,
        group=owner.pw_gid,
        extra_groups=[],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout}")
