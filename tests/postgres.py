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


class Cluster:
    """A cluster in a folder of its own, which may be stopped and started."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self.url = f"postgresql+asyncpg://{USER}@/postgres?host={folder}"
        """Of a database in it, for SQLAlchemy."""

    def start(self) -> None:
        """Start it, and return when it answers."""
        # What is tested is our side of a crash; the disk is trusted.
        options = (
            f"-p {PORT} -k {self._folder} -c listen_addresses= -c max_connections=60 -c fsync=off"
        )
        self._control("start", "-o", options, "-l", self._folder / "log")

    def stop(self) -> None:
        """Stop it as a crash would."""
        self._control("stop", "-m", "immediate")

    def _control(self, *words: object) -> None:
        _run(self._programs / "pg_ctl", "-D", self._folder / "data", "-w", *words)


@contextmanager
def private_cluster() -> Iterator[Cluster]:
    """Start a cluster, and stop it at the end of the block."""
    found = sorted(PROGRAMS.glob("*/bin"))
    if not found:
        raise RuntimeError(f"there is no PostgreSQL below {PROGRAMS}: apt-get install postgresql")
    programs = found[-1]
    # A short name: a socket's path has room for some 100 letters.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    owner = _owner()
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    try:
        _run(programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", USER, "--no-sync")
        cluster = Cluster(programs, folder)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def cluster() -> Iterator[str]:
    """Start a cluster, and give the URL of a database in it, for SQLAlchemy."""
    with private_cluster() as own:
        yield own.url


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
