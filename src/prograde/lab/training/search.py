"""The search of a learning rate, with the same budget for every method."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import PyTree

from prograde.lab.store import Store
from prograde.lab.training.schedules import Rate
from prograde.lab.training.trainer import Trainer

GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0)
TRIALS = len(GRID) + 2
PARTS = 8  # of a trial, which ends after a part if it diverged
_SEED = 1_000_000  # the first seed of the search; the seeds of runs are small


def search(
    trainer: Trainer,
    name: str,
    steps: int,
    store: Store,
    judge: Callable[[PyTree], float],
    on_trial: Callable[[str, int, dict[str, Any]], None],
    seeds: int = 1,
    last: int = 1,
) -> float:
    """Finds the learning rate with the least loss after `steps`, the length of a run.

    The trials are a grid over five decades, then half a decade to either side of its best. Trials
    are as long as a run, because forward gradients often diverge late: shorter trials would choose
    rates that diverge later. A trial that diverges loses. If all diverge, the rate is the first of
    the grid, and the trials in the record `search/NAME` show it.

    **Arguments:** `judge`: the loss of parameters, on data that is neither trained on nor reported;
    `last`: the loss of a trial is the mean over the ends of this many last parts of eight; `seeds`:
    the number of seeds, over which the loss is averaged too.
    """
    found: dict[str, Any] = store.read(f"search/{name}", default={"steps": steps, "trials": []})
    trials: list[dict[str, Any]] = found["trials"]
    while len(trials) < TRIALS:
        if len(trials) < len(GRID):
            rate = GRID[len(trials)]
        else:
            half = -0.5 if len(trials) == len(GRID) else 0.5
            rate = best_rate(trials[: len(GRID)]) * 10**half
        losses = [_trial(trainer, Rate(rate, steps), _SEED + i, judge, last) for i in range(seeds)]
        mean = float(np.mean(losses))  # not finite if one seed diverged
        trials.append({"learning_rate": rate, "loss": mean if math.isfinite(mean) else None})
        store.write(f"search/{name}", {**found, "best": best_rate(trials)})
        on_trial(name, len(trials), trials[-1])
    return best_rate(trials)


def best_rate(trials: list[dict[str, Any]]) -> float:
    """Returns the rate of the least loss, the first of equals. Diverged trials lose."""
    return min(trials, key=lambda t: math.inf if t["loss"] is None else t["loss"])["learning_rate"]


def _trial(
    trainer: Trainer, rate: Rate, seed: int, judge: Callable[[PyTree], float], last: int
) -> float:
    """Runs one trial; returns its loss, which is not finite if it diverged."""
    carry, found, steps = trainer.start(seed), [], int(rate.length)
    chunk = math.ceil(steps / PARTS)
    parts = range(0, steps, chunk)
    for first in parts:
        rows = trainer.rows(seed, first, min(chunk, steps - first))
        carry, losses, _ = trainer.steps(carry, rate, seed, rows)
        if not np.isfinite(np.asarray(losses)).all():
            return math.inf
        if first in parts[-last:]:
            found.append(judge(carry[0]))
    return float(np.mean(found))
