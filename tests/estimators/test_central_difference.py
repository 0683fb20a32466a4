"""Central differences in few bits: weights that the step hardly moves, and losses that hide it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg


@pytest.mark.parametrize(
    ("dtype", "weight", "step"),
    [
        (jnp.bfloat16, 8.0, 0.01),
        (jnp.bfloat16, 8.0, 0.03),
        (jnp.bfloat16, 3.0, 0.02),
        (jnp.bfloat16, -300.0, 0.01),
        (jnp.float16, 100.0, 0.01),
        (jnp.float32, 100.0, 1e-6),
        (jnp.float32, 1e6, 1e-3),
        (jnp.float32, 0.0, 1e-6),
    ],
)
@pytest.mark.parametrize("distribution", [pg.Rademacher(), pg.Basis(), pg.Sphere()], ids=repr)
def test_the_slope_of_a_weight_is_exact_however_coarse_its_rounding(
    dtype, weight, step, distribution, key
):
    """One weight, f = w in float32: every difference over its realised displacement is 1."""
    estimator = pg.CentralDifference(distribution, step=step)
    loss = lambda w: jnp.sum(w.astype(jnp.float32))
    grads = estimator.estimate(loss, key, None, jnp.full((1,), weight, dtype)).grads
    np.testing.assert_allclose(np.asarray(grads, np.float32), 1.0, rtol=1e-2)


def test_large_and_small_weights_together(key):
    """All coordinates give the gradient of a linear function at weights of any size."""
    w = jnp.asarray([8.0, 0.1, -300.0, 1e-3, 40.0, 2.0], jnp.bfloat16)
    slopes = jnp.asarray([1.0, -2.0, 0.5, 3.0, -1.0, 2.0])
    loss = lambda w: jnp.sum(slopes * w.astype(jnp.float32))
    estimator = pg.CentralDifference(pg.Basis(), 6, step=0.01)
    grads = estimator.estimate(loss, key, None, w).grads
    np.testing.assert_allclose(np.asarray(grads, np.float32), slopes, rtol=0.1)


def test_a_replayed_gradient_divides_by_the_same_displacements(key):
    w = jnp.asarray([[8.0, 0.1], [-300.0, 2.0]], jnp.bfloat16)
    loss = lambda w: jnp.sum(jnp.sin(w.astype(jnp.float32) / 100))
    estimator = pg.CentralDifference(pg.Rademacher(), 3, step=0.01)
    numbers = estimator.derivatives(loss, key, w)[2]
    replayed = estimator.gradient(jax.random.clone(key), w, numbers)
    grads = estimator.estimate(loss, jax.random.clone(key), None, w).grads
    np.testing.assert_array_equal(replayed.astype(jnp.float32), grads.astype(jnp.float32))


def test_steps_that_weights_resolve_are_those_of_the_formula(key):
    """d v with d = (f(w + h v) - f(w - h v)) / (2 h), to the bit, in float32."""
    w = jnp.asarray([0.3, -2.0, 5.0])
    loss = lambda w: jnp.sum(jnp.sin(w))
    v, h = pg.Rademacher().sample(key, w), jnp.float32(1e-3)
    found = pg.CentralDifference().estimate(loss, jax.random.clone(key), None, w)
    d = (loss(w + h * v) - loss(w - h * v)) / jnp.float32(2e-3)
    np.testing.assert_allclose(found.grads, d * v, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_loss_that_resolves_less_than_the_step_is_refused(dtype, key):
    loss = lambda w: jnp.sum(w**2).astype(dtype)
    step = float(jnp.finfo(dtype).eps) / 2
    with pytest.raises(ValueError, match=r"step=.*loss of dtype .*float16 resolves.*float32"):
        jax.jit(lambda w: pg.CentralDifference(step=step).estimate(loss, key, None, w).grads)(
            jnp.ones(4)
        )


def test_differences_that_drown_in_the_rounding_of_the_loss_are_named(key):
    loss = lambda w: 1e6 + jnp.sum(w)
    with pytest.warns(RuntimeWarning, match=r"step=1e-05 changes the loss by.*float32 rounds by"):
        pg.CentralDifference(step=1e-5).estimate(loss, key, None, jnp.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pg.CentralDifference(step=0.1).estimate(
            lambda w: jnp.sum(w), jax.random.clone(key), None, jnp.ones(3)
        )
