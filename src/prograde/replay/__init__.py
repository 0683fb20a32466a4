"""A run as a log of a seed and a few numbers for each step, which gives the parameters again.

Replaying needs the first parameters and no data.

- `Update`: one step of training, given the derivatives;
- `ReplayLog`: the file that holds the steps;
- `replay`: the parameters after the steps of a log;
- `fingerprint`: a digest of parameters.

**Source:** MeZO, arXiv 2305.17333, section 2.1.

Examples:
    >>> import pathlib, tempfile, jax, jax.numpy as jnp, optax, prograde as pg
    >>> base, x = jnp.ones((8, 4)), jnp.eye(8)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.log"
    >>> update = pg.replay.Update(pg.WeightPerturbation(num_tangents=2), optax.adam(1.0))
    >>> @jax.jit
    ... def derivatives_of(key, params):
    ...     return update.estimator.derivatives(lambda w: jnp.mean((x @ w) ** 2), key, params)
    >>> state = update.init(base)
    >>> with pg.replay.ReplayLog.create(path, base, update, steps=5) as log:
    ...     for step in range(5):
    ...         value, _, derivatives = derivatives_of(update.key(7, step), state.params)
    ...         log.append(step, 7, 0.01, value, derivatives)
    ...         state = update(state, step, 7, 0.01, derivatives)
    ...     log.finish(state.params)
    >>> again = pg.replay.replay(pg.replay.ReplayLog.open(path), update, base)  # without the data
    >>> bool((again.params == state.params).all())
    True
"""

from prograde.replay._fingerprint import fingerprint
from prograde.replay._format import LogError
from prograde.replay._log import ReplayLog
from prograde.replay._replay import replay
from prograde.replay._update import Optimizer, TrainState, Update

__all__ = [
    "LogError",
    "Optimizer",
    "ReplayLog",
    "TrainState",
    "Update",
    "fingerprint",
    "replay",
]
