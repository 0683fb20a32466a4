"""Gradients of online learners are those of backpropagation through time."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from streams import T, assert_close, gru, problem, squared, sum_of_gradients, through_time

import prograde as pg
from prograde.online import DODGE, RTRL, UORO, Momentum, TruncatedBackprop, learn
from prograde.testing import assert_unbiased


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one stream", "three streams"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_rtrl_equals_backprop_through_time(key, batch, chunk):
    """One stream goes by the Jacobian of the state, several by a tangent for each parameter."""
    with jax.enable_x64(True):
        params, state, inputs, targets = problem(key, batch, dtype=jnp.float64)
        found, carry = sum_of_gradients(
            RTRL(gru, squared, chunk=chunk), key, params, state, inputs, targets
        )
        assert_close(found, jax.grad(through_time)(params, state, inputs, targets), 1e-11)
        assert int(carry.state["steps"]) == int(carry.step) == T


def test_rtrl_carries_the_derivative_of_the_state(key):
    params, state, inputs, targets = problem(key)
    _, carry = sum_of_gradients(RTRL(gru, squared), key, params, state, inputs, targets)
    last = lambda params: lax.scan(lambda s, x: (gru(params, s, x)[0], None), state, inputs)[0]["h"]
    expected = jax.jacrev(last)(params)
    expected = jnp.concatenate([expected[k].reshape(5, -1) for k in sorted(params)], axis=1)
    np.testing.assert_allclose(carry.memory, expected.T, atol=1e-5)


@pytest.mark.parametrize("window", [T, 5])
def test_dodge_along_the_whole_basis_equals_backprop_through_each_window(key, window):
    """With a window as long as the stream that is RTRL."""
    params, state, inputs, targets = problem(key)
    n = sum(w.size for w in jax.tree.leaves(params))
    learner = DODGE(gru, squared, window=window, directions=pg.Basis(), num_tangents=n)
    found, _ = sum_of_gradients(learner, key, params, state, inputs, targets)
    expected = jax.tree.map(jnp.zeros_like, params)
    for start in range(0, T, window):
        part = slice(start, start + window)
        expected = jax.tree.map(
            jnp.add, expected, jax.grad(through_time)(params, state, inputs[part], targets[part])
        )
        state = lax.scan(lambda s, x: (gru(params, s, x)[0], None), state, inputs[part])[0]
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize("distribution", [pg.Normal(), pg.LowRank(1)], ids=repr)
def test_dodge_is_the_forward_gradient_of_its_window(key, distribution):
    """The same directions through the unrolled window, as one forward run."""
    params, state, inputs, targets = problem(key, units=8)
    learner = DODGE(gru, squared, window=T, directions=distribution, num_tangents=3)
    first = jax.random.fold_in(key, 0)
    forward = pg.WeightPerturbation(distribution, num_tangents=3)
    expected = forward.estimate(through_time, first, None, params, state, inputs, targets).grads
    found, _ = sum_of_gradients(learner, key, params, state, inputs, targets)
    assert_close(found, expected, 1e-5)


def test_a_guess_by_truncated_backprop_is_the_gradient_of_the_past_window(key):
    params, state, inputs, targets = problem(key)
    learner = DODGE(gru, squared, window=T // 2, directions=TruncatedBackprop(), num_tangents=1)
    _, carry = sum_of_gradients(learner, key, params, state, inputs, targets)
    guess = jax.grad(through_time)(params, state, inputs[: T // 2], targets[: T // 2])
    assert_close(jax.tree.map(lambda v: v[0], carry.memory.directions), guess, 1e-5)


@pytest.mark.parametrize("length", [1e-5, 1.0, 1e5])
def test_a_projection_onto_a_guess_reaches_the_gradient_that_lies_in_its_span(key, length):
    """The directions are the true gradient of the coming window, of any length, and rubbish."""
    params, state, inputs, targets = problem(key)
    gradient = jax.grad(through_time)(params, state, inputs, targets)
    directions = lambda key, past: jax.tree.map(
        lambda g: jnp.stack([length * g, jnp.cos(jnp.arange(g.size)).reshape(g.shape)]), gradient
    )
    learner = DODGE(gru, squared, window=T, directions=directions, num_tangents=2)
    found, _ = sum_of_gradients(learner, key, params, state, inputs, targets)
    assert_close(found, gradient, 1e-4)


def test_momentum_is_the_running_mean_of_the_estimates(key):
    params, state, inputs, targets = problem(key)
    learner = DODGE(gru, squared, window=4, directions=Momentum(0.5), num_tangents=2)
    step = jax.jit(learner.step)
    carry, mean = learner.init(params, state, inputs[0], targets[0]), None
    for start in range(0, T, 4):
        total = jax.tree.map(jnp.zeros_like, params)
        for t in range(start, start + 4):
            carry, _, grads = step(key, carry, inputs[t], targets[t])
            total = jax.tree.map(lambda a, g: a + g / 4, total, grads)
        if start:
            assert_close(jax.tree.map(lambda v: v[0], carry.memory.directions), mean, 1e-5)
        mean = total if mean is None else jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, mean, total)


@dataclass(frozen=True)
class Online(pg.Estimator):
    """The sum of a learner's gradients over a stream estimates that of the sum of the losses."""

    learner: pg.online.OnlineLearner

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        grads, _ = sum_of_gradients(self.learner, key, params, *args)
        return pg.Estimate(jnp.zeros(()), None, grads, None, state)


@pytest.mark.parametrize(
    "learner",
    [
        UORO(gru, squared),
        UORO(gru, squared, num_products=4),
        DODGE(gru, squared, window=T, num_tangents=16),
    ],
    ids=["UORO", "UORO with 4 products", "DODGE"],
)
def test_unbiased(key, learner):
    """The projection on the gradient to 5 %, and each coordinate; error rates 1e-6 each."""
    params, state, inputs, targets = problem(key, units=2)
    arguments = (params, state, inputs[:5], targets[:5])
    assert_unbiased(Online(learner), through_time, jax.random.fold_in(key, 1), *arguments)


def influence_balancing(units=23, positive=10):
    """The task on which truncated backprop has the wrong sign (arXiv 1702.05043, section 5.1).

    s <- A s + theta (1, .., 1, -1, .., -1), with 1/2 on the diagonal of A and above. The loss is
    (s_1 - 1)^2 / 2. At rest
    s_1 = 2 (positive - negative) theta.
    """
    a = 0.5 * (jnp.eye(units) + jnp.eye(units, k=1))
    direction = jnp.where(jnp.arange(units) < positive, 1.0, -1.0)

    def cell(theta, s, _):
        s = a @ s + theta * direction
        return s, s[0]

    return cell, lambda output, _: (output - 1) ** 2 / 2, 2.0 * (2 * positive - units)


@pytest.mark.parametrize(("learner", "steps"), [(RTRL, 5000), (UORO, 40_000)], ids=["RTRL", "UORO"])
def test_influence_balancing_is_learned_where_truncated_backprop_has_the_wrong_sign(
    key, learner, steps
):
    cell, loss, gain = influence_balancing()
    stream = jnp.zeros((steps, 1))
    online, optimizer = learner(cell, loss), optax.sgd(1e-4 if learner is RTRL else 2e-5)
    theta = jnp.array(0.5)
    carry = online.init(theta, jnp.zeros(23))
    carry, _, losses = learn(online, optimizer, key, carry, optimizer.init(theta), stream, stream)
    assert float(jnp.mean(losses[-100:])) < 1e-2
    assert float(carry.params) == pytest.approx(1 / gain, abs=0.02)
    # at rest with theta = 0.5 the loss falls where theta does; ten steps back do not show it
    rest = lax.scan(lambda s, x: (cell(theta, s, x)[0], None), jnp.zeros(23), stream[:200])[0]
    truncated = jax.grad(
        lambda th: loss(lax.scan(lambda s, x: cell(th, s, x), rest, stream[:10])[1][-1], 0.0)
    )(theta)
    assert float(truncated) * (0.5 * gain - 1) * gain < 0


def test_a_cell_with_a_loop_of_unknown_length_is_learned_forward_and_refused_by_uoro(key):
    """s <- sqrt(s + a x^2) by Newton's method, which iterates until it has converged."""

    def cell(a, s, x):
        square = s + a * x**2 + 1.0
        root = lax.while_loop(
            lambda r: jnp.abs(r * r - square) > 1e-5, lambda r: (r + square / r) / 2, square
        )
        return root, root

    closed = lambda a, s, x: (lambda root: (root, root))(jnp.sqrt(s + a * x**2 + 1.0))
    loss = lambda output, target: (output - target) ** 2
    inputs = jax.random.normal(key, (T,))
    total = lambda a: jnp.sum(
        loss(lax.scan(lambda s, x: closed(a, s, x), jnp.array(1.0), inputs)[1], 2.0)
    )
    a = jnp.array(0.7)
    found, _ = sum_of_gradients(RTRL(cell, loss), key, a, jnp.array(1.0), inputs, jnp.full(T, 2.0))
    np.testing.assert_allclose(found, jax.grad(total)(a), rtol=1e-4)
    learner = UORO(cell, loss)
    with pytest.raises(ValueError, match="Use DODGE or RTRL, which are forward only"):
        learner.step(key, learner.init(a, jnp.array(1.0)), inputs[0], 2.0)


def test_uoro_forgets_with_the_state(key):
    """After a reset no derivative and no noise goes back: the next gradient is exact."""

    def cell(params, state, x):
        following, output = gru(params, state, x)
        return following | {"h": jnp.where(x[0] > 100, 0.0, following["h"])}, output

    params, state, inputs, targets = problem(key)
    inputs = inputs.at[7, 0].set(1000.0)
    step = {}
    for learner in (UORO(cell, squared), RTRL(cell, squared)):
        carry, advance = learner.init(params, state), jax.jit(learner.step)
        for t in range(9):
            carry, _, grads = advance(key, carry, inputs[t], targets[t])
        step[type(learner)] = grads
    assert_close(step[UORO], step[RTRL], 1e-5)


def test_steps_with_one_key_draw_anew(key):
    """The same signs at every step would leave the cross terms of UORO in its mean."""
    params, state, inputs, targets = problem(key)
    learner = UORO(gru, squared)
    step = jax.jit(learner.step)
    carry, _, _ = step(key, learner.init(params, state), inputs[0], targets[0])
    again, _, _ = step(key, carry, inputs[0], targets[0])
    assert not np.array_equal(jnp.sign(carry.memory[0]), jnp.sign(again.memory[0]))
