"""One worker of `prograde links`: trains on request, and reports the time of each step.

It reads jobs from its standard input, one JSON object a line. It answers each with a line that
begins with `@`, because Gloo prints to standard output as well.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

SETTINGS = json.loads(sys.argv[1])
os.sched_setaffinity(0, SETTINGS["cores"])  # before JAX starts one thread for each core

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import prograde as pg  # noqa: E402
from prograde.lab.models.workloads import WORKLOADS  # noqa: E402

RATE = 1e-6  # learning rate, so small that noisy steps do not diverge


def sent() -> int:
    """Returns the bytes that left this machine, with headers; 0 without a link."""
    found = re.search(r"net0:(.*)", Path("/proc/net/dev").read_text())
    return int(found[1].split()[8]) if found else 0


def settled() -> int:
    """Returns the same, after all data on its way has been acknowledged."""
    time.sleep(SETTINGS["settle"])
    return sent()


class Job:
    """A training step of one workload and method, compiled, with its parameters and batch."""

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        workload: str,
        batch: int,
        method: str,
        tangents: int,
        sizes: dict,
    ):
        # the loss of one worker's part
        own = WORKLOADS[workload](batch=batch // mesh.size, **sizes)
        self.estimator = (
            pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=tangents)
            if method == "weight"
            else pg.Backprop()
        )
        grad_fn = pg.distributed.value_and_grad(
            lambda params, *batch: own.loss(params, {}, *batch)[0],
            self.estimator,
            mesh,
            data="workers",
        )

        def step(params, index, *batch):
            key = jax.random.fold_in(jax.random.key(7), index)
            value, grads = grad_fn(key, params, *batch)
            return jax.tree.map(lambda w, g: w - RATE * g, params, grads), value

        def of_all(spec, x):
            return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), np.asarray(x))

        self.params = jax.tree.map(
            lambda x: of_all(PartitionSpec(), x), own.init(jax.random.key(0))[0]
        )
        drawn = own.batch(jax.random.key(1 + jax.process_index()))
        self.batch = [of_all(PartitionSpec("workers"), x) for x in drawn]
        begin = time.perf_counter()
        self.step = (
            jax.jit(step, donate_argnums=0).lower(self.params, np.int32(0), *self.batch).compile()
        )
        self.compile_seconds = time.perf_counter() - begin
        self.count = 0

    def run(self, steps: int) -> dict:
        """Takes steps and waits for each; returns seconds, bytes and the last loss."""
        seconds, value, before = [], np.float32(np.nan), settled()
        for _ in range(steps):
            begin = time.perf_counter()
            self.params, value = self.step(self.params, np.int32(self.count), *self.batch)
            jax.block_until_ready((self.params, value))
            seconds.append(time.perf_counter() - begin)
            self.count += 1
        return {"seconds": seconds, "bytes": (settled() - before) / steps, "loss": float(value)}

    def facts(self) -> dict:
        """Returns what the compiled step exchanges, and what `payload` predicts."""
        collectives = re.findall(
            r"= (.*?) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)\(",
            self.step.as_text() or "",
        )
        return {
            "parameters": sum(x.size for x in jax.tree.leaves(self.params)),
            "payload": pg.distributed.payload(self.estimator, self.params),
            "collectives": [f"{kind} {shape}" for shape, kind in collectives],
            "compile_seconds": self.compile_seconds,
        }


def update_seconds(workload: str, tangents: int, steps: int) -> list[float]:
    """Measures the seconds of SGD updates from given derivatives along several tangents.

    The first two updates, which include compilation, do not count.
    """
    estimator = pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=tangents)

    def update(params, index, derivatives):
        grads = estimator.gradient(
            jax.random.fold_in(jax.random.key(7), index), params, derivatives
        )
        return jax.tree.map(lambda w, g: w - RATE * g, params, grads)

    params, seconds = WORKLOADS[workload]().init(jax.random.key(0))[0], []
    compiled, derivatives = jax.jit(update, donate_argnums=0), np.ones((tangents, 1, 1), np.float32)
    for i in range(steps + 2):
        begin = time.perf_counter()
        params = jax.block_until_ready(compiled(params, np.int32(i), derivatives))
        seconds.append(time.perf_counter() - begin)
    return seconds[2:]


def main() -> None:
    """Answers jobs until standard input ends."""
    if SETTINGS["processes"] > 1:
        pg.distributed.initialize(
            SETTINGS["coordinator"], SETTINGS["processes"], SETTINGS["process"], timeout=120
        )
    mesh = jax.make_mesh((jax.device_count(),), ("workers",), axis_types=(AxisType.Auto,))
    jobs: dict[str, Job] = {}

    def answer(found: dict) -> None:
        print("@" + json.dumps(found), flush=True)

    answer({"ready": jax.device_count()})
    for line in sys.stdin:
        asked = json.loads(line)
        name = json.dumps(asked["job"])
        if asked["do"] == "idle":
            before = sent()
            time.sleep(asked["seconds"])
            answer({"bytes_a_second": (sent() - before) / asked["seconds"]})
        elif asked["do"] == "forget":
            jobs.clear()
            answer({})
        elif asked["do"] == "compile":
            jobs[name] = Job(mesh, **asked["job"])
            answer(jobs[name].facts())
        elif asked["do"] == "update":
            answer(
                {"seconds": update_seconds(asked["workload"], asked["tangents"], asked["steps"])}
            )
        elif asked["do"] == "run":
            answer(jobs[name].run(asked["steps"]))
        elif asked["do"] == "checksums":
            local = jax.tree.map(lambda x: x.addressable_data(0), jobs[name].params)
            answer({"checksums": np.asarray(pg.distributed.checksums(local)).tolist()})


if __name__ == "__main__":
    main()
