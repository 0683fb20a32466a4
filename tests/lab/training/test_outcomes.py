"""Times, medians and spreads of runs, compared with numbers written down."""

import pytest

from prograde.lab.training.outcomes import (
    divergence_text,
    ended_text,
    outcome_of,
    ratio_text,
    spread,
    spread_text,
)

COSTS = {"low-rank": {"seconds": {"median": 2.0}}, "backprop": {"seconds": {"median": 3.0}}}


def run(method, losses, seed=0, status="completed", **end):
    points = [
        {"kind": "point", "step": 10 * i, "test_loss": loss, "test_accuracy": i / 10}
        for i, loss in enumerate(losses)
    ]
    head = {"kind": "run", "seed": seed, "method": method, "learning_rate": 1.0}
    last = {"kind": "end", "status": status, "step": 10 * (len(losses) - 1)}
    return [head, *points, last | end]


BACKPROP = [3.0, 1.0, 0.5, 0.7]  # best 0.5 at step 20: 60 s


def outcome(*losses, reference=BACKPROP):
    runs = [run("low-rank", each, seed) for seed, each in enumerate(losses)]
    references = [run("backprop", reference, seed) for seed in range(len(losses))]
    return outcome_of("low-rank", "paper", runs, references, COSTS)


def test_time_ratio_follows_from_steps_and_measured_costs():
    assert outcome([3.0, 0.5]).time_ratio == pytest.approx(10 * 2 / 60)
    assert outcome([3.0, 2.0, 0.6, 0.5]).time_ratio == pytest.approx(30 * 2 / 60)
    fails = outcome([3.0, 2.0, 0.6, 0.51])
    assert (fails.time_ratio, fails.time_bound) == (None, pytest.approx(1.0))
    assert (fails.reached, fails.compared) == (0, 1)
    assert ratio_text(fails) == "> 1.00 (0 of 1 seeds)"


def test_time_ratio_is_the_median_over_seeds_and_of_two_the_worse():
    at = {n: [3.0] * n + [0.5] for n in (1, 2, 3)}  # reached at step 10 n: T = n / 3
    assert outcome(at[3], at[1], at[2]).time_ratio == pytest.approx(2 / 3)
    assert outcome(at[1], at[1], at[3]).time_ratio == pytest.approx(1 / 3)
    assert outcome(at[1], at[3]).time_ratio == pytest.approx(1.0)
    one_fails = outcome(at[1], [3.0, 2.0])
    assert (one_fails.time_ratio, one_fails.reached) == (None, 1)
    assert outcome(at[1], at[2], [3.0, 2.0]).time_ratio == pytest.approx(2 / 3)


@pytest.mark.parametrize("reference", [[], [1.0, 2.0]])
def test_without_a_better_backprop_there_is_no_verdict(reference):
    """Backprop has not run, or never got better than its start."""
    references = [run("backprop", reference)] if reference else []
    found = outcome_of("low-rank", "paper", [run("low-rank", [3.0, 0.1])], references, COSTS)
    assert found.compared == 0
    assert ratio_text(found) == "–"


def test_final_figures_are_those_of_seeds_that_completed():
    runs = [
        run("low-rank", [3.0, 1.0], 0),
        run("low-rank", [3.0, 2.0, 2.5], 1),
        run("low-rank", [3.0], 2, "diverged", step=7, cause="gradient"),
        run("low-rank", [3.0], 3, "diverged", step=4, cause="value"),
        run("low-rank", [3.0, 2.0], 4)[:-1],  # still running
    ]
    found = outcome_of("low-rank", "paper", runs, [], COSTS)
    assert (found.final_loss.mean, found.final_loss.low, found.final_loss.high) == (1.75, 1.0, 2.5)
    assert found.final_accuracy.mean == pytest.approx(0.15)
    assert (found.finished, found.final_loss.n) == (4, 2)
    assert ended_text(found) == "4 of 5; 2 diverged, first at step 4"
    assert divergence_text(found, "it") == (
        "it diverged in 2 of 4 seeds, first at step 4, where the loss overflowed and the "
        "parameters were finite."
    )


def test_records_without_a_cause_say_none():
    """Those of version 0.1."""
    found = outcome_of("x", "paper", [run("x", [1.0], 0, "diverged", step=3)], [], {})
    assert divergence_text(found, "x") == "x diverged in 1 of 1 seeds, first at step 3."


def test_spreads_are_means_with_least_and_greatest():
    assert spread([]) is None
    assert spread_text(None) == "–"
    assert spread_text(spread([0.25])) == "0.25"
    assert spread_text(spread([1.0, 2.0, 6.0])) == "3 (1 to 6)"
    assert spread_text(spread([0.5, 0.75]), percent=True) == "62.5 % (50.0 to 75.0)"
    assert spread_text(spread([0.5, 0.50001]), percent=True) == "50.0 %"
