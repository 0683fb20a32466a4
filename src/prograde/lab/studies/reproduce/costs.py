"""Measures the cost of a step of each method: time in turns, memory in separate processes."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

import prograde as pg
from prograde.lab import models
from prograde.lab.data import Dataset, synthetic
from prograde.lab.display import Display
from prograde.lab.measure.memory import in_a_process, step_memory
from prograde.lab.studies.reproduce.experiments import EXPERIMENTS, METHODS, Experiment
from prograde.lab.training.logged import LoggedTrainer
from prograde.lab.training.trainer import Trainer


def variants(experiment: Experiment) -> dict[str, tuple[pg.Estimator | None, bool]]:
    """Returns what is measured: name -> (estimator, whether reverse mode is checkpointed)."""
    found: dict[str, tuple[pg.Estimator | None, bool]] = {"bare": (None, False)}
    found |= {name: (estimator, False) for name, estimator in METHODS.items()}
    if not isinstance(experiment.subject, models.Surface):
        found["checkpointed"] = (pg.Backprop(), True)
    return found


def trainer_of(
    experiment: Experiment,
    estimator: pg.Estimator | None,
    data: Dataset | None,
    checkpointed: bool = False,
    mesh: Mesh | None = None,
) -> Trainer:
    """Makes a trainer of an experiment. The devices of a mesh share each batch."""
    if isinstance(surface := experiment.subject, models.Surface):
        start = lambda key: jnp.asarray(surface.start)  # noqa: E731
        return Trainer(start, surface.fun, estimator, traced=True, in_scan=experiment.in_scan)
    assert experiment.subject is not None
    assert data is not None
    network = experiment.subject(checkpointed)
    how = (network.init, network.loss)
    if mesh is None or estimator is None:
        return Trainer(*how, estimator, data.train, in_scan=experiment.in_scan)
    if isinstance(estimator, pg.SeededEstimator):
        return LoggedTrainer(*how, estimator, data.train, mesh, in_scan=experiment.in_scan)
    shared = pg.distributed.Distributed(estimator, mesh, data=mesh.axis_names)
    return Trainer(*how, shared, data.train, in_scan=experiment.in_scan)


def depth_experiment(depth: int) -> Experiment:
    """Makes the depth experiment at one depth, as an experiment to train."""
    base = EXPERIMENTS["depth"]
    return Experiment(
        base.name,
        base.title,
        lambda checkpointed: models.deep(depth, checkpointed=checkpointed),
        base.paper_rates,
        base.reported,
        base.quick,
        base.full,
    )


def memory(experiment: Experiment, depth: int, display: Display, part: float) -> dict[str, Any]:
    """Measures the memory of one training step of each method, each in its own process.

    Two processes run at a time. All figures are in bytes. `temp_bytes` is what XLA plans in
    addition to arguments and results. `peak_rss` and `rss_before` are the resident memory of the
    process at its peak during three steps, and just before them, or null if the system does not
    tell. `part` is the amount of work of a method on the display.
    """
    methods = list(variants(experiment))

    def measure(method: str) -> dict[str, Any]:
        return in_a_process(__name__, experiment.name, method, str(depth))

    found = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for method, figures in zip(methods, pool.map(measure, methods), strict=True):
            found[method] = figures
            display.advance(part, f"memory, {method}")
    return found


def _measure_memory(name: str, method: str, depth: int) -> dict[str, Any]:
    experiment = depth_experiment(depth) if depth else EXPERIMENTS[name]
    estimator, checkpointed = variants(experiment)[method]
    trainer = trainer_of(experiment, estimator, synthetic(1), checkpointed)
    compiled, carry, arguments = trainer.compiled_step()
    return step_memory(compiled, carry, *arguments)


if __name__ == "__main__":
    print(json.dumps(_measure_memory(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
