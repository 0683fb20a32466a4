"""A gated cell, a stream for it, and the learners, for the tests of `prograde.online`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import prograde as pg
from prograde.online import DODGE, RTRL, UORO, Momentum, TruncatedBackprop

T = 12
# one for all tests, so that a learner is compiled with it once
OPTIMIZER = optax.adam(0.01)


def gru(params, state, x):
    """A gated cell in a dict, with a counter in its state."""
    h = state["h"]
    from_x, from_h = (
        jnp.split(x @ params["x"] + params["b"], 3, -1),
        jnp.split(h @ params["h"], 3, -1),
    )
    z, r = jax.nn.sigmoid(from_x[0] + from_h[0]), jax.nn.sigmoid(from_x[1] + from_h[1])
    h = (1 - z) * jnp.tanh(from_x[2] + r * from_h[2]) + z * h
    return {"h": h, "steps": state["steps"] + 1}, h @ params["out"]


def squared(output, target):
    return jnp.sum((output - target) ** 2, -1)  # one for each stream where there are several


def squared_error(output, target):
    return (output - target) ** 2


def problem(key, batch=(), units=5, dtype=jnp.float32):
    """(params, state, inputs, targets) of a stream."""
    ks = jax.random.split(jax.random.clone(key), 6)
    normal = lambda k, *shape: jax.random.normal(k, shape, dtype) / shape[0] ** 0.5
    params = {
        "x": normal(ks[0], 3, 3 * units),
        "h": normal(ks[1], units, 3 * units),
        "b": normal(ks[2], 3 * units),
        "out": normal(ks[3], units, 2),
    }
    state = {"h": jnp.zeros((*batch, units), dtype), "steps": jnp.zeros((), jnp.int32)}
    return (
        params,
        state,
        jax.random.normal(ks[4], (T, *batch, 3), dtype),
        jax.random.normal(ks[5], (T, *batch, 2), dtype),
    )


def through_time(params, state, inputs, targets):
    """The sum of the losses, as a function that reverse mode unrolls."""
    step = lambda s, xy: (lambda s, output: (s, jnp.mean(squared(output, xy[1]))))(
        *gru(params, s, xy[0])
    )
    return jnp.sum(lax.scan(step, state, (inputs, targets))[1])


def sum_of_gradients(learner, key, params, state, inputs, targets):
    """The gradients of all steps at the same parameters, summed; and the last carry."""
    carry = learner.init(params, state, inputs[0], targets[0])

    def one(carry, now):
        carry, _, grads = learner.step(key, carry, *now)
        return carry, grads

    carry, grads = lax.scan(one, carry, (inputs, targets))
    return jax.tree.map(lambda g: jnp.sum(g, 0), grads), carry


def assert_close(a, b, rtol):
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale)


LEARNERS = [
    RTRL(gru, squared),
    UORO(gru, squared),
    DODGE(gru, squared, window=7, directions=pg.LowRank(1), num_tangents=2),
    DODGE(gru, squared, window=4, directions=TruncatedBackprop(), num_tangents=2),
    DODGE(gru, squared, window=4, directions=Momentum(), num_tangents=2),
]
NAMES = ["RTRL", "UORO", "DODGE", "DODGE with truncated backprop", "DODGE with momentum"]
