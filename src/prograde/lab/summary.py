"""Figures of merit, computed from records alone."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prograde.lab import records
from prograde.lab.experiments import EXPERIMENTS, METHODS, Experiment, settings


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest over n seeds."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Outcome:
    """What a method reached at a setting.

    `final_loss`, `final_accuracy`: held-out, over the seeds that ended; `diverged`: (seed, step) of those that did not;
    `time_ratio`: time to backprop's best held-out loss over backprop's time to it, the median over seeds (`None` when the
    median seed does not reach it), where time is steps times the interleaved median cost of a step; `reached`: how many
    seeds reach it.
    """

    method: str
    setting: str
    learning_rate: float
    runs: list[list[dict[str, Any]]]
    final_loss: Spread | None
    final_accuracy: Spread | None
    diverged: list[tuple[int, int]]
    finished: int
    time_ratio: float | None
    reached: int


@dataclass(frozen=True)
class Summary:
    """One experiment's records."""

    experiment: Experiment
    directory: Path
    manifest: dict[str, Any]
    costs: dict[str, Any]
    memory: dict[str, Any]
    depths: dict[int, Any]
    searches: dict[str, Any]
    outcomes: list[Outcome]


def find(directories: list[Path]) -> list[Summary]:
    """Summaries of all experiments recorded in these directories, or in their sub-directories, in the paper's order."""
    found = []
    for directory in directories:
        manifests = [directory / records.MANIFEST, *sorted(directory.glob(f"*/{records.MANIFEST}"))]
        found += [summarise(path.parent) for path in manifests if path.exists()]
    if not found:
        raise records.RecordError(f"{', '.join(map(str, directories))}: no records here (no {records.MANIFEST}).")
    return sorted(found, key=lambda s: list(EXPERIMENTS).index(s.experiment.name))


def summarise(directory: Path) -> Summary:
    """Reads the records of one experiment."""
    manifest = records.read_json(directory / records.MANIFEST)
    name = manifest["config"]["experiment"]
    if name not in EXPERIMENTS:
        raise records.RecordError(f"{directory}: records of {name!r}, which this version does not know.")
    experiment = EXPERIMENTS[name]

    def optional(file: str) -> dict[str, Any]:
        return records.read_json(directory / file) if (directory / file).exists() else {}

    costs = optional("costs.json")
    runs = [records.read_lines(path) for path in sorted((directory / "runs").glob("*.jsonl"))]
    groups = {
        (method, setting.name): [r for r in runs if (r[0]["method"], r[0]["setting"]) == (method, setting.name)]
        for setting in settings(experiment)
        for method in METHODS
    }
    outcomes = [
        _outcome(method, setting, group, groups[("backprop", setting)], costs)
        for (method, setting), group in groups.items()
        if group
    ]
    return Summary(
        experiment,
        directory,
        manifest,
        costs,
        optional("memory.json"),
        {int(depth): figures for depth, figures in optional("depths.json").items()},
        {path.stem: records.read_json(path) for path in sorted((directory / "search").glob("*.json"))},
        outcomes,
    )


def _points(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in run if line["kind"] == "point"]


def _spread(values: list[float]) -> Spread | None:
    return Spread(statistics.fmean(values), min(values), max(values), len(values)) if values else None


def _outcome(method: str, setting: str, runs: list, backprop_runs: list, costs: dict[str, Any]) -> Outcome:
    ended = [run for run in runs if run[-1]["kind"] == "end"]
    completed = [run for run in ended if run[-1]["status"] == "completed"]
    finals = [_points(run)[-1] for run in completed]
    ratios = []
    if costs and method != "backprop":
        by_seed = {run[0]["seed"]: run for run in backprop_runs if run[-1]["kind"] == "end"}
        ratios = [
            _time_ratio(run, by_seed[run[0]["seed"]], method, costs) for run in ended if run[0]["seed"] in by_seed
        ]
    median = statistics.median_low(ratios) if ratios else float("inf")
    return Outcome(
        method,
        setting,
        runs[0][0]["learning_rate"],
        runs,
        _spread([p["test_loss"] for p in finals]),
        _spread([p["test_accuracy"] for p in finals if "test_accuracy" in p]),
        [(run[0]["seed"], run[-1]["step"]) for run in ended if run[-1]["status"] == "diverged"],
        len(ended),
        median if median < float("inf") else None,
        sum(ratio < float("inf") for ratio in ratios),
    )


def _time_ratio(run: list, backprop_run: list, method: str, costs: dict[str, Any]) -> float:
    reference = min(_points(backprop_run), key=lambda p: p["test_loss"])
    reached = next((p["step"] for p in _points(run) if p["test_loss"] <= reference["test_loss"]), None)
    if reached is None or reference["step"] == 0:
        return float("inf")
    seconds = {name: cost["seconds"]["median"] for name, cost in costs.items()}
    return reached * seconds[method] / (reference["step"] * seconds["backprop"])
