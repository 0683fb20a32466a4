"""One worker of a small training run. `kills` and tests start several workers and kill some.

    python -m prograde.lab.studies.kills.worker DIR STEPS [NAME=VALUE ...]

It resumes from existing logs, and writes the fingerprint of its parameters at the end.
Options: `timeout` and `flush_every`, as in `prograde.distributed` and `prograde.replay`; `sleep`:
seconds to wait after each step; `order`: a fact that all workers must share; `spoil`: the step at
which worker 1 changes a parameter.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import prograde as pg
from prograde.lab.processes import workers


def loss(params, x, y):
    """Returns the squared error of a network with one hidden layer, for each example."""
    hidden = jnp.tanh(x @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2, axis=-1)


def main(directory: Path, steps: int, options: dict[str, str]) -> None:
    """Runs the worker."""
    pg.distributed.initialize(timeout=int(options.get("timeout", 20)))
    here = jax.process_index()
    facts = {"steps": steps, "order of the data": int(options.get("order", 0))}
    pg.distributed.agree(facts, timeout=20)
    mesh = jax.make_mesh((jax.device_count(),), ("workers",))
    estimator = pg.WeightPerturbation(num_tangents=4)
    shared = pg.distributed.Distributed(estimator, mesh, data="workers")
    update = pg.replay.Update(estimator, optax.adam(1.0))

    k1, k2, k3 = jax.random.split(jax.random.key(1), 3)
    base = {
        "in": jax.random.normal(k1, (16, 32)) / 4,
        "bias": jnp.zeros(32),
        "out": jax.random.normal(k2, (32, 4)) / 6,
    }
    examples = np.asarray(jax.random.normal(k3, (64, 16)))
    path = directory / str(here) / "run.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "pid").write_text(str(os.getpid()))
    workers.share_files(path.parent)
    if path.exists():  # its own log, or the log of the worker that got furthest
        log = pg.replay.ReplayLog.open(path, append=True)
    else:
        log = pg.replay.ReplayLog.create(path, base, update)
    log.flush_every = int(options.get("flush_every", 5))
    (path.parent / "start.json").write_text(json.dumps({"from": len(log)}))

    state = update.init(base)
    derivatives_of = jax.jit(
        lambda params, key, x, y: shared.derivatives(loss, key, params, x, y)[::2]
    )
    for step in range(steps):
        if step < len(log.records):
            derivatives = jnp.asarray(log.records["derivatives"][step])
        else:
            x = np.roll(examples, step, axis=0)[:16]
            value, derivatives = derivatives_of(
                state.params, update.key(7, step), x, np.sin(x[:, :4])
            )
            log.append(step, 7, 0.01, value, derivatives)
            time.sleep(float(options.get("sleep", 0)))
        if step == int(options.get("spoil", -1)) and here == 1:
            state = state._replace(
                params=state.params | {"bias": np.asarray(state.params["bias"]) + np.float32(1e-6)}
            )
        state = update(state, step, 7, 0.01, derivatives)
        if step % 20 == 19:
            pg.distributed.check_replicas(state.params, mesh, step + 1)
    log.close()
    (path.parent / "final").write_text(pg.replay.fingerprint(state.params))


if __name__ == "__main__":
    try:
        main(
            Path(sys.argv[1]), int(sys.argv[2]), dict(option.split("=") for option in sys.argv[3:])
        )
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly exit waits for the other processes, and one may be gone
