#!/usr/bin/env python3
"""Private RabbitMQ nodes, for tests and for a laptop.

A node lives in one folder: configuration, cookie, database, log, pids and ports. It shares nothing
with the system's RabbitMQ, needs no root, listens on loopback only, and is gone with its folder.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

BOOT_TIMEOUT = 120.0  # 7 s on an idle machine; a loaded one needs far more
STOP_TIMEOUT = 60.0
CONFIGURATION = """\
listeners.tcp.default = 127.0.0.1:{port}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management_port}
cluster_name = brokertask-private
disk_free_limit.absolute = 50MB
log.console = false
log.dir = {log}
log.file = rabbit.log
"""


class NodeError(RuntimeError):
    """A node could not do what it was asked; the message ends with what RabbitMQ said."""


@dataclass(frozen=True)
class Process:
    """A process that outlives whoever starts it, found again by the pid in a file."""

    pid_file: Path
    mark: str
    """A setting in its environment: proof that the pid has not passed to a stranger."""

    @property
    def pid(self) -> int | None:
        """The pid, if the process lives."""
        try:
            pid = int(self.pid_file.read_text())
            process = Path(f"/proc/{pid}")
            while not (environment := (process / "environ").read_bytes()):
                if b") Z" in (process / "stat").read_bytes():
                    return None  # dead; its parent has yet to notice
            return pid if self.mark.encode() in environment.split(b"\0") else None
        except (OSError, ValueError):
            return None

    def spawn(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        """Start it as nobody's child, with its pid in the file before this returns."""
        script = 'log=$1 pid_file=$2; shift 2; "$@" </dev/null >>"$log" 2>&1 & echo $! >"$pid_file"'
        subprocess.run(
            ["sh", "-c", script, "sh", str(log), str(self.pid_file), *command],
            env=environment,
            cwd=log.parent,
            start_new_session=True,
            check=True,
        )

    def stop(self, sign: signal.Signals = signal.SIGKILL, timeout: float = 10) -> None:
        """Send a signal and wait for the end."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
            _until(lambda: self.pid is None, timeout, f"process {pid} does not stop")
        self.pid_file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Node:
    """A private RabbitMQ node: `create` it, then `start` it. Calls work from any process."""

    directory: Path
    home: Path
    """Where cookie and epmd's pid are: its own folder, or that of its cluster's first node."""
    name: str
    port: int
    management_port: int
    dist_port: int
    epmd_port: int

    @classmethod
    def create(
        cls, directory: Path | str, *, port: int | None = None, peer: Node | None = None
    ) -> Node:
        """The node of this folder, made the first time. It can join the cluster of its `peer`."""
        directory = Path(directory).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        state = directory / "node.json"
        with _locked(directory):
            if not state.exists():
                _furnish(directory / "home", peer)
                state.write_text(json.dumps(_identity(directory, port, peer), indent=2) + "\n")
            known = json.loads(state.read_text())
        if port not in (None, known["port"]):
            raise NodeError(f"the node in {directory} has port {known['port']}, not {port}")
        return cls(directory, (directory / "home").resolve(), **known)

    # -- life

    @property
    def pid(self) -> int | None:
        """The pid of the node's Erlang machine, or None when it is down."""
        return self._server.pid

    @property
    def running(self) -> bool:
        """Whether the node's process lives; see `wait` for whether it serves."""
        return self.pid is not None

    def start(self) -> Node:
        """Boot and wait until it serves; also the way back after `kill`. Does nothing when up."""
        with _locked(self.home):
            if not self.running:
                self._boot()
        return self.wait()

    def wait(self, timeout: float = BOOT_TIMEOUT) -> Node:
        """Wait until AMQP is served and the boot is complete."""

        def ready() -> bool:
            if not self.running:
                raise NodeError(f"{self.name} stopped while booting:\n{self._last_words()}")
            return _listening(self.port)

        _until(ready, timeout, f"{self.name} does not listen on port {self.port}")
        self.ctl("wait", "--timeout", str(int(timeout)), "--pid", str(self.pid))
        return self

    def stop(self, *, final: bool = False) -> None:
        """Shut down in order. `final` also stops its epmd, so that no process is left."""
        self._server.stop(signal.SIGTERM, STOP_TIMEOUT)
        if final and self.home.parent == self.directory:  # in a cluster the first node has it
            self._epmd.stop()

    def kill(self) -> None:
        """SIGKILL, as a power cut would be: nothing is flushed, nobody told. `start` comes back."""
        self._server.stop()

    def destroy(self) -> None:
        """Kill it and delete its folder; of a cluster, the first node last."""
        self.kill()
        self.stop(final=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- control

    def url(self, vhost: str = "/") -> str:
        """The AMQP URL of a virtual host."""
        path = "" if vhost == "/" else quote(vhost, safe="")
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{path}"

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl`: it can do everything, but takes half a second. `api` is quick."""
        if not self.running:  # rabbitmqctl would leave an epmd of its own behind
            raise NodeError(f"{self.name} is not running")
        command = [str(ensure_installed() / "rabbitmqctl"), "-q", *arguments]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True)
        if done.returncode:
            raise NodeError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr}{done.stdout}")
        return done.stdout

    def eval(self, expression: str) -> str:
        """Evaluate Erlang in the node."""
        return self.ctl("eval", expression).strip()

    def api(self, method: str, path: str, body: object = None) -> Any:
        """Ask the management API, as in `api("GET", "/api/queues/my-vhost")`."""
        url = f"http://127.0.0.1:{self.management_port}{path}"
        credentials = base64.b64encode(b"guest:guest").decode()
        headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({})
        )  # whatever $http_proxy
        try:
            with direct.open(request, timeout=30) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            raise NodeError(f"{method} {path}: {error.code} {said}") from error
        except OSError as error:
            raise NodeError(f"{method} {path}: {error}") from error
        return json.loads(content) if content else None

    def add_vhost(self, name: str) -> str:
        """Make a virtual host that guest may use, and return its URL. It takes some 20 ms."""
        vhost, everything = (
            quote(name, safe=""),
            dict.fromkeys(("configure", "write", "read"), ".*"),
        )
        self.api("PUT", f"/api/vhosts/{vhost}", {})
        self.api("PUT", f"/api/permissions/{vhost}/guest", everything)
        return self.url(name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all it holds; its connections are closed."""
        self.api("DELETE", f"/api/vhosts/{quote(name, safe='')}")

    def set_memory_alarm(self, on: bool) -> None:
        """Raise or clear the memory alarm: while it is up, publishing connections are not read."""
        self.ctl("set_vm_memory_high_watermark", *(("absolute", "1") if on else ("0.4",)))

    def close_connections(self, reason: str = "closed by a test") -> None:
        """Close every client connection from the broker's side."""
        self.ctl("close_all_connections", "--global", reason)

    def set_consumer_timeout(self, seconds: float | None) -> None:
        """How long new channels may leave a delivery unacked; None is RabbitMQ's 30 minutes.

        A channel looks at the clock once a tick, by default a minute: that is shortened, too.
        """
        timeout, tick = (1_800_000, 60_000) if seconds is None else (int(seconds * 1000), 1_000)
        self.eval(
            f"application:set_env(rabbit, consumer_timeout, {timeout}),"
            f"application:set_env(rabbit, channel_tick_interval, {tick})."
        )

    # -- inside

    @property
    def _server(self) -> Process:
        return Process(self.directory / "node.pid", f"RABBITMQ_NODENAME={self.name}")

    @property
    def _epmd(self) -> Process:
        return Process(self.home / "epmd.pid", f"ERL_EPMD_PORT={self.epmd_port}")

    @property
    def _log(self) -> Path:
        return self.directory / "log"

    def _boot(self) -> None:
        self._log.mkdir(exist_ok=True)
        settings = {"port": self.port, "management_port": self.management_port, "log": self._log}
        (self.directory / "rabbitmq.conf").write_text(CONFIGURATION.format(**settings))
        (self.directory / "enabled_plugins").write_text("[rabbitmq_management].\n")
        environment = self._environment()
        if self._epmd.pid is None:  # left to Erlang, nobody would know its pid
            self._epmd.spawn([_epmd_program()], environment, self._log / "epmd.log")
            _until(lambda: _listening(self.epmd_port), 10, "epmd does not start")
        # ALLOW_INPUT lets the script exec Erlang: the pid is known before anything can fail.
        server = [str(ensure_installed() / "rabbitmq-server"), "-noinput"]
        self._server.spawn(server, environment, self._log / "boot.log")

    def _environment(self) -> dict[str, str]:
        foreign = ("RABBITMQ_", "ERL_")  # the settings of another broker must not leak in
        # Erlang's distribution would listen on every address.
        loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        return {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | {
            "HOME": str(self.home),
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_CRASH_DUMP": str(self._log / "erl_crash.dump"),
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback,
            "RABBITMQ_CTL_ERL_ARGS": loopback,
            "RABBITMQ_CTL_DIST_PORT_MIN": "20000",  # the first free one
            "RABBITMQ_CTL_DIST_PORT_MAX": "29999",
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._log),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq"),
            # Neither exists: they keep the files in /etc/rabbitmq out.
            "RABBITMQ_CONFIG_FILES": str(self.directory / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.directory / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
        }

    def _last_words(self) -> str:
        logs = (self._log / name for name in ("boot.log", "rabbit.log"))
        lines = [log.read_text(errors="replace").splitlines()[-15:] for log in logs if log.exists()]
        return "\n".join(line for tail in lines for line in tail)


def cluster(directory: Path | str, size: int = 3) -> list[Node]:
    """Start the nodes of a cluster below this folder, and join them the first time."""
    first = Node.create(Path(directory) / "1")
    rest = [Node.create(Path(directory) / str(n), peer=first) for n in range(2, size + 1)]
    with ThreadPoolExecutor(size) as threads:  # together: after a full stop each waits for all
        list(threads.map(Node.start, [first, *rest]))
    members = {member["name"] for member in first.api("GET", "/api/nodes")}
    for node in rest:
        if node.name not in members:
            for step in (["stop_app"], ["reset"], ["join_cluster", first.name], ["start_app"]):
                node.ctl(*step)
    return [first, *rest]


def programs() -> Path | None:
    """The folder of RabbitMQ's scripts; not the wrappers in /usr/sbin, which change the user."""
    return max(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"), default=None)


def ensure_installed() -> Path:
    """Install RabbitMQ if it is missing; an error is one sentence that says what to do."""
    setup = Path(__file__).resolve().parents[1] / "setup.sh"
    if programs() is None:
        subprocess.run(["sh", str(setup), "packages", "rabbitmq-server"], stdout=sys.stderr)
    if (folder := programs()) is None:
        raise NodeError("RabbitMQ is missing here: install rabbitmq-server, docker or podman.")
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _furnish(home: Path, peer: Node | None) -> None:
    if peer:
        home.unlink(missing_ok=True)
        home.symlink_to(os.path.relpath(peer.home, home.parent))
        return
    home.mkdir(exist_ok=True)
    cookie = home / ".erlang.cookie"
    cookie.unlink(missing_ok=True)
    cookie.write_text(os.urandom(16).hex())
    cookie.chmod(0o400)  # Erlang refuses one that others could read


def _identity(directory: Path, port: int | None, peer: Node | None) -> dict[str, str | int]:
    amqp, management, dist, epmd = _free_ports(4)
    return {
        "name": f"brokertask-{hashlib.sha256(bytes(directory)).hexdigest()[:8]}@localhost",
        "port": port or amqp,
        "management_port": management,
        "dist_port": dist,
        "epmd_port": peer.epmd_port if peer else epmd,
    }


def _epmd_program() -> str:
    beside_erlang = sorted(str(path) for path in Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))
    return shutil.which("epmd") or beside_erlang[-1]


def _free_ports(count: int) -> list[int]:
    """Free ports below the ephemeral range.

    From that range a client that looks for a stopped node can be given the node's own port, and
    then keep the node from coming back.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(10_000, 19_999)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


def _listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _until(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise NodeError(f"{complaint} (waited {timeout:.0f} s)")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from infra.rabbitmq.cli import main

    main()
