"""Medians, ratios, verdicts, tables and the plot, of samples that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

from tests.bench import report
from tests.bench.__main__ import chosen_cases, missed, parse
from tests.bench.goals import GOALS, Goal
from tests.bench.plot import BARS, Bar, Panel, svg
from tests.bench.results import Results, Spread
from tests.bench.round import Sample

FACTS: Final = report.Facts("2026-01-01", "2 cores", [("Python", "3.11")])
SVG: Final = "{http://www.w3.org/2000/svg}"


def samples(system: str, figure: str, *found: float, case: str = "drain-100") -> list[Sample]:
    return [Sample(case, system, number, {figure: each}) for number, each in enumerate(found)]


def goal(about: str) -> Goal:
    return next(each for each in GOALS if each.about == about)


# --- results ------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    # A noisy second round slows both down: the ratio hardly notices.
    ours = samples("brokertask", "rate", 10_000, 5_000, 12_000)
    results = Results(ours + samples("faststream", "rate", 1_000, 500, 1_500))
    found = goal("drain at concurrency 100, to faststream").found(results)
    assert found == Spread(10, 8, 10)


def test_a_round_without_the_other_side_is_no_ratio() -> None:
    results = Results(
        samples("brokertask", "rate", 10, 20) + samples("faststream", "rate", 1, 2)[1:]
    )
    assert goal("drain at concurrency 100, to faststream").found(results) == Spread(10, 10, 10)


def test_the_best_of_several_peers_counts() -> None:
    results = Results(
        samples("brokertask", "worker", 0.02)
        + samples("brokertask-traced", "rate", 8_000)
        + [
            Sample("drain-100", "taskiq", 0, {"worker": 0.5, "rate": 2_000}),
            Sample("drain-100", "dramatiq", 0, {"worker": 0.4, "rate": 1_000}),
        ]
    )
    cheapest = goal("worker CPU of the best peer to ours").found(results)
    assert cheapest is not None
    assert cheapest.middle == pytest.approx(20)
    traced = goal("drain, each run traced and exported, to the best peer untraced")
    assert traced.found(results) == Spread(4, 4, 4)


def test_beside_it_stands_the_ratio_on_quorum_queues() -> None:
    results = Results(
        samples("brokertask-quorum", "rate", 20_000)
        + samples("c", "rate", 15_000)
        + samples("c-quorum", "rate", 10_000)
    )
    to_c = goal("drain at concurrency 100, to c")
    assert to_c.found(results) is None
    assert to_c.found(results, quorum=True) == Spread(2, 2, 2)


def test_a_later_run_of_a_case_replaces_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "below" / "samples.jsonl"
    Results(samples("c", "rate", 1, 2) + samples("c", "rate", 7, case="flow")).save(path)
    results = Results.load(path)
    results.forget([("drain-100", "c")])
    results.add(*samples("c", "rate", 5))
    assert results.spread("drain-100", "c", "rate") == Spread(5, 5, 5)
    assert results.spread("flow", "c", "rate") == Spread(7, 7, 7)
    assert results.rounds("drain-100") == 1
    assert Results.load(tmp_path / "none").rounds("flow") == 0


# --- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "figure", "ours", "theirs", "verdict"),
    [
        ("drain at concurrency 100, to faststream", "rate", 800, 100, "met"),
        ("drain at concurrency 100, to faststream", "rate", 799, 100, "not met"),
        ("worker CPU, to the C client's", "worker", 0.025, 0.01, "met"),
        ("worker CPU, to the C client's", "worker", 0.026, 0.01, "not met"),
        ("broker CPU of taskiq to ours", "broker", 0.1, 0.31, "met"),
    ],
)
def test_a_verdict_knows_on_which_side_of_a_goal_it_is(
    about: str, figure: str, ours: float, theirs: float, verdict: str
) -> None:
    wanted = goal(about)
    results = Results(
        samples("brokertask", figure, ours) + samples(wanted.theirs[0], figure, theirs)
    )
    assert wanted.verdict(results) == verdict
    assert wanted.verdict(Results()) == "not measured"


def test_what_an_sdk_adds_is_a_difference_in_microseconds() -> None:
    results = Results(
        samples("brokertask", "worker", 0.020) + samples("brokertask-unsampled", "worker", 0.024)
    )
    added = goal("worker CPU that an SDK adds to an unsampled run")
    found = added.found(results)
    assert found is not None
    assert found.middle == pytest.approx(4)
    assert added.verdict(results) == "met"


def test_two_processes_are_excused_by_a_full_machine_only() -> None:
    rates = samples("brokertask", "rate", 100, case="processes-1")
    for share, verdict in (
        (0.95, "the machine is full: 95% of its cores are busy"),
        (0.5, "not met"),
    ):
        two = [Sample("processes-2", "brokertask", 0, {"rate": 120, "share": share})]
        assert goal("two processes, to one").verdict(Results(rates + two)) == verdict


def test_only_processor_time_is_gated() -> None:
    slow = Results(
        samples("brokertask", "rate", 1)
        + samples("faststream", "rate", 100)
        + samples("brokertask", "worker", 1.0)
        + samples("c", "worker", 0.01)
    )
    assert missed(slow) == ["worker CPU, to the C client's"]
    assert missed(Results()) == []


# --- what is written ----------------------------------------------------------------------------


def test_the_page_holds_what_was_measured_and_nothing_else() -> None:
    page = report.page(
        Results(
            samples("brokertask", "rate", 20_000, 22_000, 21_000)
            + samples("faststream", "rate", 2_000, 2_100, 1_900)
        ),
        FACTS,
    )
    assert "21,000 (20,000 to 22,000)" in page
    assert "| drain at concurrency 100, to faststream | at least 8x |" in page
    assert "### Drain, concurrency 100" in page
    assert "### Drain, concurrency 10\n" not in page
    assert "3 rounds" in page


def test_a_table_can_be_read_as_text() -> None:
    lines = report.table(["a", "long head"], [["a long cell", "1"], ["", "22"]]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def test_the_longest_bar_fills_its_panel() -> None:
    bars = [Bar("a < b & c", (50.0, 25.0), own=True), Bar("other", (150.0,))]
    root = ElementTree.fromstring(svg([Panel("Title", "note", bars), Panel("Empty", "", [])]))
    first, second, longest = (float(rect.attrib["width"]) for rect in root.iter(f"{SVG}rect"))
    assert longest == BARS
    assert first == pytest.approx(BARS / 3, abs=0.1)
    assert second == pytest.approx(BARS / 6, abs=0.1)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "a < b & c" in texts
    assert "75" in texts


def test_the_plot_shows_each_system_of_the_main_case() -> None:
    figures = {"rate": 20_000.0, "worker": 0.02, "broker": 0.04}
    results = Results([Sample("drain-100", "brokertask", 0, figures)])
    texts = [text.text for text in ElementTree.fromstring(report.plot(results)).iter(f"{SVG}text")]
    assert texts.count("brokertask") == 2
    assert {"20,000", "60"} <= set(texts)
    assert "taskiq" not in texts


# --- the command line ---------------------------------------------------------------------------


def test_the_short_run_is_a_part_of_the_long_one() -> None:
    whole, short = chosen_cases(parse([])), chosen_cases(parse(["--quick"]))
    assert {case.name for case in short} < {case.name for case in whole}
    for case in short:
        (same,) = [each for each in whole if each.name == case.name]
        assert set(case.systems) < set(same.systems)
        assert case.own_tasks < same.own_tasks


def test_cases_are_chosen_by_group() -> None:
    chosen = chosen_cases(parse(["--cases", "backlog,idle"]))
    assert {case.group for case in chosen} == {"backlog", "idle"}
    (ours,) = chosen_cases(parse(["--cases", "flow", "--systems", "brokertask"]))
    assert ours.systems == ("brokertask",)
    with pytest.raises(SystemExit, match="no nonsense"):
        chosen_cases(parse(["--cases", "nonsense"]))


def test_every_goal_asks_for_something_that_is_measured() -> None:
    measured = {(case.name, system) for case in chosen_cases(parse([])) for system in case.systems}
    for each in GOALS:
        assert (each.case, each.ours) in measured
        assert any((each.other or each.case, name) in measured for name in each.theirs)
