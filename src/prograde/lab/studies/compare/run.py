"""Measures, searches and trains for `prograde compare`.

Every estimator gets the same batches, starts, optimizer and number of steps, and as many trials to
find its own learning rate.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import prograde as pg
from prograde.lab.data import Dataset
from prograde.lab.display import Display
from prograde.lab.models import Network
from prograde.lab.store import Store
from prograde.lab.studies.compare.estimators import (
    ESTIMATORS,
    LOCAL,
    MERGED,
    MODELS,
    Entry,
)
from prograde.lab.studies.compare.plan import DEFAULT_MINUTES, JUDGED, POINTS, Compare
from prograde.lab.training.costs import step_seconds
from prograde.lab.training.evaluation import evaluate, figures_of, judge
from prograde.lab.training.runs import Run, train
from prograde.lab.training.schedules import Rate
from prograde.lab.training.search import TRIALS, search
from prograde.lab.training.trainer import Trainer

ROUNDS = 15  # in each of which every step is timed
_LEARNING_STEPS = 200  # of an estimator that learns, before its bias is measured
_DIAGNOSIS_SEED = 2_000_000  # different from the seeds of runs and of the search
_RESERVED_SECONDS = 8  # of --minutes, for the report and the first step of each run


def run(plan: Compare, store: Store, display: Display) -> None:
    """Measures what the store does not hold yet."""
    begin = time.monotonic()
    data, model = plan.dataset, MODELS[plan.model]
    networks = {merged: model.build(merged) for merged in (False, True)}

    def network_of(name: str | None) -> Network:
        return networks[name is None or isinstance(ESTIMATORS[name], MERGED)]

    trainers = {
        e.name: trainer_of(plan, network_of(e.estimator), data, e.estimator, e.optimizer)
        for e in plan.entries
    }
    bare = trainer_of(plan, network_of(None), data, None, plan.optimizers[0])
    costs = store.once("costs", lambda: _costs(plan, {"bare": bare} | trainers, display))
    seconds = {name: cost["seconds"]["median"] for name, cost in costs.items()}
    _diagnose(plan, trainers, data, seconds, store, display)
    length = store.once("length", lambda: _length(plan, networks[True], data, seconds, begin))
    trained = {e.name: network_of(e.estimator) for e in plan.trained}
    if plan.rates:
        rates = {e.name: plan.rate(e) for e in plan.trained}
    else:
        judges = {n: judge(net, data, plan.eval_examples) for n, net in trained.items()}
        rates = _search(plan, trainers, seconds, length["steps"], judges, store, display)
    figures = {n: figures_of(net, data, plan.eval_examples) for n, net in trained.items()}
    _train(plan, trainers, seconds, rates, length["steps"], figures, store, display)


def trainer_of(
    plan: Compare, network: Network, data: Dataset, name: str | None, optimizer: str
) -> Trainer:
    """Makes the trainer of an estimator, or of the bare forward pass without a name."""
    estimator = None if name is None else ESTIMATORS[name]
    loss: Callable[..., Any] = network.losses
    if name in LOCAL:
        assert network.local_losses is not None
        local = network.local_losses
        loss = local if isinstance(estimator, pg.LocalLosses) else pg.total_loss(local)
    # steps are dispatched one by one, because reverse mode of convolutions is slow in a loop
    return Trainer(
        network.init,
        loss,
        estimator,
        data.train,
        optimizer=optimizer,
        schedule=plan.schedule,
        batch_size=plan.batch_size,
        in_scan=False,
    )


def _costs(plan: Compare, trainers: dict[str, Trainer], display: Display) -> dict[str, Any]:
    """Measures time and memory of a step."""
    title, visit = f"{plan.model}: time a step", MODELS[plan.model].visit
    measured = step_seconds(trainers, ROUNDS, display, title, visit)
    with display.stage(f"{plan.model}: memory of a step", len(trainers)):
        for name, trainer in trainers.items():
            compiled, _, _ = trainer.compiled_step()
            measured[name]["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            display.advance(1, f"{name}, {measured[name]['temp_bytes'] / 2**20:.1f} MiB")
    return measured


def _diagnose(
    plan: Compare,
    trainers: dict[str, Trainer],
    data: Dataset,
    seconds: dict[str, float],
    store: Store,
    display: Display,
) -> None:
    """Measures bias and variance at the start of the first seed, on its first batch."""
    names = {name: Entry(name, plan.optimizers[0]).name for name in plan.names}
    # an estimate, and a second derivative, which takes about four forward passes
    work = {
        e: plan.num_estimates(e) * (seconds[name] + 4 * seconds["bare"])
        for e, name in names.items()
    }

    def diagnosis(estimator: str) -> dict[str, Any]:
        trainer = trainers[names[estimator]]
        carry = trainer.start(0)
        if carry[3] is not None:  # it learns at rate 0, so that the parameters stay
            rows = trainer.rows(0, 0, _LEARNING_STEPS)
            carry, _, _ = trainer.steps(carry, Rate(0.0), 0, rows)
        found = pg.diagnostics.diagnose(
            trainer.loss,
            ESTIMATORS[estimator],
            jax.random.key(_DIAGNOSIS_SEED),
            carry[0],
            *(jnp.asarray(part[trainer.rows(0, 0, 1)[0]]) for part in data.train),
            num_estimates=plan.num_estimates(estimator),
            state=carry[3],
        )
        return dataclasses.asdict(found) | {"estimator": repr(found.estimator)}

    with display.stage(f"{plan.model}: bias and variance", sum(work.values())):
        for estimator in names:
            store.once(f"diagnosis/{estimator}", lambda estimator=estimator: diagnosis(estimator))
            facts = f"{estimator}, {plan.num_estimates(estimator)} estimates"
            display.advance(work[estimator], facts)


def _length(
    plan: Compare, network: Network, data: Dataset, seconds: dict[str, float], begin: float
) -> dict[str, Any]:
    """Returns the number of steps of a run: as given, or as many as fit into the remaining minutes.

    It is decided once, and recorded.
    """
    if plan.steps is not None:
        return {"steps": plan.steps, "evaluation_seconds": 0.0}
    evaluations = len(plan.trained) * _evaluation_seconds(plan, network, data)
    spent = time.monotonic() - begin + _RESERVED_SECONDS + evaluations
    left = 60 * (plan.minutes or DEFAULT_MINUTES) - spent
    a_step = sum(seconds[e.name] for e in plan.trained) * (plan.trials + plan.seeds)
    steps = POINTS * max(1, int(left / a_step / POINTS))
    return {"steps": steps, "evaluation_seconds": evaluations}


def _evaluation_seconds(plan: Compare, network: Network, data: Dataset) -> float:
    """Measures the time of the evaluations of an entry, in trials and at points of curves."""
    params = network.init(jax.random.key(0))

    def measure(part: Any) -> float:
        evaluate(network, params, part, plan.eval_examples)  # compiles
        begin = time.monotonic()
        evaluate(network, params, part, plan.eval_examples)
        return time.monotonic() - begin

    point = measure(data.test) + measure(data.train)
    return plan.trials * JUDGED * measure(data.validation) + plan.seeds * (POINTS + 1) * point


def _search(
    plan: Compare,
    trainers: dict[str, Trainer],
    seconds: dict[str, float],
    steps: int,
    judges: dict[str, Callable[[PyTree], float]],
    store: Store,
    display: Display,
) -> dict[str, float]:
    """Searches a learning rate for each entry."""
    work = {e.name: steps * seconds[e.name] for e in plan.trained}

    def on_trial(name: str, number: int, trial: dict[str, Any]) -> None:
        loss = "diverged" if trial["loss"] is None else f"loss {trial['loss']:.4g}"
        facts = f"{name}, trial {number} of {TRIALS}, rate {trial['learning_rate']:.2g}, {loss}"
        display.advance(work[name], facts)

    rates, done = {}, 0.0
    title = f"{plan.model}: learning rates, {steps} steps a trial"
    with display.stage(title, TRIALS * sum(work.values())):
        for name in work:
            rates[name] = search(
                trainers[name], name, steps, store, judges[name], on_trial, last=JUDGED
            )
            done += TRIALS * work[name]
            display.reach(done)
    return rates


def _train(
    plan: Compare,
    trainers: dict[str, Trainer],
    seconds: dict[str, float],
    rates: dict[str, float],
    steps: int,
    figures: dict[str, Callable[[PyTree], dict[str, float]]],
    store: Store,
    display: Display,
) -> None:
    """Trains all entries of a seed before the next seed, so that unfinished records compare."""
    runs = [
        (e.name, Run(e.estimator, e.optimizer, rates[e.name], seed, steps))
        for seed in range(plan.seeds)
        for e in plan.trained
    ]
    names = {run.name: name for name, run in runs}

    def on_point(run: Run, point: dict[str, Any]) -> None:
        reached = "diverged" if "test_loss" not in point else f"loss {point['test_loss']:.3g}"
        accuracy = f", {point['test_accuracy']:.1%}" if "test_accuracy" in point else ""
        work = math.ceil(run.steps / POINTS) * seconds[names[run.name]]
        display.advance(work, f"{point['step']}/{run.steps}, {reached}{accuracy}, {run.name}")

    total = sum(run.steps * seconds[name] for name, run in runs)
    with display.stage(f"{plan.model}: training, {plan.seeds} seeds of {steps} steps", total):
        done = 0.0
        for name, run in runs:
            train(trainers[name], run, store, POINTS, figures[name], on_point)
            done += run.steps * seconds[name]
            display.reach(done)
