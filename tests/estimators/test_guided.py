"""A guess of the gradient: what is exact, what is unbiased, and what it is worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models

import prograde as pg
from prograde.testing import assert_unbiased


def problem(key):
    params, losses, args = site_models.relu_mlp(key)
    loss = lambda p, *args: losses(p, *args).mean()
    return params, loss, args, jax.jit(jax.grad(loss))


def close(a, b, **kwargs):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **{"rtol": 1e-4, "atol": 1e-5, **kwargs})


@pytest.mark.parametrize("use", ["control_variate", "projection"])
def test_the_gradient_as_guess_is_returned(use, key):
    params, loss, args, gradient = problem(key)
    grad_fn = jax.jit(pg.value_and_grad(loss, pg.Guided(gradient, use, num_tangents=3)))
    close(grad_fn(key, params, *args), (loss(params, *args), gradient(params, *args)))


def test_the_projection_is_that_of_the_gradient_on_the_guess(key):
    params, loss, args, gradient = problem(key)
    guess = jax.tree.map(
        lambda w: jnp.sin(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), params
    )
    grad_fn = jax.jit(pg.value_and_grad(loss, pg.Guided(lambda p, *a: guess, "projection")))
    _, grads = grad_fn(key, params, *args)
    g, u = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
        for t in (gradient(params, *args), guess)
    )
    np.testing.assert_allclose(
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)]),
        g @ u / (u @ u) * u,
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("distribution", [pg.LowRank(1), pg.Rademacher()], ids=repr)
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_control_variate_is_the_guess_and_the_forward_gradient_of_the_rest(
    distribution, chunk, key
):
    """From the same tangents: g(f) for a guess c is c + g(f - c . theta), and estimates are linear
    in the function."""
    params, loss, args, _ = problem(key)
    guess = jax.tree.map(
        lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), params
    )
    left = lambda p, *a: loss(p, *a) - sum(jnp.sum(p[name] * guess[name]) for name in p)
    of = lambda e, f: jax.jit(lambda p: e.estimate(f, key, None, p, *args).grads)(params)
    plain = of(pg.WeightPerturbation(distribution, 3), left)
    guided = pg.Guided(lambda p, *a: guess, tangents=distribution, num_tangents=3, chunk=chunk)
    grads = of(guided, loss)
    close(grads, jax.tree.map(jnp.add, guess, plain), atol=1e-4)


@pytest.mark.parametrize("guess", ["previous", "momentum"])
def test_unbiased_whatever_the_state(guess, key):
    params, loss, args, _ = problem(key)
    state = jax.tree.map(
        lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), params
    )
    assert_unbiased(pg.Guided(guess), loss, jax.random.fold_in(key, 1), params, *args, state=state)


def test_states_are_the_last_estimate_and_the_average(key):
    params, loss, args, _ = problem(key)
    previous, momentum = pg.Guided("previous"), pg.Guided("momentum", decay=0.75)
    of = lambda e: jax.jit(lambda key, s: e.estimate(loss, key, s, params, *args))
    result = of(previous)(key, previous.init(loss, params, *args))
    close(result.state, result.grads)
    state = momentum.init(loss, params, *args)
    step = of(momentum)
    first = step(key, state)
    second = step(jax.random.fold_in(key, 1), first.state)
    close(
        second.state,
        jax.tree.map(lambda a, b: 0.75 * 0.25 * a + 0.25 * b, first.grads, second.grads),
    )


def test_the_average_lowers_the_error_where_the_gradient_stands_still(key):
    params, loss, args, gradient = problem(key)
    exact = gradient(params, *args)
    n = sum(w.size for w in jax.tree.leaves(params))
    error = lambda g: sum(
        float(jnp.sum((a - b) ** 2))
        for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(exact), strict=True)
    )
    errors = {}
    for estimator in (
        pg.Guided("momentum", num_tangents=n, decay=0.8),
        pg.WeightPerturbation(num_tangents=n),
    ):
        state = estimator.init(loss, params, *args)
        step = jax.jit(lambda k, s, e=estimator: e.estimate(loss, k, s, params, *args))
        found = []
        for k in jax.random.split(jax.random.fold_in(key, 1), 60):
            result = step(k, state)
            state = result.state
            found.append(error(result.grads))
        errors[type(estimator)] = np.mean(found[20:])
    assert errors[pg.Guided] < 0.5 * errors[pg.WeightPerturbation]


def test_guesses_that_do_not_fit_are_refused(key):
    params, loss, args, _ = problem(key)
    with pytest.raises(
        ValueError, match=r"the guess has the structure and shapes.*those of the parameters"
    ):
        pg.value_and_grad(loss, pg.Guided(lambda p, *a: {"w": p["w"]}))(key, params, *args)
    with pytest.raises(ValueError, match=r"state has the structure and shapes"):
        pg.Guided().estimate(loss, key, None, params, *args)
    with pytest.raises(ValueError, match=r"never leaves that line"):
        pg.Guided("momentum", "projection")
    with pytest.raises(ValueError, match=r"guess='last'"):
        pg.Guided("last")
    with pytest.raises(ValueError, match=r"decay=1.0"):
        pg.Guided(decay=1.0)
