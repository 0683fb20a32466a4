"""`first_nonfinite` names the equation, and nothing where the result is finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import prograde as pg
from prograde.diagnostics import first_nonfinite


def in_scan(x):
    """sqrt of 3, 2, 1, 0: the tangent is infinite at iteration 3."""
    return lax.scan(lambda c, i: (c + jnp.sqrt(3 * x - i), None), 0.0, jnp.arange(5.0))[0]


def in_while(x):
    body = lambda c: (c[0] + 1, c[1] + jnp.log(2 - c[0] * x))
    return lax.while_loop(lambda c: c[0] < 4, body, (0.0, 0.0))[1]


CASES = {
    "sqrt at 0 of what has no tangent": (
        lambda p: jnp.sum(jnp.sqrt(jnp.concatenate([0 * p[:1], p]))),
        jnp.array([1.0, 4.0]),
        ("sqrt", "tangent", ()),
    ),
    "norm at 0": (lambda x: jnp.linalg.norm(x), jnp.zeros(3), ("sqrt", "tangent", ())),
    "power at 0": (lambda x: x**0.5, jnp.asarray(0.0), ("pow", "tangent", ())),
    "where of a product with infinity": (
        lambda x: jnp.where(x > 0, x, 0.0) * jnp.exp(100 * (x + 1)),
        jnp.asarray(0.0),
        ("exp", "value", ()),
    ),
    "value of a logarithm": (lambda x: jnp.log(x - 1), jnp.asarray(1.0), ("log", "value", ())),
    "inside jit": (jax.jit(lambda x: jnp.linalg.norm(x)), jnp.zeros(3), ("sqrt", "tangent", ())),
    "inside scan": (in_scan, jnp.asarray(1.0), ("sqrt", "tangent", ("iteration 3 of scan",))),
    "inside while": (in_while, jnp.asarray(1.0), ("log", "value", ("iteration 2 of while",))),
    "inside cond": (
        lambda x: lax.cond(x < 1, jnp.sqrt, jnp.sin, x),
        jnp.asarray(0.0),
        ("sqrt", "tangent", ("branch 1 of cond",)),
    ),
    "inside a loop in a loop": (
        lambda x: lax.fori_loop(0, 3, lambda i, c: c + i * in_scan(x), 0.0),
        jnp.asarray(1.0),
        ("sqrt", "tangent", ("iteration 0 of scan", "iteration 3 of scan")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_equation_is_found(name):
    fun, params, (primitive, part, path) = CASES[name]
    value, tangent = jax.jvp(fun, (params,), (jnp.ones_like(params),))
    assert not (jnp.isfinite(value) & jnp.isfinite(tangent))
    found = first_nonfinite(fun, params)
    assert (found.primitive, found.part) == (primitive, part)
    assert len(found.path) == len(path)
    assert all(got.startswith(f"{want} at ") for got, want in zip(found.path, path, strict=True))
    assert "test_nonfinite.py" in found.source
    assert all(np.isfinite(x).all() for x in found.operands)
    assert "is not finite" in str(found)


FINITE = {
    "an infinity that where removes": (
        lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0),
        jnp.asarray(0.0),
    ),
    "a mask of minus infinity": (
        lambda x: jnp.sum(jax.nn.softmax(jnp.where(jnp.arange(3) < 2, x, -jnp.inf)) ** 2),
        jnp.array([1.0, 2.0, 3.0]),
    ),
    "a maximum that starts at minus infinity": (
        lambda x: lax.scan(lambda m, v: (jnp.maximum(m, v), None), -jnp.inf, x)[0],
        jnp.array([1.0, 2.0]),
    ),
    "a loop": (lambda x: lax.fori_loop(0, 5, lambda i, c: jnp.sin(c), x), jnp.asarray(1.0)),
    "keys and integers": (
        lambda x: x * jax.random.normal(jax.random.key(0)) + jnp.arange(3).sum(),
        jnp.asarray(2.0),
    ),
}


@pytest.mark.parametrize("name", FINITE)
def test_a_finite_result_raises_no_alarm(name):
    assert first_nonfinite(*FINITE[name]) is None


def test_an_infinity_that_is_masked_is_not_blamed_for_another():
    def fun(x):
        scores = jnp.where(jnp.arange(3) < 2, x, -jnp.inf)
        return jnp.sum(jax.nn.softmax(scores)) + jnp.sqrt(x[0] - 1)

    found = first_nonfinite(fun, jnp.array([1.0, 2.0, 3.0]))
    assert (found.primitive, found.part) == ("sqrt", "tangent")


def test_only_parameters_have_tangents():
    """A derivative by data alone is infinite, which no forward gradient sees."""
    fun = lambda params, data: jnp.sum(params) + jnp.sqrt(data)
    assert first_nonfinite(fun, jnp.ones(2), jnp.asarray(0.0)) is None
    assert first_nonfinite(lambda data: fun(jnp.ones(2), data), jnp.asarray(0.0)) is not None


def test_it_agrees_with_the_estimators(key):
    """The estimate is NaN where an equation is found, though reverse mode is finite."""
    loss = lambda p: jnp.sum(jnp.sqrt(jnp.concatenate([jnp.zeros(1), p])))
    params = jnp.array([1.0, 4.0])
    assert jnp.isfinite(jax.grad(loss)(params)).all()
    with pytest.warns(RuntimeWarning, match=r"1 of 1 derivatives are not"):
        _, grads = pg.value_and_grad(loss, pg.WeightPerturbation(pg.Normal()))(key, params)
    assert jnp.isfinite(grads).all() == (first_nonfinite(loss, params) is None)
