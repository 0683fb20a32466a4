"""Small runs whose logs are committed, so that every later version has to replay them.

    python tests/golden_runs.py DIRECTORY     # logs of this version, and the last parameters

The logs in `tests/replay/golden` were written at commit 0372455, in format 2. They are not to be
written again; logs of another format go beside them.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import prograde as pg
from prograde.replay import ReplayLog, Update

GOLDEN = Path(__file__).parent / "replay" / "golden"
STEPS = 5

_weight, _difference = pg.WeightPerturbation, pg.CentralDifference
_adam = optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0))
RUNS = {
    "rank-one-sgd": (_weight(num_tangents=3), optax.sgd(1.0)),
    "rank-one-adam": (_weight(num_tangents=3), _adam),
    "rank-one-momentum": (_weight(num_tangents=3), optax.sgd(1.0, momentum=0.9)),
    "rank-two-normal": (_weight(pg.LowRank(2, pg.Normal()), num_tangents=2), _adam),
    "normal-by-chunks": (_weight(pg.Normal(), num_tangents=3, chunk=2), _adam),
    "rademacher": (_weight(pg.Rademacher(), num_tangents=2), _adam),
    "sphere": (_weight(pg.Sphere(), num_tangents=2), _adam),
    "basis": (_weight(pg.Basis(), num_tangents=4), _adam),
    "orthogonal": (_weight(pg.Orthogonal(), num_tangents=4), _adam),
    "sparse": (_weight(pg.Sparse(0.25), num_tangents=2), _adam),
    "groups": (_weight(num_tangents=2, num_groups=2), _adam),
    "projection": (_weight(num_tangents=4, combine="projection"), _adam),
    "shrunk": (_weight(num_tangents=4, combine="shrunk"), _adam),
    "difference": (_difference(num_tangents=2, step=0.1), _adam),
    "difference-with-curvature": (
        _difference(num_tangents=2, step=0.1, curvature_power=0.5),
        _adam,
    ),
    "bfloat16": (_weight(num_tangents=3), _adam),
}


def numbers(*shape, stream=0):
    """Numbers from -1 to 1, from bits of Philox, whose stream NumPy guarantees."""
    bits = np.random.Philox(key=[11, stream]).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)) * 2.0**-53 * 2 - 1).astype(np.float32).reshape(shape)


def start(name):
    """The parameters that a run starts from."""
    params = {"in": numbers(6, 8), "bias": numbers(8, stream=1), "out": numbers(8, 3, stream=2)}
    dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
    return {k: jnp.asarray(v, dtype) for k, v in params.items()} | {"steps": 3}


def loss(params, x, y):
    """One loss for each example."""
    hidden = jax.nn.relu(x @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2, axis=-1)


def run(name, path):
    """Writes the log of a run, under a schedule and with a seed of 64 bits: its last parameters."""
    params = start(name)
    update = Update(*RUNS[name])
    x = jnp.asarray(numbers(8, 6, stream=3), params["in"].dtype)
    batch, seed = (x, jnp.sin(x[:, :3])), 2**40 + 7
    derivatives_of = jax.jit(
        lambda key, params: update.estimator.derivatives(loss, key, params, *batch)
    )
    state = update.init(params)
    with ReplayLog.create(path, params, update, {"run": name}) as log:
        for step in range(STEPS):
            rate = 0.01 / (1 + step // 2)
            value, _, derivatives = derivatives_of(update.key(seed, step), state.params)
            log.append(step, seed, rate, value, derivatives)
            state = update(state, step, seed, rate, derivatives)
            if step == 2:
                log.flush()
    return state.params


def flat(params):
    """All float numbers of the parameters, in float32, which holds bfloat16 exactly."""
    leaves = (x for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in leaves])


def main():
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    ends = {name: flat(run(name, directory / f"{name}.log")) for name in RUNS}
    np.savez_compressed(directory / "ends.npz", **ends)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
