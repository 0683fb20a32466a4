"""Turns, ratios and spread, compared with numbers written down; and how busy others are."""

import itertools

import pytest
from rich.console import Console

from prograde.lab.display import Display
from prograde.lab.measure import timing
from prograde.lab.report.words import unsteady, warning


@pytest.fixture
def display():
    return Display(Console(quiet=True))


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    # the rounds' ratios are 1, 1/2 and 3; the ratio of the medians would be 4/3
    found = timing.ratio_quartiles([1.0, 4.0, 9.0], [1.0, 8.0, 3.0])
    assert found == {"median": 1.0, "low": 0.75, "high": 2.0, "n": 3}


def test_quartiles():
    found = timing.quartiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found == {"median": 3.0, "low": 2.0, "high": 4.0, "n": 5}


def visits(log, seconds):
    """A visit for each program that takes so many seconds a call, and writes down its calls."""

    def visit(name):
        def run(count):
            log.append((name, count))
            return count * seconds[name]

        return run

    return {name: visit(name) for name in seconds}


def test_each_round_visits_every_program_once_in_an_order_of_its_own(display):
    log, seconds = [], {"a": 0.5, "b": 1.0, "c": 2.0}
    turns = timing.take_turns(visits(log, seconds), 3, display, "test", calls=2)
    assert log[:6] == [("a", 2)] * 2 + [("b", 2)] * 2 + [("c", 2)] * 2
    assert "".join(name for name, _ in log[6:]) == "bcacabbac"
    assert {count for _, count in log} == {2}
    assert turns.seconds == {name: [each] * 3 for name, each in seconds.items()}
    assert turns.calls == dict.fromkeys(seconds, 2)


def test_no_order_is_that_of_the_round_before():
    found = list(itertools.islice(timing.orders(["a", "b", "c"]), 200))
    assert all(sorted(order) == ["a", "b", "c"] for order in found)
    assert all(order != last for last, order in itertools.pairwise(found))
    assert len(set(map(tuple, found))) == 6
    assert list(itertools.islice(timing.orders(["a"]), 2)) == [["a"], ["a"]]


def test_a_summary_compares_with_the_base_round_by_round():
    turns = timing.Turns({"base": [1.0, 2.0, 4.0], "other": [3.0, 2.0, 8.0]}, {}, 0.25)
    summary = turns.summary("base")
    assert summary["base"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    # the rounds' ratios are 3, 1 and 2; the ratio of the medians would be 3/2
    assert summary["other"]["ratio"] == {"median": 2.0, "low": 1.5, "high": 2.5, "n": 3}
    assert summary["other"]["seconds"]["median"] == 3.0
    assert summary["other"]["busy"] == 0.25


def test_a_visit_makes_as_many_calls_as_fill_it(display):
    log = []
    turns = timing.take_turns(visits(log, {"a": 1e-3, "b": 10.0}), 1, display, "test")
    assert turns.calls == {"a": 50, "b": 1}  # of a visit of 0.05 s
    # the first call may compile: it decides nothing
    first = iter([10.0])
    assert timing.calibrated(lambda count: next(first, count * 1e-3)) == 50


def test_others_are_busy_where_the_machine_works_and_this_process_does_not(monkeypatch):
    clock = {"machine": 100.0, "own": 30.0, "now": 0.0}
    monkeypatch.setattr(timing, "_machine", lambda: clock["machine"])
    monkeypatch.setattr(timing, "_own", lambda: clock["own"])
    monkeypatch.setattr(timing, "cores", lambda: 2)
    monkeypatch.setattr(timing.time, "monotonic", lambda: clock["now"])
    watch = timing.Others()
    # in 10 s two cores give 20 s; the machine used 15, of which 9 here
    clock |= {"machine": 115.0, "own": 39.0, "now": 10.0}
    assert watch.busy() == pytest.approx(0.3)
    clock |= {"machine": 108.0}  # clocks are coarse: never below 0
    assert watch.busy() == 0.0


def test_times_of_a_busy_machine_are_not_to_be_trusted():
    assert warning(None) == ""
    assert warning(0.1) == ""
    assert warning(0.31).startswith("Other processes used 31 % of the machine")
    assert "do not trust" in warning(0.31)


def test_figures_whose_quartiles_are_far_apart_are_named():
    steady = {"median": 3.0, "low": 2.6, "high": 3.5}
    wide = {"median": 3.0, "low": 2.4, "high": 3.5}
    assert unsteady({"a": steady}) == ""
    assert unsteady({"a": steady, "b": wide, "c": wide}).startswith(
        "Unsteady from round to round: b and c."
    )
