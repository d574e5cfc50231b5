"""RabbitMQ's programs: those of this machine, or of another release in a chroot.

A release is a minimal Debian that has it, in the user's cache. What runs in it sees that Debian and
the folders it works on: these are mounted for each program alone, so that the mounts are gone with
it, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

RELEASES = {"4.0": "trixie", "4.3": "forky"}
"""Releases of RabbitMQ, and the Debian of each."""
VARIABLE = "BROKERTASK_TEST_RELEASE"
MIRROR = "http://deb.debian.org/debian"
SCRIPT = Path("/usr/share/debootstrap/scripts/sid")  # right for a Debian that it does not know yet
PLACES = ("usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin", "usr/lib*/erlang/erts-*/bin")
"""Of the programs; RabbitMQ's in /usr/sbin are wrappers, which change the user."""
ENTER = """\
root=$1
shift
while [ "$1" != -- ]; do
    [ -e "$root$1" ] || mkdir -p "$root$1"
    mount --rbind "$1" "$root$1"
    shift
done
shift
exec chroot "$root" "$@"
"""


class NodeError(RuntimeError):
    """A node could not do what it was asked; the message ends with what RabbitMQ said."""


@dataclass(frozen=True)
class Installation:
    """RabbitMQ as it is installed below a root; by default this machine's own."""

    root: Path = Path("/")

    @classmethod
    def of(cls, release: str) -> Installation:
        """That of a release, such as "4.3", below $XDG_CACHE_HOME or ~/.cache."""
        if release not in RELEASES:
            raise NodeError(f"there is no RabbitMQ {release} here, only {' and '.join(RELEASES)}")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(cache.resolve() / "brokertask" / "rabbitmq" / release)

    @classmethod
    def chosen(cls) -> Installation:
        """That of the release in BROKERTASK_TEST_RELEASE, or else this machine's own."""
        release = os.environ.get(VARIABLE)
        return cls.of(release) if release else cls()

    @property
    def own(self) -> bool:
        """Whether it is this machine's own."""
        return self == Installation()

    @property
    def version(self) -> str | None:
        """Its version, such as "4.3.6", if it is there."""
        found = self._find("rabbitmq-server")
        return None if found is None else found.parents[1].name.partition("-")[2]

    def __str__(self) -> str:
        return "this machine's RabbitMQ" if self.own else f"RabbitMQ {self.root.name}"

    def ensure(self) -> Installation:
        """Install it if it is missing; an error is one sentence that says what to do."""
        if not self.own and os.geteuid():
            raise NodeError(f"{self} is run in a chroot, which takes root: do this as root")
        if self.version is None:
            if self.own:
                _install("rabbitmq-server")
            else:
                self._bootstrap()
        if self.version is None:
            raise NodeError("RabbitMQ is missing here: install rabbitmq-server, docker or podman.")
        return self

    def command(self, program: str, *arguments: str, folders: Iterable[Path]) -> list[str]:
        """The command that runs a program of RabbitMQ or Erlang, which works on these folders."""
        path = self._find(program)
        if path is None:
            raise NodeError(f"{self} has no {program} below {self.root}")
        words = [f"/{path.relative_to(self.root)}", *arguments]
        if self.own:
            return words
        seen = ["/proc", *map(str, folders)]
        return ["unshare", "--mount", "sh", "-ec", ENTER, "sh", str(self.root), *seen, "--", *words]

    def _find(self, program: str) -> Path | None:
        found = (path for place in PLACES for path in self.root.glob(f"{place}/{program}"))
        return max(found, default=None)

    def _bootstrap(self) -> None:
        release, cache = self.root.name, self.root.parent
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache):
            if self.version is not None:
                return  # another process was quicker
            print(f"Making {self.root} (one or two minutes, once)", file=sys.stderr)
            begun = Installation(cache / f"{release}.begun")
            shutil.rmtree(begun.root, ignore_errors=True)
            _debootstrap(RELEASES[release], begun.root, cache / f"{release}.log")
            if not (version := begun.version or "").startswith(f"{release}."):
                raise NodeError(
                    f"Debian {RELEASES[release]} has RabbitMQ {version} now, not {release}: "
                    f"mend RELEASES in {__file__}"
                )
            begun.root.rename(self.root)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out meanwhile."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _debootstrap(suite: str, root: Path, log: Path) -> None:
    if not SCRIPT.exists():
        _install("debootstrap")
    options = ["--variant=minbase", "--include=rabbitmq-server", "--force-check-gpg"]
    command = ["unshare", "--mount", "debootstrap", *options, suite, str(root), MIRROR, str(SCRIPT)]
    with log.open("w") as output:
        try:
            subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = log.read_text(errors="replace")[-1000:]
            raise NodeError(f"Debian {suite} cannot be made: {error}\n{said}") from error
    shutil.copy("/etc/hosts", root / "etc/hosts")  # without it Erlang does not find localhost


def _install(package: str) -> None:
    setup = Path(__file__).resolve().parents[1] / "setup.sh"
    subprocess.run(["sh", str(setup), "packages", package], stdout=sys.stderr)
