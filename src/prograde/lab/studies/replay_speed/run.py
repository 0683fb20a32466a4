"""Trains the MLP with a replay log, makes the same parameters again from the log, and compares bits, time and size.

`python benchmarks/replay.py --out records/replay.json`. Training and replaying take turns, a few hundred steps each, so that what
disturbs the machine disturbs both. Writes a record, prints it.
"""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

import prograde as pg
from prograde.lab import costs, experiments, records
from prograde.lab.train import Trainer


@dataclass(frozen=True)
class Arguments:
    """What to measure and where to write it."""

    out: Path = Path("runs/bench/replay.json")
    """The record."""
    steps: int = 10_000
    """Steps of the run."""
    turn: int = 500
    """Steps of a turn."""


def timed(function):
    begin = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - begin


def main(arguments: Arguments) -> None:
    experiment, data = experiments.EXPERIMENTS["mlp"], costs.synthetic_data()
    estimator = experiments.METHODS["low-rank"]
    assert isinstance(estimator, pg.SeededEstimator)
    trainer = Trainer(experiment, estimator, data, mesh=jax.make_mesh((1,), ("workers",)))
    in_scan = Trainer(experiment, estimator, data)
    assert trainer.update is not None
    trainer.warm_up(0)
    base = trainer.start(0)[0]
    scanned = in_scan.steps(in_scan.start(0), 1e-3, 0, in_scan.rows(0, 0, arguments.turn))[0]
    seconds: dict[str, list[float]] = {"training": [], "training in one scan": [], "replay": []}
    with tempfile.TemporaryDirectory() as folder:
        log = pg.replay.ReplayLog.create(Path(folder) / "run.log", base, trainer.update)
        log.flush_every = arguments.turn
        replayed = pg.replay.Update(estimator, trainer.update.optimizer)
        state, again = trainer.update.init(base), replayed.init(base)
        for first in range(0, arguments.steps, arguments.turn):
            count = min(arguments.turn, arguments.steps - first)
            rows = trainer.rows(0, first, count)
            (state, _), spent = timed(
                lambda: trainer.logged_steps(state, log, 1e-3, 0, first, rows)
            )
            seconds["training"].append(spent / count)
            scanned, spent = timed(lambda: in_scan.steps(scanned, 1e-3, 0, rows)[0])
            seconds["training in one scan"].append(spent / count)

            def of_log(again=again, first=first, count=count):
                for record in log.records[first : first + count]:
                    numbers = int(record["step"]), int(record["seed"]), float(record["rate"])
                    again = replayed(again, *numbers, record["derivatives"])
                return again

            again, spent = timed(of_log)
            if first > 0:  # the first turn compiles
                seconds["replay"].append(spent / count)
        log.close()
        whole, spent = timed(
            lambda: pg.replay.replay(pg.replay.ReplayLog.open(log.path), replayed, base)
        )
        size = log.path.stat().st_size
    prints = [pg.replay.fingerprint(s) for s in (state, again, whole)]
    record = {
        "config": {name: str(value) for name, value in asdict(arguments).items()}
        | {"estimator": repr(estimator)},
        "environment": records.environment(),
        "parameters": sum(int(np.size(x)) for x in jax.tree.leaves(base)),
        "log_bytes": size,
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(base)),
        "seconds_a_step": {name: costs.quartiles(values) for name, values in seconds.items()},
        "replay_seconds": spent,
        "replay_over_training": costs.quartiles(
            [r / t for r, t in zip(seconds["replay"], seconds["training"][1:], strict=True)]
        ),
        "same_bits": len(set(prints)) == 1,
    }
    records.write_json(arguments.out, record)
    print({name: value for name, value in record.items() if name != "environment"})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
