"""The command line of `node.py`: `python infra/rabbitmq/node.py up`."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.rabbitmq.installation import RELEASES, Installation, NodeError
from infra.rabbitmq.node import Node, cluster

IMAGE = "rabbitmq:4-management"


def _container(node: Node, *, up: bool) -> bool:
    """Start or remove a container on the node's ports; False if no container engine answers."""
    engines = (engine for engine in ("docker", "podman") if shutil.which(engine))
    engine = next((engine for engine in engines if _run(engine, "info")), None)
    if engine is None:
        return False
    name = node.name.partition("@")[0]
    if not up:
        return _run(engine, "rm", "--force", name)
    published = {node.port: 5672, node.management_port: 15672}
    ports = [f"--publish=127.0.0.1:{here}:{inside}" for here, inside in published.items()]
    if not _run(engine, "container", "inspect", name):
        subprocess.run(
            [engine, "run", "--detach", "--rm", f"--name={name}", *ports, IMAGE],
            stdout=sys.stderr,
            check=False,
        )
    return _run(engine, "exec", name, "rabbitmqctl", "await_startup")


def _run(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def main() -> None:
    """The command line: the answer goes to standard output, everything else to standard error."""
    common = argparse.ArgumentParser(add_help=False)
    default = Path(".brokertask/rabbitmq")
    common.add_argument("--dir", type=Path, default=default, help=f"its folder ({default})")
    parser = argparse.ArgumentParser(description="Private RabbitMQ nodes on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, purpose: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=purpose, description=purpose)

    up = command("up", "start the node and print its AMQP URL")
    up.add_argument("--port", type=int)
    command("find", "print BROKERTASK_AMQP_URL, else what listens on 5672, else do `up`")
    command("down", "stop it in order; its data stays in the folder")
    command("kill", "stop it with SIGKILL")
    command("status", "say whether it runs")
    command("url", "print its AMQP URL")
    command("ctl", "run rabbitmqctl, as in: ctl -- list_queues").add_argument("words", nargs="*")
    several = command("cluster", "three nodes")
    several.add_argument("action", choices=["up", "down"])
    releases = f"of another RabbitMQ: {' or '.join(RELEASES)} (as root; made in the user's cache)"
    for making in (up, several):
        making.add_argument("--release", type=Installation.of, help=releases)
    try:
        if answer := _answer(parser.parse_args()):
            print(answer)
    except NodeError as error:
        sys.exit(str(error))


def _answer(options: argparse.Namespace) -> str:
    folder: Path = options.dir
    if options.command == "find" and (url := _found()):
        return url
    installation: Installation | None = getattr(options, "release", None)
    if options.command in ("up", "find"):
        port: int | None = getattr(options, "port", None)
        return _up(Node.create(folder, port=port, installation=installation))
    if options.command == "cluster":
        return _cluster(folder / "cluster", options.action, installation)
    if not (folder / "node.json").exists():
        if options.command == "down":
            return ""
        raise NodeError(f"there is no node in {folder}; `up` makes one")
    node = Node.create(folder)
    match options.command:
        case "down":
            return _down(node)
        case "kill":
            node.kill()
            return ""
        case "ctl":
            return node.ctl(*options.words).rstrip()
        case "status":
            return _status(node)
        case _:
            return node.url()


def _found() -> str | None:
    """Return the URL of a broker that is there already."""
    if url := os.environ.get("BROKERTASK_AMQP_URL"):
        return url
    try:
        socket.create_connection(("127.0.0.1", 5672), timeout=1).close()
    except OSError:
        return None
    return "amqp://guest:guest@127.0.0.1:5672/"


def _up(node: Node) -> str:
    try:
        node.installation.ensure()
    except NodeError:
        if not (node.installation.own and _container(node, up=True)):
            raise
    else:
        node.start()
    return node.url()


def _down(node: Node) -> str:
    node.stop(final=True)
    if node.installation.own and node.installation.version is None:
        _container(node, up=False)
    return ""


def _status(node: Node) -> str:
    if not node.running:
        raise NodeError(f"{node.name} is stopped")
    return f"{node.name} runs with pid {node.pid} at {node.url()}"


def _cluster(folder: Path, action: str, installation: Installation | None) -> str:
    if action == "up":
        return "\n".join(node.url() for node in cluster(folder, installation=installation))
    nodes = [Node.create(state.parent) for state in sorted(folder.glob("*/node.json"))]
    with ThreadPoolExecutor() as threads:
        list(threads.map(Node.stop, nodes))
    for node in nodes[:1]:
        node.stop(final=True)
    return ""
