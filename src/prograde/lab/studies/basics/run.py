"""Measures the costs that the project promises to keep to."""

import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import prograde as pg
from prograde.lab import models
from prograde.lab.display import Display
from prograde.lab.measure.timing import Others, Visit, take_turns, timed
from prograde.lab.models import workloads
from prograde.lab.training.schedules import Rate
from prograde.lab.training.trainer import Trainer

_IMPORT_ROUNDS = 9
_SCAN_STEPS = 20  # steps of a visit, inside one scan
_LOOP_STEPS = 50  # steps of a visit, where the loop itself is timed
_EXAMPLES = 640  # ten batches
_ESTIMATORS = {"low-rank": pg.WeightPerturbation(pg.LowRank(rank=1)), "backprop": pg.Backprop()}


def process_seconds(*command: str) -> float:
    """Seconds that a process takes."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def imports(display: Display) -> dict[str, Any]:
    """Seconds that `import prograde` takes in addition to `import jax`, in fresh processes."""

    def visit(code: str) -> Visit:
        return lambda _: process_seconds(sys.executable, "-c", code)

    visits = {"jax": visit("import jax"), "both": visit("import jax, prograde")}
    turns = take_turns(visits, _IMPORT_ROUNDS, display, "imports", calls=1)
    pairs = zip(turns.seconds["both"], turns.seconds["jax"], strict=True)
    seconds = statistics.median(both - alone for both, alone in pairs)
    return {"seconds": seconds, "n": _IMPORT_ROUNDS, "busy": turns.busy}


def beale(display: Display) -> dict[str, Any]:
    """Seconds from the start of the process to the end of `prograde reproduce beale`."""
    command = [sys.executable, "-m", "prograde.lab.cli", "reproduce", "beale", "--out"]
    with display.stage("prograde reproduce beale", 1), tempfile.TemporaryDirectory() as folder:
        watch = Others()
        return {"seconds": process_seconds(*command, f"{folder}/out"), "busy": watch.busy()}


def mlp_step(rounds: int, display: Display) -> dict[str, Any]:
    """A full SGD step of the MLP at batch 64 over the bare forward pass, in the training loop."""
    estimators = {"bare": None, **_ESTIMATORS}
    visits = {
        name: training_visit(mlp_trainer(estimator), _SCAN_STEPS)
        for name, estimator in estimators.items()
    }
    return take_turns(visits, rounds, display, "mlp", calls=1).summary("bare")


def mlp_trainer(estimator: pg.Estimator | None, in_scan: bool = True) -> Trainer:
    """A trainer of the paper's MLP on random images. Only its cost matters."""
    network = models.mlp()
    data = jax.tree.map(np.asarray, workloads.mlp(_EXAMPLES).batch(jax.random.key(0)))
    return Trainer(network.init, network.loss, estimator, data, in_scan=in_scan)


def training_visit(trainer: Trainer, steps: int) -> Visit:
    """A visit of so many steps in the training loop. A call is one step, whatever their number."""
    rows, carry = trainer.rows(0, 0, steps), trainer.start(0)

    def run(_: int) -> Any:
        nonlocal carry
        carry, losses, _visited = trainer.steps(carry, Rate(0.0), 0, rows)
        return carry, losses

    visit = timed(run)
    return lambda count: visit(count) / steps


def loop(rounds: int, display: Display) -> dict[str, Any]:
    """A step in the training loop over a bare jitted step, dispatched alone on a given batch."""
    found = {}
    for method, estimator in _ESTIMATORS.items():
        visits = {
            "loop": training_visit(mlp_trainer(estimator), _LOOP_STEPS),
            "alone": _dispatched(mlp_trainer(estimator, in_scan=False), _LOOP_STEPS),
        }
        turns = take_turns(visits, rounds, display, f"training loop, {method}", calls=1)
        found[method] = turns.summary("alone")["loop"]
    return found


def _dispatched(trainer: Trainer, steps: int) -> Visit:
    """A visit of so many steps, each dispatched by itself."""
    ready = jnp.asarray(trainer.rows(0, 0, steps)[0])
    arguments, carry = trainer.arguments(Rate(0.0), 0), trainer.start(0)

    def run(_: int) -> Any:
        nonlocal carry
        for _ in range(steps):
            carry, _ = trainer.program(carry, *arguments, ready)
        return carry

    visit = timed(run)
    return lambda count: visit(count) / steps
