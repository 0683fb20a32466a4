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

    `final_loss`, `final_accuracy`: held-out, over the seeds that completed; `diverged`: (seed, step) of those that did not;
    `finished`: how many seeds ended in either way. `time_ratio`: time to backprop's best held-out loss over backprop's
    time to it, the median over the seeds, where time is steps times the interleaved median cost of a step; `None` where
    the median seed does not reach it. `time_bound`: what T exceeds in that case, the time of the whole run over backprop's
    (`None` when the seed diverged, and so never will). `reached` of `compared` seeds reach it; `compared` is 0 where
    backprop has not run, or never got better than its start.
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
    time_bound: float | None
    reached: int
    compared: int


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
        if not any(path.exists() for path in manifests):
            raise records.RecordError(f"{directory}: no records here (no {records.MANIFEST}).")
        found += [summarise(path.parent) for path in manifests if path.exists()]
    return sorted(found, key=lambda s: list(EXPERIMENTS).index(s.experiment.name))


def summarise(directory: Path) -> Summary:
    """Reads the records of one experiment."""
    manifest = records.read_json(directory / records.MANIFEST)
    name = manifest["config"]["experiment"]
    if name == "compare":
        raise records.RecordError(
            f"{directory}: records of a comparison. Show them with prograde compare --from."
        )
    if name not in EXPERIMENTS:
        raise records.RecordError(
            f"{directory}: records of {name!r}, which this version does not know."
        )
    experiment = EXPERIMENTS[name]

    def optional(file: str) -> dict[str, Any]:
        return records.read_json(directory / file) if (directory / file).exists() else {}

    costs = optional("costs.json")
    runs = [records.read_lines(path) for path in sorted((directory / "runs").glob("*.jsonl"))]
    groups = {
        (method, setting.name): [
            r for r in runs if (r[0]["method"], r[0]["setting"]) == (method, setting.name)
        ]
        for setting in settings(experiment)
        for method in METHODS
    }
    outcomes = [
        outcome_of(method, setting, group, groups[("backprop", setting)], costs)
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
        {
            path.stem: records.read_json(path)
            for path in sorted((directory / "search").glob("*.json"))
        },
        outcomes,
    )


def points(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a curve, those without a held-out loss left out."""
    return [line for line in run if line["kind"] == "point" and line.get("test_loss") is not None]


def spread(values: list[float]) -> Spread | None:
    """`None` of no values."""
    return (
        Spread(statistics.fmean(values), min(values), max(values), len(values)) if values else None
    )


def outcome_of(
    method: str, setting: str, runs: list, backprop_runs: list, costs: dict[str, Any]
) -> Outcome:
    """What the runs of a method at a setting reached, beside the runs of backprop at the same setting."""
    ended = [run for run in runs if run[-1]["kind"] == "end"]
    completed = [run for run in ended if run[-1]["status"] == "completed"]
    finals = [points(run)[-1] for run in completed]
    times = []
    if costs and method != "backprop":
        references = {run[0]["seed"]: run for run in backprop_runs if run[-1]["kind"] == "end"}
        pairs = [(run, references[run[0]["seed"]]) for run in ended if run[0]["seed"] in references]
        times = sorted(
            filter(None, (_time_ratio(run, reference, method, costs) for run, reference in pairs))
        )
    # (0, T) of a seed that reaches it, (1, bound) of one that does not, (2, 0) of one that diverged: in this order
    kind, value = times[len(times) // 2] if times else (2, 0.0)
    return Outcome(
        method,
        setting,
        runs[0][0]["learning_rate"],
        runs,
        spread([p["test_loss"] for p in finals]),
        spread([p["test_accuracy"] for p in finals if "test_accuracy" in p]),
        [(run[0]["seed"], run[-1]["step"]) for run in ended if run[-1]["status"] == "diverged"],
        len(ended),
        value if kind == 0 else None,
        value if kind == 1 else None,
        sum(kind == 0 for kind, _ in times),
        len(times),
    )


def _time_ratio(
    run: list, backprop_run: list, method: str, costs: dict[str, Any]
) -> tuple[int, float] | None:
    """(0, T) where the run reaches backprop's best loss, (1, what T exceeds) or, diverged, (2, 0) where it does not."""
    reference = min(points(backprop_run), key=lambda p: p["test_loss"])
    if reference["step"] == 0:
        return None
    seconds = {name: cost["seconds"]["median"] for name, cost in costs.items()}
    backprop_seconds = reference["step"] * seconds["backprop"]
    reached = next(
        (p["step"] for p in points(run) if p["test_loss"] <= reference["test_loss"]), None
    )
    if reached is not None:
        return 0, reached * seconds[method] / backprop_seconds
    if run[-1]["status"] == "diverged":
        return 2, 0.0
    return 1, run[-1]["step"] * seconds[method] / backprop_seconds
