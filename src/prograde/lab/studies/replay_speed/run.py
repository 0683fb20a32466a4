"""Trains with a replay log, and computes the same parameters again from the log."""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import prograde as pg
from prograde.lab import models
from prograde.lab.data import synthetic
from prograde.lab.display import Display
from prograde.lab.measure.timing import quartiles, ratio_quartiles, take_turns, timed
from prograde.lab.studies.replay_speed import LEAST_TURNS
from prograde.lab.training.logged import LoggedTrainer
from prograde.lab.training.schedules import Rate
from prograde.lab.training.trainer import Trainer

_RATE = Rate(1e-3)


def measure(steps: int, turn: int, display: Display) -> dict[str, Any]:
    """Takes all figures; returns the record."""
    network, estimator = models.mlp(), pg.WeightPerturbation(pg.LowRank(rank=1))
    data = synthetic().train
    mesh = jax.make_mesh((1,), ("workers",))
    logged = LoggedTrainer(network.init, network.loss, estimator, data, mesh)
    base = logged.start(0)[0]
    with tempfile.TemporaryDirectory() as folder:
        log = pg.replay.ReplayLog.create(Path(folder) / "run.log", base, logged.update)
        log.flush_every = turn
        training = Training(logged, log, base, turn)
        scan = Scan(Trainer(network.init, network.loss, estimator, data), turn)
        again = Replaying(pg.replay.Update(estimator, logged.update.optimizer), log, base, turn)
        training.turn()  # replaying is one turn behind, whatever the order of turns
        visits = {
            "training": timed(lambda _: training.turn()),
            "training in one scan": timed(lambda _: scan.turn()),
            "replay": timed(lambda _: again.turn()),
        }
        rounds = steps // turn - LEAST_TURNS + 1
        turns = take_turns(visits, rounds, display, f"{steps} steps", calls=1)
        again.turn()
        log.close()
        begin = time.perf_counter()
        whole = pg.replay.replay(pg.replay.ReplayLog.open(log.path), again.update, base)
        jax.block_until_ready(whole)
        seconds = time.perf_counter() - begin
        log_bytes = log.path.stat().st_size
    seconds_a_step = {name: [s / turn for s in found] for name, found in turns.seconds.items()}
    prints = [pg.replay.fingerprint(s) for s in (training.state, again.state, whole)]
    return {
        "estimator": repr(estimator),
        "parameters": sum(int(np.size(x)) for x in jax.tree.leaves(base)),
        "log_bytes": log_bytes,
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(base)),
        "seconds_a_step": {name: quartiles(found) for name, found in seconds_a_step.items()},
        "replay_seconds": seconds,
        "replay_over_training": ratio_quartiles(turns.seconds["replay"], turns.seconds["training"]),
        "busy": turns.busy,
        "same_bits": len(set(prints)) == 1,
    }


class Training:
    """Trains with a log, one turn at a time."""

    def __init__(self, trainer: LoggedTrainer, log: pg.replay.ReplayLog, base: Any, turn: int):
        self.trainer, self.log, self.size = trainer, log, turn
        self.state, self.step = trainer.update.init(base), 0

    def turn(self) -> Any:
        """Takes the next steps."""
        rows = self.trainer.rows(0, self.step, self.size)
        self.state, _ = self.trainer.logged_steps(self.state, self.log, _RATE, 0, self.step, rows)
        self.step += self.size
        return self.state


class Scan:
    """Trains without a log, one turn at a time, each in one scan."""

    def __init__(self, trainer: Trainer, turn: int):
        self.trainer, self.size = trainer, turn
        self.carry, self.step = trainer.start(0), 0

    def turn(self) -> Any:
        """Takes the next steps."""
        rows = self.trainer.rows(0, self.step, self.size)
        self.carry, _, _ = self.trainer.steps(self.carry, _RATE, 0, rows)
        self.step += self.size
        return self.carry


class Replaying:
    """Replays the log, one turn at a time."""

    def __init__(self, update: pg.replay.Update, log: pg.replay.ReplayLog, base: Any, turn: int):
        self.update, self.log, self.size = update, log, turn
        self.state, self.step = update.init(base), 0

    def turn(self) -> Any:
        """Takes the next steps from the log."""
        for record in self.log.records[self.step : self.step + self.size]:
            numbers = int(record["step"]), int(record["seed"]), float(record["rate"])
            self.state = self.update(self.state, *numbers, record["derivatives"])
        self.step += self.size
        return self.state
