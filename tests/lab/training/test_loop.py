"""The loop counts steps and points, stops early where it should, and tells why a run diverged."""

import math

import numpy as np
import pytest

from prograde.lab.training.loop import Progress, Task, best, follow, points_since_best


class Counted(Task):
    """The loss of step t is t; the figure of a point is given by the step it comes after."""

    judged = "loss"

    def __init__(self, figures=None, bad=None):
        self.taken, self.measured, self.causes = [], [], []
        self._figures, self._bad, self._step = figures or {}, bad, 0

    def steps(self, first, count):
        self.taken.append((first, count))
        self._step = first + count
        losses = np.arange(first, first + count, dtype=float)
        losses[losses == self._bad] = math.nan
        return losses

    def figures(self, losses):
        self.measured.append(None if losses is None else losses.tolist())
        return {"loss": self._figures.get(self._step, 1.0)}

    def cause(self, taken):
        self.causes.append(taken)
        return "value"

    def culprit(self, taken, cause):
        return f"{cause} after {taken}"


def run(task, steps, points, progress=None, **options):
    saved = []
    progress = progress or Progress()
    end = follow(
        task,
        steps,
        points,
        progress,
        lambda p, e: saved.append((p.step, len(p.points), e and e.status)),
        **options,
    )
    return end, progress, saved


@pytest.mark.parametrize(
    ("steps", "points", "taken"),
    [
        (10, 5, [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2)]),
        (10, 4, [(0, 3), (3, 3), (6, 3), (9, 1)]),
        (3, 12, [(0, 1), (1, 1), (2, 1)]),
        (5, 1, [(0, 5)]),
    ],
)
def test_points_stand_at_even_places_and_every_step_is_taken_once(steps, points, taken):
    task = Counted()
    end, progress, saved = run(task, steps, points)
    assert task.taken == taken
    assert [p["step"] for p in progress.points] == [0, *(a + n for a, n in taken)]
    assert task.measured == [None, *([float(t) for t in range(a, a + n)] for a, n in taken)]
    assert (end.status, end.step, end.cause) == ("completed", steps, None)
    assert saved == [
        (p["step"], i + 1, "completed" if p["step"] == steps else None)
        for i, p in enumerate(progress.points)
    ]


@pytest.mark.parametrize(
    ("done", "taken"), [(4, [(4, 2), (6, 3), (9, 1)]), (9, [(9, 1)]), (10, [])]
)
def test_a_run_goes_on_between_points_to_the_next_one(done, taken):
    """A log may hold steps after the last point."""
    task = Counted()
    old = [{"step": s, "seconds": 1.0, "loss": 1.0} for s in (0, 3, 6, 9) if s <= done]
    end, progress, _ = run(task, 10, 4, Progress(done, 5.0, old))
    assert task.taken == taken
    assert None not in task.measured  # the point before the first step is there already
    assert (end.status, end.step) == ("completed", 10)
    assert progress.seconds >= 5.0


@pytest.mark.parametrize("patience", [1, 2, 3, 6])
@pytest.mark.parametrize("turn", [0, 2, 5])
def test_early_stopping_waits_for_exactly_so_many_points(patience, turn):
    """The figure falls until the point `turn` and is level from there."""
    task = Counted({step: -min(step, turn) for step in range(21)})
    stop = lambda points: points_since_best(points, "loss") >= patience
    end, progress, _ = run(task, 20, 20, stop=stop)
    assert (end.status, end.step) == ("stopped", turn + patience)
    assert best(progress.points, "loss")["step"] == turn
    again = Counted()  # resumed after it was over: nothing runs
    assert run(again, 20, 20, progress, stop=stop)[0] == end
    assert again.taken == []


def test_a_figure_that_is_not_finite_is_never_the_best():
    points = [
        {"step": i, "loss": v} for i, v in enumerate([math.nan, 3.0, 2.0, None, 2.0, -math.inf])
    ]
    assert best(points, "loss")["step"] == 2
    assert points_since_best(points, "loss") == 3
    assert best(points[:1], "loss")["step"] == 0


@pytest.mark.parametrize(("bad", "taken"), [(0, 0), (4, 1), (5, 2), (9, 0)])
def test_divergence_ends_a_run_at_its_step(bad, taken):
    """`cause` is asked about the step of the chunk that failed. The point of it is not kept."""
    task = Counted(bad=bad)
    end, progress, saved = run(task, 10, 4)
    assert (end.status, end.step, end.cause) == ("diverged", bad, "value")
    assert end.culprit == f"value after {taken}"
    assert task.causes == [taken]
    assert all(p["step"] <= bad for p in progress.points)
    assert saved[-1][2] == "diverged"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_the_last_step_ruined_are_noticed_by_the_figure(value):
    task = Counted({6: value})
    end, progress, _ = run(task, 10, 4)
    assert (end.status, end.step) == ("diverged", 6)
    assert task.causes == [3]
    assert [p["step"] for p in progress.points] == [0, 3]
