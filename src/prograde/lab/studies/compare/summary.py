"""The records of `prograde compare`, read back: costs, diagnoses, curves, losses at equal time."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prograde.lab.store import RecordError, Store
from prograde.lab.studies.compare.estimators import MODELS, SAME_GRADIENT, Entry
from prograde.lab.studies.compare.plan import SCHEDULES
from prograde.lab.training.outcomes import Outcome, Record, Spread, outcome_of, points, spread


@dataclass(frozen=True)
class Result:
    """The costs and results of an entry.

    `trials` are those of its search. `runs` are those of `backprop` if the gradient is the same.
    """

    entry: Entry
    cost: dict[str, Any]
    diagnosis: dict[str, Any]
    trials: list[dict[str, Any]]
    runs: list[Record]
    outcome: Outcome | None
    at_equal_time: Spread | None

    @property
    def seconds(self) -> float:
        """The median time of a step."""
        return self.cost["seconds"]["median"]

    @property
    def at_edge(self) -> bool:
        """True if the best rate is the least or the greatest that was tried."""
        rates = [trial["learning_rate"] for trial in self.trials]
        return (
            self.outcome is not None
            and bool(rates)
            and self.outcome.learning_rate in (min(rates), max(rates))
        )


@dataclass(frozen=True)
class Comparison:
    """The records of one comparison. `equal_seconds` is the time of the shortest run."""

    name: str
    manifest: dict[str, Any]
    costs: dict[str, Any]
    results: list[Result]
    steps: int
    equal_seconds: float

    @property
    def trained(self) -> list[Result]:
        """The results with their own runs."""
        names = self.manifest["config"]["estimators"]
        return [r for r in self.results if SAME_GRADIENT.get(r.entry.estimator) not in names]

    @property
    def falls_to_zero(self) -> bool:
        """True if the rate falls to zero, so that a part of a run is not a shorter run."""
        return self.manifest["config"]["schedule"] == SCHEDULES["cosine"]

    @property
    def title(self) -> str:
        """The model and its data."""
        config = self.manifest["config"]
        return f"{MODELS[config['model']].title}, {config['data']['name']}"

    def label(self, entry: Entry) -> str:
        """The estimator, and the optimizer if there are several."""
        several = len(self.manifest["config"]["optimizers"]) > 1
        return f"{entry.estimator}, {entry.optimizer}" if several else entry.estimator


def read(store: Store) -> Comparison:
    """Reads the comparison in a store.

    **Errors:** `RecordError` if it was stopped before anything was trained.
    """
    manifest = store.manifest
    config = manifest["config"]
    if "length" not in store:
        raise RecordError(
            f"{store.directory}: nothing was trained yet. "
            f"Continue it with --out {store.directory} --resume."
        )
    steps, costs = store.read("length")["steps"], store.read("costs")
    entries = [
        Entry(e, optimizer) for optimizer in config["optimizers"] for e in config["estimators"]
    ]
    equal_seconds = steps * min(costs[e.name]["seconds"]["median"] for e in entries)
    results = [_result(store, e, config, costs, equal_seconds) for e in entries]
    name = store.directory.resolve().name
    return Comparison(name, manifest, costs, results, steps, equal_seconds)


def _result(
    store: Store, entry: Entry, config: dict, costs: dict[str, Any], equal_seconds: float
) -> Result:
    twin = SAME_GRADIENT.get(entry.estimator, "")
    trained = Entry(twin, entry.optimizer) if twin in config["estimators"] else entry
    runs, reference = _runs(store, trained), _runs(store, Entry("backprop", entry.optimizer))
    cost = costs[entry.name]
    # the reference of T: the fastest of those with the gradient of backprop
    exact = [Entry(e, entry.optimizer).name for e in ("backprop", *SAME_GRADIENT)]
    fastest = min(
        (costs[e] for e in exact if e in costs), key=lambda c: c["seconds"]["median"], default=None
    )
    both = {entry.name: cost, "backprop": fastest}
    outcome = outcome_of(entry.name, entry.optimizer, runs, reference, both) if runs else None
    at_equal_time = [_loss_at(run, equal_seconds / cost["seconds"]["median"]) for run in runs]
    return Result(
        entry,
        cost,
        store.read(f"diagnosis/{entry.estimator}"),
        store.read(f"search/{trained.name}", default={"trials": []})["trials"],
        runs,
        outcome,
        spread([loss for loss in at_equal_time if loss is not None]),
    )


def _runs(store: Store, entry: Entry) -> list[Record]:
    names = (n for n in store.names("runs") if n.startswith(f"runs/{entry.name}-seed"))
    return [store.read_lines(name) for name in names]


def _loss_at(run: Record, step: float) -> float | None:
    """Interpolates the held-out loss at a step. Returns None beyond the end of the curve."""
    curve = points(run)
    steps = [p["step"] for p in curve]
    if not curve or step > steps[-1] * (1 + 1e-9):  # the shortest run ends there, up to rounding
        return None
    return float(np.interp(step, steps, [p["test_loss"] for p in curve]))
