"""Bias and second moment of every distribution against closed forms.

Every test states the error it would notice; `assert_mean` fails when the samples are too few for
that at a false-fail and a false-pass rate of 1e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LONG

import prograde as pg
from prograde.testing import assert_mean, required_samples

pytestmark = pytest.mark.optimised

DISTRIBUTIONS = [
    pg.Normal(),
    pg.Rademacher(),
    pg.Sphere(),
    pg.Basis(),
    pg.LowRank(1),
    pg.LowRank(2),
    pg.LowRank(1, pg.Normal()),
    pg.Separable(2),
]

SHORT = [pg.Normal(), pg.Rademacher(), pg.Basis(), pg.LowRank(1), pg.LowRank(2)]


def problem(distribution=None):
    """A function with a known gradient at the parameters, on leaves of every kind: vector, matrix,
    stack of matrices.

    A tangent of higher rank needs matrices that are larger.
    """
    m, n = (6, 5) if getattr(distribution, "rank", 1) > 1 else (4, 3)
    generator = np.random.default_rng(5)
    params = {
        "vector": jnp.asarray(generator.normal(size=n), jnp.float32),
        "matrix": jnp.asarray(generator.normal(size=(m, n)), jnp.float32),
        "stack": jnp.asarray(generator.normal(size=(2, n, n)), jnp.float32),
    }
    x = jnp.asarray(generator.normal(size=(5, m)), jnp.float32)

    def loss(params):
        h = jnp.tanh(x @ params["matrix"] + params["vector"])
        for i in range(2):
            h = h + jnp.sin(h @ params["stack"][i])
        return jnp.sum(h)

    return params, loss


def sample_estimates(estimator, key, num_samples):
    """Flattened gradient estimates at independent keys, and the flattened true gradient."""
    params, loss = problem(estimator.tangents)

    def flat(tree):
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])

    draw = jax.jit(jax.vmap(lambda k: flat(estimator.estimate(loss, k, None, params).grads)))
    num_batches = -(-num_samples // 25_000)
    samples = [
        np.asarray(draw(jax.random.split(k, 25_000))) for k in jax.random.split(key, num_batches)
    ]
    return np.concatenate(samples)[:num_samples], np.asarray(flat(jax.grad(loss)(params)))


@pytest.mark.parametrize(
    "estimator",
    [
        *(
            pytest.param(pg.WeightPerturbation(d), marks=() if d in SHORT else LONG)
            for d in DISTRIBUTIONS
        ),
        pg.WeightPerturbation(pg.LowRank(1), num_tangents=4, chunk=3),
    ],
    ids=repr,
)
def test_mean_is_the_gradient_and_second_moment_is_the_closed_form(estimator, key):
    """Notices a projection that is off by 5 %, and a second moment that is off by 5 % (10 % with
    heavy tails)."""
    params, loss = problem(estimator.tangents)
    heavy = estimator.tangents in (pg.LowRank(1, pg.Normal()), pg.Normal())
    # (u . v)^2 of a unit u has variance 2 for normal entries and at most 2 for signs; n - 1 for
    # Basis; for rank one, products of two normals have fourth moment 9, so at most 8 for normal
    # factors and less for signs
    n = 33
    variance = {pg.Basis(): n - 1.0, pg.LowRank(1, pg.Normal()): 8.0}.get(estimator.tangents, 4.0)
    effect = 0.05
    samples, gradient = sample_estimates(estimator, key, required_samples(variance**0.5, effect))
    norm2 = gradient @ gradient
    assert_mean(samples @ gradient / norm2, 1.0, effect)
    assert_mean(samples / norm2**0.5, gradient / norm2**0.5, effect=0.15)

    coefficients = estimator.tangents.second_moment(params)
    single = sum(
        c * jnp.sum(g**2)
        for c, g in zip(*map(jax.tree.leaves, (coefficients, jax.grad(loss)(params))), strict=True)
    )
    expected = float(single) / norm2
    k = estimator.num_tangents
    expected = expected / k + (1 - 1 / k)
    assert_mean((samples**2).sum(1) / norm2 / expected, 1.0, effect=0.10 if heavy else 0.05)


def test_distinct_basis_tangents_have_the_second_moment_of_sampling_without_repetition(key):
    estimator = pg.WeightPerturbation(pg.Basis(), num_tangents=11)
    samples, gradient = sample_estimates(estimator, key, 50_000)
    assert_mean((samples**2).sum(1) / (gradient @ gradient), 33 / 11, effect=0.1)


@pytest.mark.parametrize("distribution", [pg.Normal(), pg.Rademacher(), pg.LowRank(1)], ids=repr)
def test_tangents_of_one_estimate_are_independent(distribution, key):
    """Products of the directional derivatives of two tangents average to zero."""
    params, loss = problem()
    estimator = pg.WeightPerturbation(distribution, num_tangents=2)
    draw = jax.jit(jax.vmap(lambda k: estimator.estimate(loss, k, None, params).directional))
    directional = np.asarray(draw(jax.random.split(key, 50_000)))
    gradient = jax.grad(loss)(params)
    norm2 = float(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    assert_mean(directional[:, 0] * directional[:, 1] / norm2, 0.0, effect=0.06)


def test_a_missing_factor_is_noticed(key):
    """The proof can fail: rank two without its 1/sqrt(2) doubles the estimate, and 2 % too much is
    seen as well."""
    estimator = pg.WeightPerturbation(pg.Rademacher())
    samples, gradient = sample_estimates(estimator, key, required_samples(2**0.5, 0.02))
    projection = samples @ gradient / (gradient @ gradient)
    assert_mean(projection, 1.0, effect=0.02)
    for factor, effect in ((2.0, 0.05), (1.02, 0.021), (0.98, 0.02)):
        with pytest.raises(AssertionError, match="standard errors"):
            assert_mean(factor * projection, 1.0, effect)


def test_too_few_samples_are_refused(key):
    samples, gradient = sample_estimates(pg.WeightPerturbation(pg.Normal()), key, 1000)
    with pytest.raises(AssertionError, match="cannot notice"):
        assert_mean(samples @ gradient / (gradient @ gradient), 1.0, effect=0.02)
