"""`brokertask topology`: what an app needs on a broker, compared, made, and checked."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer

from brokertask.app import App
from brokertask.cli import console
from brokertask.cli.broker import AnApp, app_or_stand_in, connected, limits_of
from brokertask.cli.console import Exit, printable
from brokertask.cli.letters import counted
from brokertask.drift import IMMUTABLE, Change, Plan, lacking, observe, plan
from brokertask.errors import TopologyMismatch
from brokertask.lint import LEVELS, Finding, lint
from brokertask.topology import Topology, copies, server

app = typer.Typer(
    help="Compare the exchanges and queues an app needs with the broker; make them; check them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
MARKS = {"error": "[red]✗[/]", "warning": "[yellow]![/]", "note": "[dim]·[/]"}


WithServer = Annotated[bool, typer.Option("--server", help="What `brokertask server` needs, too.")]


@app.command("plan")
def plan_topology(
    spec: AnApp, with_server: WithServer = False, as_json: console.Json = False
) -> None:
    """Say what `apply` would make, and what it cannot change.

    Exit codes: 0 nothing to do, 1 something to make, 6 something differs for good.
    """
    owner = app_or_stand_in(spec)
    found = console.run(lambda: _plan(_wanted(owner, with_server), owner))
    _show_plan(found, as_json=as_json)
    raise typer.Exit(_plan_code(found))


@app.command()
def apply(spec: AnApp, with_server: WithServer = False, as_json: console.Json = False) -> None:
    """Make everything an app needs that is missing; nothing is changed or deleted."""
    owner = app_or_stand_in(spec)
    made, left = console.run(lambda: _apply(_wanted(owner, with_server), owner))
    if as_json:
        fields = {"made": [_named(change) for change in made.missing]}
        console.show_json({**fields, "mismatches": [asdict(one) for one in left.mismatches]})
    else:
        for change in made.missing:
            console.out.print(f"[green]+[/] {change.kind} {change.name}")
        _show_mismatches(left)
        console.out.print(_summary(made.missing, len(left.mismatches), "made"))
    raise typer.Exit(Exit.CONFLICT if left.mismatches else Exit.OK)


@app.command()
def check(
    spec: AnApp,
    offline: Annotated[
        bool, typer.Option("--offline", help="Only what can be told without the broker.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """Check an app's topology by rule, and what is missing or waits on the broker.

    Exit codes: 0 no error among the findings, 1 at least one.
    """
    owner = app_or_stand_in(spec)
    found = lint(owner.topology(), limits_of(owner), owner.settings.names)
    if not offline:
        found += console.run(lambda: _observe(owner))
    if as_json:
        console.show_json([asdict(finding) for finding in found])
    else:
        _show_findings(found)
    broken = any(finding.level == "error" for finding in found)
    raise typer.Exit(Exit.FAILED if broken else Exit.OK)


def _wanted(owner: App, with_server: bool) -> Topology:
    wanted = owner.topology()
    if not with_server:
        return wanted
    more = server(owner.settings.names)
    return replace(
        wanted,
        exchanges=(*wanted.exchanges, *more.exchanges),
        queues=(*wanted.queues, *more.queues),
        bindings=(
            *wanted.bindings,
            *more.bindings,
            *(copies(owner.settings.names, task) for task in owner.tasks),
        ),
    )


async def _plan(wanted: Topology, owner: App) -> Plan:
    async with connected(owner) as transport:
        return await plan(transport, wanted)


async def _apply(wanted: Topology, owner: App) -> tuple[Plan, Plan]:
    """Return what was missing before, and what is wrong afterwards."""
    async with connected(owner) as transport:
        before = await plan(transport, wanted)
        try:
            await transport.declare(wanted)
        except TopologyMismatch:
            return before, await plan(transport, wanted)
        return before, Plan(())


async def _observe(owner: App) -> list[Finding]:
    async with connected(owner) as transport:
        missing = await lacking(transport, owner.topology())
        return missing + await observe(transport, owner.settings.names, limits_of(owner))


def _plan_code(found: Plan) -> Exit:
    if found.mismatches:
        return Exit.CONFLICT
    return Exit.FAILED if found.missing else Exit.OK


def _show_plan(found: Plan, *, as_json: bool) -> None:
    if as_json:
        missing = [_named(change) for change in found.missing]
        console.show_json(
            {"missing": missing, "mismatches": [asdict(one) for one in found.mismatches]}
        )
        return
    for change in found.missing:
        console.out.print(f"[green]+[/] {change.kind} {change.name}")
    _show_mismatches(found)
    console.out.print(_summary(found.missing, len(found.mismatches), "to make"))


def _show_mismatches(found: Plan) -> None:
    for change in found.mismatches:
        found_value, wanted = printable(change.found), printable(change.wanted)
        console.out.print(
            f"[red]≠[/] {change.kind} {change.name}: {printable(change.argument)} is "
            f"{found_value} on the broker, {wanted} in the code"
        )
        console.out.print(f"    why: {IMMUTABLE}")
        console.out.print(f"    fix: {printable(change.fix)}")


def _summary(missing: list[Change], mismatches: int, word: str) -> str:
    if not missing and not mismatches:
        return "the broker has all of it; nothing to do"
    exchanges = sum(change.kind == "exchange" for change in missing)
    return (
        f"{len(missing)} {word} ({counted(exchanges, 'exchange')}, "
        f"{counted(len(missing) - exchanges, 'queue')}), {mismatches} different"
    )


def _show_findings(found: list[Finding]) -> None:
    for finding in found:
        console.out.print(
            f"{MARKS[finding.level]} {printable(finding.where)}: {printable(finding.what)}"
        )
        console.out.print(f"    fix: {printable(finding.fix)}")
    counts = [counted(sum(one.level == level for one in found), level) for level in LEVELS]
    console.out.print(", ".join(counts))


def _named(change: Change) -> dict[str, str]:
    return {"kind": change.kind, "name": change.name}
