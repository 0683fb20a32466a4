"""Runs experiments: costs, search of learning rates, training; each step recorded, each resumable."""

import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from prograde.lab import costs, records, workers
from prograde.lab.data import Dataset
from prograde.lab.display import Display
from prograde.lab.experiments import METHODS, Budget, Experiment, describe, settings
from prograde.lab.models import Surface
from prograde.lab.train import SEARCH_GRID, Run, Trainer, search, train


def run_all(
    chosen: list[Experiment],
    data: Dataset | None,
    full: bool,
    seeds: int | None,
    out: Path,
    resume: bool,
    display: Display,
    shared: bool = False,
) -> None:
    """Runs the experiments into `out`, one directory each. All directories are claimed before anything runs.

    `shared`: together with the other processes of a group, each of which has an `out` of its own.
    """
    facts = None if data is None else {"name": data.name, "sha256": data.fingerprint()}
    configs = {e.name: describe(e, full, seeds, facts) for e in chosen}
    mesh = None
    if shared:
        mesh = workers.agree({"the configuration": configs, "--resume": resume})
        configs = {name: config | {"workers": mesh.size} for name, config in configs.items()}
    records.claim({out / name: config for name, config in configs.items()}, resume)
    if shared and resume:
        workers.share_files(out)
    for i, experiment in enumerate(chosen):
        title = f"{experiment.name} ({i + 1} of {len(chosen)})"
        budget = experiment.budget(full)
        directory = out / experiment.name
        if experiment.subject is None:
            _run_depth(title, budget, directory, display)
        else:
            _run_training(
                title, experiment, data, budget, seeds or budget.seeds, directory, display, mesh
            )


def _run_training(
    title: str,
    experiment: Experiment,
    data: Dataset | None,
    budget: Budget,
    seeds: int,
    directory: Path,
    display: Display,
    mesh: Mesh | None,
) -> None:
    data = None if isinstance(experiment.subject, Surface) else data
    trainers = {
        name: Trainer(experiment, estimator, data, mesh=mesh) for name, estimator in METHODS.items()
    }
    _measure_costs(title, experiment, trainers, data, budget, directory, display)
    step_seconds = {
        name: cost["seconds"]["median"]
        for name, cost in records.read_json(directory / "costs.json").items()
    }
    trials = len(SEARCH_GRID) + 2
    search_seconds = sum(step_seconds[name] for name in METHODS) * budget.steps * trials
    begun = [time.monotonic()]

    def steps_per_second(steps: float) -> str:
        now = time.monotonic()
        rate, begun[0] = steps / max(now - begun[0], 1e-9), now
        return f"{rate:,.0f} steps/s"

    def on_trial(method: str, number: int, trial: dict[str, Any]) -> None:
        loss = "diverged" if trial["loss"] is None else f"loss {trial['loss']:.4g}"
        facts = f"{method}, trial {number} of {trials}, rate {trial['learning_rate']:.2g}, {loss}"
        display.advance(
            budget.steps * step_seconds[method], f"{facts}, {steps_per_second(budget.steps)}"
        )

    with display.stage(f"{title}: learning rates", search_seconds):
        tuned, done = {}, 0.0
        for name in METHODS:
            tuned[name] = search(trainers[name], name, budget, directory, on_trial)
            done += budget.steps * trials * step_seconds[name]
            display.reach(done)

    runs = [
        Run(method, setting.name, setting.learning_rate or tuned[method], seed, budget.steps)
        for seed in range(seeds)
        for setting in settings(experiment)
        for method in METHODS
    ]

    def on_point(run: Run, point: dict[str, Any]) -> None:
        steps = budget.steps / budget.points
        accuracy = f", {point['test_accuracy']:.1%}" if "test_accuracy" in point else ""
        loss = f"loss {point['test_loss']:.3g}" if "test_loss" in point else "diverged"
        facts = (
            f"{point['step']}/{run.steps}, {loss}{accuracy}, {steps_per_second(steps)}, {run.name}"
        )
        display.advance(steps * step_seconds[run.method], facts)

    with display.stage(
        f"{title}: training", sum(run.steps * step_seconds[run.method] for run in runs)
    ):
        done = 0.0
        for run in runs:
            begun[0] = time.monotonic()
            train(trainers[run.method], run, budget, directory, on_point)
            done += run.steps * step_seconds[run.method]
            display.reach(done)


def _measure_costs(
    title: str,
    experiment: Experiment,
    trainers: dict[str, Trainer],
    data: Dataset | None,
    budget: Budget,
    directory: Path,
    display: Display,
) -> None:
    if not (path := directory / "costs.json").exists():
        with display.stage(f"{title}: time a step", budget.timing_rounds + 1):
            on_round = lambda i: display.advance(1, f"round {i} of {budget.timing_rounds}")  # noqa: E731
            measured = costs.experiment_costs(
                experiment, trainers, data, budget.timing_rounds, on_round
            )
        records.write_json(path, measured)
    first = trainers["backprop"].mesh is None or jax.process_index() == 0
    if first and data is not None and not (path := directory / "memory.json").exists():
        with display.stage(f"{title}: memory", len(costs.variants(experiment))):
            found = costs.memory(experiment, 0, lambda method: display.advance(1, method))
        records.write_json(path, found)


def _run_depth(title: str, budget: Budget, directory: Path, display: Display) -> None:
    path = directory / "depths.json"
    found: dict[str, Any] = records.read_json(path) if path.exists() else {}
    num_methods = len(costs.variants(costs.depth_experiment(1)))
    with display.stage(title, sum(20 + depth for depth in budget.depths)):
        for depth in budget.depths:
            half = (20 + depth) / 2  # of the work at this depth, in the same arbitrary unit

            def on_round(i: int, depth: int = depth, half: float = half) -> None:
                display.advance(
                    half / (budget.timing_rounds + 1),
                    f"{depth} layers, round {i} of {budget.timing_rounds}",
                )

            def on_method(method: str, depth: int = depth, half: float = half) -> None:
                display.advance(half / num_methods, f"{depth} layers, memory, {method}")

            if str(depth) in found:
                display.advance(2 * half, f"{depth} layers, recorded before")
                continue
            seconds = costs.depth_seconds(depth, budget.timing_rounds, on_round)
            memory = costs.memory(costs.depth_experiment(depth), depth, on_method)
            found[str(depth)] = {"costs": seconds, "memory": memory}
            records.write_json(path, found)
