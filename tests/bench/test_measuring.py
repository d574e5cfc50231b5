"""The harness on a real broker, with brokertask alone; and what it does with programs that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from infra.rabbitmq.node import Node
from infra.rabbitmq.process import until
from tests.bench import meter
from tests.bench.__main__ import bench
from tests.bench.case import BY_NAME as CASES
from tests.bench.marks import Marks, Setup
from tests.bench.process import ROOT, BenchError, Program
from tests.bench.producing import Order
from tests.bench.results import Results
from tests.bench.round import measure
from tests.bench.stage import Stage
from tests.bench.system import BY_NAME as SYSTEMS

BURN: Final = "import time\nwhile time.process_time() < 0.5: pass\n"


@pytest.fixture
def stage(rabbitmq_node: Node, tmp_path: Path) -> Iterator[Stage]:
    with Stage(rabbitmq_node, tmp_path) as stage:
        yield stage


# --- measurements -------------------------------------------------------------------------------


def test_a_short_run_measures_and_keeps_what_it_found(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = replace(CASES["drain-100"].quick(), systems=("brokertask",), own_tasks=300)
    samples = tmp_path / "samples.jsonl"
    bench(stage, Results(), [case], rounds=1, samples=samples)
    bench(stage, Results.load(samples), [case], rounds=1, more=True, samples=samples)
    said = capsys.readouterr()
    assert "tasks/s" in said.out
    assert said.err == ""
    found = Results.load(samples)
    assert sorted(found.figures("drain-100", "brokertask", "rate")) == [0, 1]
    for figure in ("rate", "worker", "broker", "resident"):
        spread = found.spread("drain-100", "brokertask", figure)
        assert spread is not None
        assert spread.middle > 0


@pytest.mark.parametrize("system", ["brokertask", "brokertask-quorum"])
def test_a_flow_costs_producer_worker_and_broker(stage: Stage, system: str) -> None:
    figures = measure(stage, replace(CASES["flow"], own_tasks=400), system, 0).figures
    assert min(figures[who] for who in ("producer", "worker", "broker")) > 0


def test_delayed_runs_are_late_by_what_the_ladder_costs(stage: Stage) -> None:
    case = replace(CASES["ladder"], own_tasks=100, retry_after=0.5)
    figures = measure(stage, case, "brokertask", 0).figures
    assert figures["rate"] < 100 / case.retry_after
    # A rung is never early; the clocks of the marks are read a moment before and after.
    assert -5 < figures["p50"] <= figures["p99"]


def test_an_idle_worker_is_weighed(stage: Stage) -> None:
    figures = measure(stage, CASES["idle"], "brokertask", 0).figures
    assert figures["start"] > 0
    assert figures["resident"] >= figures["proportional"] > 1
    assert figures["processes"] == 2  # the supervisor and its child


def test_work_that_was_not_acked_does_not_count(stage: Stage) -> None:
    case = CASES["drain-100"]
    with stage.play(case, SYSTEMS["brokertask"]) as play:
        play.make_marks(5)
        play.fill(5, case.size)
        assert play.left() == 5
        with pytest.raises(BenchError, match="5 messages were left"):
            play.check_acked()


def test_a_worker_that_dies_is_told_of(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASES["drain-100"], systems=("brokertask",), own_tasks=10)
    broken = replace(
        SYSTEMS["brokertask"], worker=lambda _: [sys.executable, "-c", "raise SystemExit('oh no')"]
    )
    monkeypatch.setitem(SYSTEMS, "brokertask", broken)
    results = Results()
    bench(stage, results, [case], rounds=1)
    assert "oh no" in capsys.readouterr().err
    assert results.spread("drain-100", "brokertask", "rate") is None


# --- processes ----------------------------------------------------------------------------------


def test_the_cost_of_a_tree_holds_that_of_what_has_ended() -> None:
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])\ninput()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        eventually(lambda: meter.cpu_seconds(process.pid) > 0.3)
        eventually(lambda: len(list(meter.tree(process.pid))) == 1)
        assert meter.cpu_seconds(process.pid) > 0.3
        process.communicate(b"\n")
    assert meter.cpu_seconds(process.pid) == 0


def test_memory_is_that_of_the_whole_tree() -> None:
    program = "import subprocess; subprocess.run(['sleep', '60'])"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        eventually(lambda: meter.memory(process.pid).processes == 2)
        found = meter.memory(process.pid)
        assert found.resident >= found.proportional > 1_000_000
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_program_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    children = "import subprocess; subprocess.run(['sleep', '60'])"
    with Program([sys.executable, "-c", children], tmp_path / "log", {}) as program:
        eventually(lambda: len(list(meter.tree(program.pid))) == 2)
        pids = list(meter.tree(program.pid))
    eventually(lambda: not any(alive(pid) for pid in pids))


def test_a_program_dies_with_a_harness_that_is_killed(tmp_path: Path) -> None:
    harness = (
        "import sys, time; from pathlib import Path; from tests.bench.process import Program;"
        f"p = Program(['sleep', '60'], Path({str(tmp_path / 'log')!r}), {{}});"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", harness], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    with process:
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    eventually(lambda: not alive(pid))


def test_settings_of_whoever_measures_do_not_reach_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.setenv("BROKERTASK_GRACE", "1")
    counting = "import os; print(sum(n.startswith(('OTEL_', 'BROKER')) for n in os.environ))"
    with Program([sys.executable, "-c", counting], tmp_path / "log", {"GIVEN": "1"}) as program:
        assert program.hear(10) == 0


def test_a_benchmark_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    command = ["-m", "tests.bench", "--quick", "--cases", "flow", "--systems", "brokertask"]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    try:
        eventually(lambda: any("tests.bench.subject:app" in told for told in below(tmp_path)), 100)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
    assert list(below(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


# --- marks and orders ---------------------------------------------------------------------------


def test_marks_are_shared_by_processes(tmp_path: Path) -> None:
    marks = Marks.create(tmp_path / "started", 3)
    setup = Setup(url="", folder=str(tmp_path))
    program = "from tests.bench.marks import Setup; m = Setup.read().started().mark; m(0); m(2)"
    subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | setup.environment() | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert marks.reached() == 1
    assert len(marks.seconds()) == 2
    assert time.monotonic() - 60 < marks[0] <= marks[2] <= time.monotonic()
    marks.mark(1)
    assert marks.reached() == 3


@pytest.mark.parametrize("size", [60, 10_000, 1_000_000])
def test_a_payload_has_the_size_that_was_ordered(size: int) -> None:
    assert len(Order("one", 0, 1, size).name) == size


def alive(pid: int) -> bool:
    """Whether a process lives; one that is dead and not waited for does not."""
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def below(folder: Path) -> Iterator[str]:
    """Return the commands of processes that were given something in a folder."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if str(folder).encode() in told and int(process.name) != os.getpid():
                yield told.decode(errors="replace")


def eventually(condition: Callable[[], bool], timeout: float = 20) -> None:
    """Wait for processes, which tell nobody."""
    until(condition, timeout, "it does not happen")
