"""A structured tangent pushed through a program by the rules.

And the same tangent formed and pushed by `jax.jvp`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from comparisons import dense

import prograde as pg

DISTRIBUTIONS = [pg.LowRank(1), pg.LowRank(2, pg.Normal()), pg.Separable(2)]


def array(*shape, dtype="float64"):
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def directional(loss, w, distribution, key):
    return pg.WeightPerturbation(distribution).estimate(loss, key, None, w).directional[0]


def directional_and_twin(loss, w, distributions, key, jit=True):
    """grad .

    v through the rules, and by plain jax.jvp along the dense tangent, for each distribution.
    """

    def both(w, key):
        actual = [directional(loss, w, distribution, key) for distribution in distributions]
        tangents = [dense(distribution.sample(key, w)) for distribution in distributions]
        _, expected = jax.vmap(lambda v: jax.jvp(loss, (w,), (v,)))(jnp.stack(tangents))
        return jnp.stack(actual), expected

    with jax.debug_key_reuse(False):  # the same key on purpose
        return (jax.jit(both) if jit else both)(w, key)


def fallbacks(loss, w, distribution):
    return [
        f.primitive
        for _, f in pg.check(
            loss, w, estimator=pg.WeightPerturbation(distribution), memory=False
        ).dense
    ]
