#!/usr/bin/env python3
"""Private RabbitMQ nodes, for tests and for a laptop.

A node lives in one folder: configuration, cookie, database, log, pids and ports. It shares nothing
with the system's RabbitMQ but the programs, listens on loopback only, and is gone with its folder.
It needs no root, but for another release of RabbitMQ; see `installation`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.rabbitmq.installation import Installation, NodeError, locked
from infra.rabbitmq.process import Process, until

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
    installation: Installation

    @classmethod
    def create(
        cls,
        directory: Path | str,
        *,
        port: int | None = None,
        peer: Node | None = None,
        installation: Installation | None = None,
    ) -> Node:
        """The node of this folder, made the first time. It can join the cluster of its `peer`.

        A new one has its peer's installation by default, or the one that is chosen for tests.
        """
        directory = Path(directory).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        state = directory / "node.json"
        with locked(directory):
            if not state.exists():
                _furnish(directory / "home", peer)
                identity = _identity(directory, port, peer, installation)
                state.write_text(json.dumps(identity, indent=2) + "\n")
            known = json.loads(state.read_text())
        programs = Installation(Path(known.pop("root", "/")))
        if port not in (None, known["port"]):
            raise NodeError(f"the node in {directory} has port {known['port']}, not {port}")
        if installation not in (None, programs):
            raise NodeError(f"the node in {directory} is of {programs}, not {installation}")
        return cls(directory, (directory / "home").resolve(), **known, installation=programs)

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
        with locked(self.home):
            if not self.running:
                self._boot()
        return self.wait()

    def wait(self, timeout: float = BOOT_TIMEOUT) -> Node:
        """Wait until AMQP is served and the boot is complete."""

        def ready() -> bool:
            if not self.running:
                raise NodeError(f"{self.name} stopped while booting:\n{self._last_words()}")
            return _listening(self.port)

        until(ready, timeout, f"{self.name} does not listen on port {self.port}")
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
        command = self._command("rabbitmqctl", "-q", *arguments)
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
            self._epmd.spawn(self._command("epmd"), environment, self._log / "epmd.log")
            until(lambda: _listening(self.epmd_port), 10, "epmd does not start")
        # ALLOW_INPUT lets the script exec Erlang: the pid is known before anything can fail.
        server = self._command("rabbitmq-server", "-noinput")
        self._server.spawn(server, environment, self._log / "boot.log")

    def _command(self, program: str, *arguments: str) -> list[str]:
        folders = (self.directory, self.home)
        return self.installation.ensure().command(program, *arguments, folders=folders)

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


def cluster(
    directory: Path | str, size: int = 3, *, installation: Installation | None = None
) -> list[Node]:
    """Start the nodes of a cluster below this folder, and join them the first time."""
    first = Node.create(Path(directory) / "1", installation=installation)
    rest = [Node.create(Path(directory) / str(n), peer=first) for n in range(2, size + 1)]
    with ThreadPoolExecutor(size) as threads:  # together: after a full stop each waits for all
        list(threads.map(Node.start, [first, *rest]))
    members = {member["name"] for member in first.api("GET", "/api/nodes")}
    for node in rest:
        if node.name not in members:
            for step in (["stop_app"], ["reset"], ["join_cluster", first.name], ["start_app"]):
                node.ctl(*step)
    return [first, *rest]


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


def _identity(
    directory: Path, port: int | None, peer: Node | None, installation: Installation | None
) -> dict[str, str | int]:
    programs = installation or (peer.installation if peer else Installation.chosen())
    amqp, management, dist, epmd = _free_ports(4)
    return {
        "name": f"brokertask-{hashlib.sha256(bytes(directory)).hexdigest()[:8]}@localhost",
        "port": port or amqp,
        "management_port": management,
        "dist_port": dist,
        "epmd_port": peer.epmd_port if peer else epmd,
        "root": str(programs.root),
    }


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


if __name__ == "__main__":
    from infra.rabbitmq.cli import main

    main()
