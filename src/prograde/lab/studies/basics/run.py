"""Measures the costs that the project promises to keep to."""

import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax.numpy as jnp

import prograde as pg
from prograde.lab import models
from prograde.lab.data import synthetic
from prograde.lab.display import Display
from prograde.lab.measure.timing import Others, Visit, take_turns, timed
from prograde.lab.training.costs import step_seconds, training_visit
from prograde.lab.training.schedules import Rate
from prograde.lab.training.trainer import Trainer

METHODS = {"low-rank": pg.WeightPerturbation(pg.LowRank(rank=1)), "backprop": pg.Backprop()}
_IMPORT_ROUNDS = 9
_SCAN_STEPS = 20  # steps of a visit, inside one scan
_LOOP_STEPS = 50  # steps of a visit, where the loop itself is timed


def process_seconds(*command: str) -> float:
    """Returns the seconds that a process takes."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def imports(display: Display) -> dict[str, Any]:
    """Measures `import prograde` in addition to `import jax`, in fresh processes."""

    def visit(code: str) -> Visit:
        return lambda _: process_seconds(sys.executable, "-c", code)

    visits = {"jax": visit("import jax"), "both": visit("import jax, prograde")}
    turns = take_turns(visits, _IMPORT_ROUNDS, display, "imports", calls=1)
    pairs = zip(turns.seconds["both"], turns.seconds["jax"], strict=True)
    seconds = statistics.median(both - alone for both, alone in pairs)
    return {"seconds": seconds, "n": _IMPORT_ROUNDS, "busy": turns.busy}


def beale(display: Display) -> dict[str, Any]:
    """Measures `prograde reproduce beale`, from the start of the process to its end."""
    command = [sys.executable, "-m", "prograde.lab.cli", "reproduce", "beale", "--out"]
    with display.stage("prograde reproduce beale", 1), tempfile.TemporaryDirectory() as folder:
        watch = Others()
        return {"seconds": process_seconds(*command, f"{folder}/out"), "busy": watch.busy()}


def mlp_step(rounds: int, display: Display) -> dict[str, Any]:
    """Measures an SGD step of the MLP at batch 64 over the bare forward pass, in the loop."""
    trainers = {name: _trainer(estimator) for name, estimator in {"bare": None, **METHODS}.items()}
    return step_seconds(trainers, rounds, display, "mlp", _SCAN_STEPS)


def loop(rounds: int, display: Display) -> dict[str, Any]:
    """Measures a step of the training loop over a bare jitted step on a given batch."""
    found = {}
    for method, estimator in METHODS.items():
        looped, alone = _trainer(estimator), _trainer(estimator, in_scan=False)
        visits = {"loop": training_visit(looped, [looped.start(0)]), "alone": _dispatched(alone)}
        turns = take_turns(visits, rounds, display, f"training loop, {method}", _LOOP_STEPS)
        found[method] = turns.summary("alone")["loop"]
    return found


def _trainer(estimator: pg.Estimator | None, in_scan: bool = True) -> Trainer:
    """Makes a trainer of the paper's MLP on random images, because only its cost matters."""
    network = models.mlp()
    return Trainer(network.init, network.loss, estimator, synthetic().train, in_scan=in_scan)


def _dispatched(trainer: Trainer) -> Visit:
    """Makes a visit whose steps are dispatched one by one on a given batch."""
    ready = jnp.asarray(trainer.rows(0, 0, 1)[0])
    arguments, carry = trainer.arguments(Rate(0.0), 0), trainer.start(0)

    def steps(count: int) -> Any:
        nonlocal carry
        for _ in range(count):
            carry, _ = trainer.program(carry, *arguments, ready)
        return carry

    return timed(steps)
