"""The search of a learning rate on the validation part, and the spread over seeds."""

import dataclasses
import math
from typing import Any

from jaxtyping import PyTree

from prograde.lab.display import Display
from prograde.lab.store import Store
from prograde.lab.studies.finetune.plan import Plan
from prograde.lab.studies.finetune.steps import POINTS, Parts, begin_again
from prograde.lab.studies.finetune.tuning import Tuning

FACTORS = (1 / 9, 1 / 3, 1.0, 3.0)  # times the default rate
TRIAL_STEPS = 500  # at most
SECONDS = 10.0  # that a trial may take, where nobody asked for a search
REPEAT_SECONDS = 60.0  # that a further run may take, where nobody asked for it
_SEED = 1_000_000  # the seeds of the search are apart from those of the runs


def search(
    tuning: Tuning, start: PyTree, plan: Plan, parts: Parts, store: Store, display: Display
) -> float:
    """Finds the learning rate of least validation loss. The record `rates` holds the trials.

    A trial has `TRIAL_STEPS` steps at most, and a seed of its own; the held-out examples are not
    looked at. One that diverges loses.
    """
    steps = min(plan.steps or 1, TRIAL_STEPS)
    assert parts.validation is not None
    # figures of a trial are those of the validation part: held-out examples decide nothing
    blind = dataclasses.replace(parts, held_out=parts.validation)
    found: dict[str, Any] = {"steps": steps, "seed": plan.seed + _SEED, "trials": []}
    if "rates" in store:
        found = store.read("rates")
    with display.stage("searching the learning rate", len(FACTORS) * steps):
        display.reach(len(found["trials"]) * steps)
        for factor in FACTORS[len(found["trials"]) :]:
            rate = float(f"{factor * plan.default_rate:.3g}")
            trial = dataclasses.replace(plan, rate=rate, steps=steps, seed=found["seed"])
            point, end = begin_again(
                tuning,
                start,
                trial,
                blind,
                4,
                lambda n, loss, rate=rate: display.advance(n, f"rate {rate:g}, loss {loss:.3f}"),
            )
            loss = None if end.status == "diverged" else point["validation_loss"]
            found["trials"].append({"rate": rate, "loss": loss})
            store.write("rates", found)
            display.reach(len(found["trials"]) * steps)
    return best_rate(found["trials"], plan.default_rate)


def best_rate(trials: list[dict[str, Any]], default: float) -> float:
    """The rate of least loss. Trials that diverged lose; if all did, a tenth of the least rate."""
    finite = [t for t in trials if t["loss"] is not None and math.isfinite(t["loss"])]
    if not finite:
        return min((t["rate"] for t in trials), default=default) / 10
    return min(finite, key=lambda trial: trial["loss"])["rate"]


def repeat(
    tuning: Tuning,
    start: PyTree,
    parts: Parts,
    count: int,
    store: Store,
    display: Display,
) -> None:
    """Trains again with the next seeds, on the same split. The record is `repeats`."""
    found = store.read("repeats") if "repeats" in store else []
    plan, steps = tuning.plan, tuning.plan.steps or 1
    with display.stage("the same with other seeds", count * steps):
        display.reach(len(found) * steps)
        for seed in range(plan.seed + 1 + len(found), plan.seed + 1 + count):
            point, end = begin_again(
                tuning,
                start,
                dataclasses.replace(plan, seed=seed),
                parts,
                POINTS,
                lambda n, loss, seed=seed: display.advance(n, f"seed {seed}, loss {loss:.3f}"),
            )
            found.append({"seed": seed, **point, "status": end.status})
            store.write("repeats", found)
            display.reach(len(found) * steps)
