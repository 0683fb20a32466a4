"""Runs one experiment: measures costs, searches learning rates, trains."""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from prograde.lab.data import Dataset, synthetic
from prograde.lab.display import Display
from prograde.lab.models import Surface
from prograde.lab.store import Store
from prograde.lab.studies.reproduce import costs
from prograde.lab.studies.reproduce.experiments import METHODS, Budget, Experiment, settings
from prograde.lab.training.costs import step_seconds
from prograde.lab.training.evaluation import figures_of, judge
from prograde.lab.training.runs import Run, train
from prograde.lab.training.search import TRIALS, search
from prograde.lab.training.trainer import Trainer

_SCAN_STEPS = 20  # steps in a visit, if they run inside one scan
_SURFACE_SEEDS = 5  # of a trial of the search on surfaces, whose steps are cheap


def run(
    title: str,
    experiment: Experiment,
    data: Dataset | None,
    budget: Budget,
    store: Store,
    display: Display,
    mesh: Mesh | None,
) -> None:
    """Measures what the store does not hold yet. The devices of a mesh share each batch."""
    if experiment.subject is None:
        _run_depth(title, budget, store, display)
        return
    if isinstance(experiment.subject, Surface):
        data = None
    trainers = {
        name: costs.trainer_of(experiment, estimator, data, mesh=mesh)
        for name, estimator in METHODS.items()
    }
    seconds = _measure_costs(title, experiment, trainers, data, budget, store, display, mesh)
    figures, loss = _figures_and_judge(experiment, data, budget.eval_examples)
    seeds = _SURFACE_SEEDS if isinstance(experiment.subject, Surface) else 1
    tuned = _search(title, trainers, budget, seconds, loss, seeds, store, display)
    _train(title, experiment, trainers, budget, seconds, tuned, figures, store, display, mesh)


def _figures_and_judge(
    experiment: Experiment, data: Dataset | None, limit: int
) -> tuple[Callable[[PyTree], dict[str, float]], Callable[[PyTree], float]]:
    """Returns the figures of a point, and the criterion of the search of a rate."""
    if isinstance(surface := experiment.subject, Surface):
        value = lambda params: float(surface.fun(params))  # noqa: E731
        return lambda params: {"test_loss": value(params)}, value
    assert experiment.subject is not None
    assert data is not None
    network = experiment.subject(False)
    return figures_of(network, data, limit), judge(network, data, limit)


def _measure_costs(
    title: str,
    experiment: Experiment,
    trainers: dict[str, Trainer],
    data: Dataset | None,
    budget: Budget,
    store: Store,
    display: Display,
    mesh: Mesh | None,
) -> dict[str, float]:
    """Measures time and memory of a step; returns the seconds of each method."""

    def measure_time() -> dict[str, Any]:
        everything = {
            name: trainers[name]
            if name in trainers
            else costs.trainer_of(experiment, estimator, data, checkpointed)
            for name, (estimator, checkpointed) in costs.variants(experiment).items()
        }
        steps = _SCAN_STEPS if experiment.in_scan else 1
        return step_seconds(everything, budget.timing_rounds, display, f"{title}: step", steps)

    def measure_memory() -> dict[str, Any]:
        with display.stage(f"{title}: memory", len(costs.variants(experiment))):
            return costs.memory(experiment, 0, display, 1)

    measured = store.once("costs", measure_time)
    if data is not None and (mesh is None or jax.process_index() == 0):
        store.once("memory", measure_memory)
    return {name: cost["seconds"]["median"] for name, cost in measured.items()}


def _search(
    title: str,
    trainers: dict[str, Trainer],
    budget: Budget,
    seconds: dict[str, float],
    loss: Callable[[PyTree], float],
    seeds: int,
    store: Store,
    display: Display,
) -> dict[str, float]:
    """Searches a learning rate for each method."""
    speed = _Speed()

    def on_trial(method: str, number: int, trial: dict[str, Any]) -> None:
        loss = "diverged" if trial["loss"] is None else f"loss {trial['loss']:.4g}"
        display.advance(
            budget.steps * seconds[method],
            f"{method}, trial {number} of {TRIALS}, rate {trial['learning_rate']:.2g}, {loss}, "
            f"{speed.of(budget.steps)}",
        )

    rates, done = {}, 0.0
    work = sum(seconds[name] for name in METHODS) * budget.steps * TRIALS
    with display.stage(f"{title}: learning rates", work):
        for name in METHODS:
            rates[name] = search(
                trainers[name], name, budget.steps, store, loss, on_trial, seeds=seeds
            )
            done += budget.steps * TRIALS * seconds[name]
            display.reach(done)
    return rates


def _train(
    title: str,
    experiment: Experiment,
    trainers: dict[str, Trainer],
    budget: Budget,
    seconds: dict[str, float],
    tuned: dict[str, float],
    figures: Callable[[PyTree], dict[str, float]],
    store: Store,
    display: Display,
    mesh: Mesh | None,
) -> None:
    """Trains by each method at each setting. All runs of a seed come before the next seed."""
    runs = [
        Run(method, setting.name, setting.learning_rate or tuned[method], seed, budget.steps)
        for seed in range(budget.seeds)
        for setting in settings(experiment)
        for method in METHODS
    ]
    speed = _Speed()

    def on_point(run: Run, point: dict[str, Any]) -> None:
        steps = budget.steps / budget.points
        accuracy = f", {point['test_accuracy']:.1%}" if "test_accuracy" in point else ""
        loss = f"loss {point['test_loss']:.3g}" if "test_loss" in point else "diverged"
        display.advance(
            steps * seconds[run.method],
            f"{point['step']}/{run.steps}, {loss}{accuracy}, {speed.of(steps)}, {run.name}",
        )

    work = sum(run.steps * seconds[run.method] for run in runs)
    with display.stage(f"{title}: training", work):
        done = 0.0
        for run in runs:
            train(trainers[run.method], run, store, budget.points, figures, on_point, mesh)
            done += run.steps * seconds[run.method]
            display.reach(done)


def _run_depth(title: str, budget: Budget, store: Store, display: Display) -> None:
    """Measures time and memory at each depth, and records each when it is done."""
    for depth in budget.depths:
        found: dict[str, Any] = store.read("depths", default={})
        if str(depth) in found:
            continue
        experiment, data = costs.depth_experiment(depth), synthetic()
        trainers = {
            name: costs.trainer_of(experiment, estimator, data, checkpointed)
            for name, (estimator, checkpointed) in costs.variants(experiment).items()
        }
        where = f"{title}: {depth} layers"
        steps = max(1, 20 // depth)
        timed = step_seconds(trainers, budget.timing_rounds, display, where, steps, one_carry=True)
        with display.stage(f"{where}: memory", len(trainers)):
            found[str(depth)] = {
                "costs": timed,
                "memory": costs.memory(experiment, depth, display, 1),
            }
        store.write("depths", found)


class _Speed:
    """Measures the number of steps per second since the last call."""

    def __init__(self):
        self._last = time.monotonic()

    def of(self, steps: float) -> str:
        now = time.monotonic()
        rate, self._last = steps / max(now - self._last, 1e-9), now
        return f"{rate:,.0f} steps/s"
