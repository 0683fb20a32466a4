"""The loop of every training run: takes steps to the next point of the curve, and measures there.

A `Task` takes the steps. The loop does not depend on models, estimators or files. It counts steps
and seconds, notices divergence, and calls `save` at every point, so that a run can be resumed.
"""

import abc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Point = dict[str, Any]
"""A point of a curve: `step`, `seconds`, and the figures of the task."""


class Task(abc.ABC):
    """A training task: it takes steps and measures its parameters.

    **Fields:** `judged`: the name of the figure that must be finite, such as the held-out loss.
    """

    judged: str

    @abc.abstractmethod
    def steps(self, first: int, count: int) -> Float[np.ndarray, " count"]:
        """Takes `count` steps from step number `first` on; returns their losses.

        Waits until they are done. May return early if the last loss is not finite.
        """

    @abc.abstractmethod
    def figures(self, losses: Float[np.ndarray, " count"] | None) -> dict[str, Any]:
        """Measures the current parameters.

        `losses` are those of the steps since the last point, or None before the first step.
        """

    def cause(self, taken: int) -> Literal["value", "gradient"] | None:
        """Says why the loss after `taken` steps is not finite.

        The steps count from the start of the last call of `steps`. "value": the parameters are
        finite, and the loss overflows. "gradient": the loss before was finite, and the step made
        parameters that are not finite. None: unknown.
        """
        del taken
        return None

    def culprit(self, taken: int, cause: Literal["value", "gradient"] | None) -> str | None:
        """Names the equation that made the loss or its derivative not finite, with file and line.

        The arguments are those of `cause`, and what it said. None: unknown.
        """
        del taken, cause
        return None


@dataclass
class Progress:
    """The progress of a run. `seconds` is the time of steps, without compilation and evaluation."""

    step: int = 0
    seconds: float = 0.0
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """The end of a run. If it diverged, `step` is the step whose loss is not finite.

    `cause` and `culprit` say why, where the task knows.
    """

    status: Literal["completed", "stopped", "diverged"]
    step: int
    seconds: float
    cause: Literal["value", "gradient"] | None = None
    culprit: str | None = None


def follow(
    task: Task,
    steps: int,
    points: int,
    progress: Progress,
    save: Callable[[Progress, End | None], None],
    stop: Callable[[list[Point]], bool] = lambda points: False,
) -> End:
    """Takes the remaining steps, and appends a point to the curve at `points` even intervals.

    **Arguments:**

    - `progress`: the progress of the run, which is updated. If it has no points, one is measured
      before the first step.
    - `save`: called after every point, and when the run ends.
    - `stop`: decides after every point, from all points so far, whether the run ends there.
    """

    def over() -> End | None:
        if progress.step >= steps:
            return End("completed", progress.step, progress.seconds)
        if stop(progress.points):
            return End("stopped", progress.step, progress.seconds)
        return None

    if not progress.points:
        progress.points.append({"step": 0, "seconds": 0.0, **task.figures(None)})
        save(progress, None)
    elif (end := over()) is not None:
        save(progress, end)
        return end
    interval = math.ceil(steps / points)
    end = None
    while end is None:
        first = progress.step
        count = min(interval - first % interval, steps - first)
        begin = time.perf_counter()
        losses = task.steps(first, count)
        progress.seconds += time.perf_counter() - begin
        finite = np.isfinite(losses)
        figures = task.figures(losses) if finite.all() else {}
        if finite.all() and _is_finite(figures[task.judged]):
            progress.step += count
            point = {"step": progress.step, "seconds": progress.seconds, **figures}
            progress.points.append(point)
            end = over()
        else:  # all losses may be finite when the last step makes parameters that are not
            taken = count if finite.all() else int(np.argmin(finite))
            cause = task.cause(taken)
            culprit = task.culprit(taken, cause)
            end = End("diverged", first + taken, progress.seconds, cause, culprit)
        save(progress, end)
    return end


def best(points: list[Point], figure: str) -> Point:
    """Returns the point with the least finite figure, the first of equals."""
    return min(points, key=lambda p: p[figure] if _is_finite(p.get(figure)) else math.inf)


def points_since_best(points: list[Point], figure: str) -> int:
    """Returns the number of points after the best, to be compared with a patience."""
    return len(points) - 1 - next(i for i, p in enumerate(points) if p is best(points, figure))


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
