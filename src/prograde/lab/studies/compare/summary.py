"""What `prograde compare` recorded, read back: costs, diagnoses, curves, and losses at equal steps and at equal time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prograde.lab import records
from prograde.lab.compare import MODELS, SAME_GRADIENT, SCHEDULES, Entry
from prograde.lab.summary import Outcome, Spread, outcome_of, points, spread


@dataclass(frozen=True)
class Result:
    """What an entry costs and reached. `runs` are those of `backprop` where the gradient is the same; `trials` its search."""

    entry: Entry
    cost: dict[str, Any]
    diagnosis: dict[str, Any]
    trials: list[dict[str, Any]]
    runs: list[list[dict[str, Any]]]
    outcome: Outcome | None
    at_equal_time: Spread | None

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.cost["seconds"]["median"]

    @property
    def at_edge(self) -> bool:
        """Whether the rate that was found is the least or the greatest that was tried."""
        rates = [trial["learning_rate"] for trial in self.trials]
        return (
            self.outcome is not None
            and bool(rates)
            and self.outcome.learning_rate in (min(rates), max(rates))
        )


@dataclass(frozen=True)
class Comparison:
    """The records of one comparison. `equal_seconds` is the time of the shortest run."""

    manifest: dict[str, Any]
    costs: dict[str, Any]
    results: list[Result]
    steps: int
    equal_seconds: float

    @property
    def trained(self) -> list[Result]:
        """Those with runs of their own."""
        names = self.manifest["config"]["estimators"]
        return [r for r in self.results if SAME_GRADIENT.get(r.entry.estimator) not in names]

    @property
    def falls_to_zero(self) -> bool:
        """Whether the rate comes to zero at the end of a run, so that a run that is broken off is another run."""
        return self.manifest["config"]["schedule"] == SCHEDULES["cosine"]

    @property
    def title(self) -> str:
        """The model and its data."""
        config = self.manifest["config"]
        return f"{MODELS[config['model']].title}, {config['data']['name']}"

    def label(self, entry: Entry) -> str:
        """The estimator, and the optimizer where there are several."""
        several = len(self.manifest["config"]["optimizers"]) > 1
        return f"{entry.estimator}, {entry.optimizer}" if several else entry.estimator


def read(directory: Path) -> Comparison:
    """The comparison recorded in a directory.

    **Errors:** `RecordError` where there is none, or one that was stopped before anything was trained.
    """
    if not (directory / records.MANIFEST).exists():
        raise records.RecordError(f"{directory}: no records here (no {records.MANIFEST}).")
    manifest = records.read_json(directory / records.MANIFEST)
    config = manifest["config"]
    if config.get("experiment") != "compare":
        raise records.RecordError(
            f"{directory} holds records of another command. prograde report shows them."
        )
    if not (directory / "length.json").exists():
        raise records.RecordError(
            f"{directory}: nothing was trained yet. Continue it with --out {directory} --resume."
        )
    steps = records.read_json(directory / "length.json")["steps"]
    costs = records.read_json(directory / "costs.json")
    entries = [
        Entry(e, optimizer) for optimizer in config["optimizers"] for e in config["estimators"]
    ]
    equal_seconds = steps * min(costs[e.name]["seconds"]["median"] for e in entries)
    results = [_result(directory, e, config, costs, equal_seconds) for e in entries]
    return Comparison(manifest, costs, results, steps, equal_seconds)


def _result(
    directory: Path, entry: Entry, config: dict, costs: dict[str, Any], equal_seconds: float
) -> Result:
    twin = SAME_GRADIENT.get(entry.estimator, "")
    trained = Entry(twin, entry.optimizer) if twin in config["estimators"] else entry
    runs, reference = (
        _runs(directory, trained),
        _runs(directory, Entry("backprop", entry.optimizer)),
    )
    cost = costs[entry.name]
    # what T is relative to: the faster of those that have the gradient of backprop
    exact = [Entry(e, entry.optimizer).name for e in ("backprop", *SAME_GRADIENT)]
    fastest = min(
        (costs[e] for e in exact if e in costs), key=lambda c: c["seconds"]["median"], default=None
    )
    both = {entry.name: cost, "backprop": fastest}
    outcome = outcome_of(entry.name, entry.optimizer, runs, reference, both) if runs else None
    at_equal_time = [_loss_at(run, equal_seconds / cost["seconds"]["median"]) for run in runs]
    search = directory / "search" / f"{trained.name}.json"
    return Result(
        entry,
        cost,
        records.read_json(directory / "diagnosis" / f"{entry.estimator}.json"),
        records.read_json(search)["trials"] if search.exists() else [],
        runs,
        outcome,
        spread([loss for loss in at_equal_time if loss is not None]),
    )


def _runs(directory: Path, entry: Entry) -> list[list[dict[str, Any]]]:
    paths = sorted((directory / "runs").glob(f"{entry.name}-seed*.jsonl"))
    return [records.read_lines(path) for path in paths]


def _loss_at(run: list[dict[str, Any]], step: float) -> float | None:
    """The held-out loss at a step, on the straight line between the points of the curve; `None` beyond its end."""
    curve = points(run)
    steps = [p["step"] for p in curve]
    # the shortest run ends at the equal time, but for rounding
    return (
        float(np.interp(step, steps, [p["test_loss"] for p in curve]))
        if step <= steps[-1] * (1 + 1e-9)
        else None
    )
