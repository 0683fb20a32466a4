"""Costs that the project promises: imports, a training step, the training loop, memory against depth.

Run on an otherwise idle machine: `make bench-basics`, or `python benchmarks/basics.py --out FILE`. Writes a record, prints a table.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from prograde.lab import costs, experiments, records, train


@dataclass(frozen=True)
class Arguments:
    """What to measure and where to write it."""

    out: Path = Path("runs/bench/basics.json")
    """The record."""
    rounds: int = 40
    """Rounds of the interleaved timings."""


def seconds(*command: str) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def imports(rounds: int = 9) -> dict:
    """Seconds `import prograde` takes beyond `import jax`, each in a fresh process, in turns."""
    differences = []
    for _ in range(rounds):
        jax_alone = seconds(sys.executable, "-c", "import jax")
        differences.append(seconds(sys.executable, "-c", "import jax, prograde") - jax_alone)
    return {"seconds": statistics.median(differences), "n": rounds}


def beale() -> dict:
    """Seconds from the start of the process to the end of `prograde reproduce beale`."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "seconds": seconds(
                sys.executable,
                "-m",
                "prograde.lab.cli",
                "reproduce",
                "beale",
                "--out",
                f"{folder}/b",
            )
        }


def mlp_step(rounds: int) -> dict:
    """A full SGD step of the MLP at batch 64 over the bare forward pass, in the lab's training loop."""
    experiment, data = experiments.EXPERIMENTS["mlp"], costs.synthetic_data()
    methods = {name: experiments.METHODS[name] for name in ("low-rank", "backprop")}
    trainers = {
        name: train.Trainer(experiment, estimator, data) for name, estimator in methods.items()
    }
    trainers = {"bare": train.Trainer(experiment, None, data), **trainers}
    return costs.step_seconds(trainers, rounds, lambda i: None)


def loop_overhead(rounds: int, steps: int = 50) -> dict:
    """A step in the training loop over a bare jitted step on a batch that lies ready, dispatched one by one."""
    found = {}
    for method in ("low-rank", "backprop"):
        experiment, data = experiments.EXPERIMENTS["mlp"], costs.synthetic_data()
        looped = train.Trainer(experiment, experiments.METHODS[method], data)
        bare = train.Trainer(
            dataclasses.replace(experiment, in_scan=False), experiments.METHODS[method], data
        )
        rows = looped.rows(0, 0, steps)
        ready = jax.numpy.asarray(rows[0])
        rate, key = train.Rate(jax.numpy.float32(0), jax.numpy.float32(steps)), looped._keys(0)[1]
        carries = [looped.start(0), bare.start(0)]
        ratios = []
        for i in range(rounds + 1):
            begin = time.perf_counter()
            carries[0], losses, _ = looped.steps(carries[0], 0.0, 0, rows)
            np.asarray(losses)
            middle = time.perf_counter()
            for _ in range(steps):
                carries[1], _ = bare._jitted(carries[1], rate, key, bare.train_data, ready)
            jax.block_until_ready(carries[1])
            if i > 0:
                ratios.append((middle - begin) / (time.perf_counter() - middle))
        low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
        found[method] = {"ratio": median, "low": low, "high": high, "n": rounds}
    return found


def main(arguments: Arguments) -> None:
    record = {
        "environment": records.environment(),
        "import_beyond_jax": imports(),
        "beale": beale(),
        "mlp_step": mlp_step(arguments.rounds),
        "loop_overhead": loop_overhead(arguments.rounds // 2),
    }
    records.write_json(arguments.out, record)
    print(
        f"import prograde, beyond import jax: {record['import_beyond_jax']['seconds']:.2f} s (at most 0.5)"
    )
    print(f"prograde reproduce beale: {record['beale']['seconds']:.1f} s (at most 20)")
    for method, cost in record["mlp_step"].items():
        print(
            f"MLP step, batch 64, {method}: {1e3 * cost['seconds']['median']:.2f} ms, R {cost['ratio']['median']:.2f}"
        )
    for method, cost in record["loop_overhead"].items():
        print(f"training loop over bare step, {method}: {cost['ratio']:.3f} (at most 1.05)")
    print(f"record: {arguments.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
