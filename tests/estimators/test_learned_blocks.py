"""Blocks chosen by what they bring: unbiased whatever was learned, and learned from d^2 alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg
from prograde.estimators.learned_blocks import BlockState
from prograde.testing import assert_mean

GRADIENT = {"a": jnp.arange(1.0, 13.0).reshape(3, 4) / 10, "b": jnp.array([3.0, -1.0, 2.0])}
PARAMS = jax.tree.map(jnp.zeros_like, GRADIENT)


def linear(params):
    return sum(jnp.vdot(params[k], GRADIENT[k]) for k in GRADIENT)


def state_of(slopes, visits, costs=(1.0, 1.0)):
    numbers = lambda x: jnp.asarray(x, jnp.float32)
    return BlockState(numbers(slopes), jnp.asarray(visits, jnp.int32), numbers(costs))


def test_probabilities_are_by_size_gradient_and_cost_with_a_floor():
    estimator = pg.LearnedBlocks(floor=0.2)
    p = estimator.probability(state_of([4.0, 9.0], [5, 3], [2.0, 1.0]), PARAMS)
    weights = np.sqrt([12 * 4 / 2, 3 * 9])
    np.testing.assert_allclose(p, 0.8 * weights / weights.sum() + 0.1, rtol=1e-6)
    # a block that was not seen counts as the mean of the others; without any, all are even
    p = estimator.probability(state_of([4.0, 0.0], [5, 0]), PARAMS)
    np.testing.assert_allclose(p, 0.8 * np.sqrt([12, 3]) / np.sqrt([12, 3]).sum() + 0.1, rtol=1e-6)
    for slopes in ([0.0, 0.0], [jnp.inf, 1.0]):
        p = estimator.probability(state_of(slopes, [1, 1]), PARAMS)
        np.testing.assert_allclose(p, [0.5, 0.5])


def test_unbiased_whatever_was_learned():
    estimator, state = pg.LearnedBlocks(floor=0.3), state_of([0.01, 30.0], [4, 4])
    squared = {k: float(jnp.vdot(g, g)) for k, g in GRADIENT.items()}
    total = sum(squared.values())

    @jax.jit
    @jax.vmap
    def of(key):
        g = estimator.estimate(linear, key, state, PARAMS).grads
        return jnp.stack([jnp.vdot(g[k], GRADIENT[k]) / total for k in g])

    samples = of(jax.random.split(jax.random.key(3), 40_000))
    assert_mean(samples, [squared[k] / total for k in squared], effect=0.2)


def test_slopes_are_averages_of_squared_derivatives_of_their_block():
    estimator, state = pg.LearnedBlocks(decay=0.9), state_of([0.0, 5.0], [0, 40])
    step = jax.jit(lambda key, state: estimator.estimate(linear, key, state, PARAMS))
    for i in range(8):
        p = estimator.probability(state, PARAMS)
        found = step(jax.random.key(i), state)
        block = int(jnp.any(found.grads["b"] != 0))
        new = p[block] * found.directional[0] ** 2  # along u, of the block alone
        rate = max(1 / (int(state.visits[block]) + 1), 1 - 0.9)
        wanted = state.slopes[block] + rate * (new - state.slopes[block])
        np.testing.assert_allclose(found.state.slopes[block], wanted, rtol=1e-5)
        assert int(found.state.visits[block]) == int(state.visits[block]) + 1
        assert float(found.state.slopes[1 - block]) == float(state.slopes[1 - block])
        state = found.state


def test_costs_are_counted_and_earlier_blocks_cost_more():
    params = [{"w": jnp.ones((32, 32))} for _ in range(3)]

    def loss(p, x):
        for layer in p:
            x = jnp.tanh(x @ layer["w"])
        return jnp.mean(x)

    costs = pg.LearnedBlocks().init(loss, params, jnp.ones((64, 32))).costs
    assert costs[0] > costs[1] > costs[2] == 1


def test_bad_arguments_and_states_are_refused():
    with pytest.raises(TypeError, match="tangents are Blocks"):
        pg.LearnedBlocks(pg.WeightPerturbation())
    with pytest.raises(ValueError, match="combine='mean'"):
        pg.LearnedBlocks(pg.WeightPerturbation(pg.Blocks(), combine="shrunk"))
    with pytest.raises(ValueError, match="floor=0"):
        pg.LearnedBlocks(floor=0)
    with pytest.raises(ValueError, match="decay=1"):
        pg.LearnedBlocks(decay=1.0)
    with pytest.raises(ValueError, match=r"blocks \(\"\['a'\]\""):
        pg.LearnedBlocks().estimate(linear, jax.random.key(0), None, PARAMS)
