"""Groups of examples with tangents of their own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models
from comparisons import dense

import prograde as pg
from prograde.testing import assert_unbiased

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("distribution", [pg.LowRank(1), pg.Rademacher(), pg.Basis()], ids=repr)
@pytest.mark.parametrize("chunk", [pytest.param(None, marks=pytest.mark.long), 2])
def test_the_estimate_is_the_mean_of_estimates_on_each_group(distribution, chunk, key):
    """Group g of G has the tangents number g, G + g, 2 G + g ... of K G."""
    params, losses, (x, y) = site_models.relu_mlp(key)
    x, y = jnp.tile(x, (2, 1)) + jnp.arange(8.0)[:, None] / 8, jnp.tile(y, (2, 1))
    k, g = 3, 4
    estimator = pg.WeightPerturbation(distribution, k, chunk, num_groups=g)

    @jax.jit
    def estimate_and_twin(params, x, y):
        def along(i):
            tangent = dense(distribution.sample(key, params, i, k * g))
            part = [a.reshape(g, 2, -1)[i % g] for a in (x, y)]
            return tangent, jax.jvp(lambda p: losses(p, *part), (params,), (tangent,))[1]

        tangents, slopes = jax.vmap(along)(jnp.arange(k * g))
        expected = jax.tree.map(lambda v: jnp.tensordot(slopes.mean(1), v, 1) / (k * g), tangents)
        return estimator.estimate(losses, key, None, params, x, y), expected, slopes

    with jax.debug_key_reuse(False):  # the same key on purpose
        result, expected, slopes = estimate_and_twin(params, x, y)
    np.testing.assert_allclose(result.directional, np.reshape(slopes, (k, 8)), rtol=1e-4, atol=1e-5)
    for name in params:
        np.testing.assert_allclose(result.grads[name], expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.value, losses(params, x, y).mean(), rtol=1e-6)


@pytest.mark.long
def test_unbiased_and_the_variance_falls_with_the_number_of_groups(key):
    """On examples that are all the same, G groups have 1/G of the variance. Notices 10 %."""
    params, losses, (x, y) = site_models.relu_mlp(key)
    x, y = jnp.repeat(x[:1], 8, axis=0), jnp.repeat(y[:1], 8, axis=0)
    estimator = pg.WeightPerturbation(pg.LowRank(1), num_groups=8)
    assert_unbiased(estimator, losses, jax.random.fold_in(key, 1), params, x, y)
    variance = []
    for e in (pg.WeightPerturbation(pg.LowRank(1)), estimator):
        draw = jax.jit(jax.vmap(lambda k, e=e: e.estimate(losses, k, None, params, x, y).grads))
        grads = draw(jax.random.split(jax.random.fold_in(key, 2), 20_000))
        variance.append(sum(float(g.var(axis=0).sum()) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(variance[0] / variance[1], 8, rtol=0.1)


def test_a_scalar_loss_and_auxiliary_output_of_each_group(key):
    params, losses, (x, y) = site_models.relu_mlp(key)

    def loss(params, x, y, scale, name):
        return scale * losses(params, x, y).mean(), {"mean": x.mean(), "name": name}

    result = eqx.filter_jit(pg.WeightPerturbation(num_groups=2).estimate)(
        loss, key, None, params, x, y, 2.0, "mlp", has_aux=True
    )
    np.testing.assert_allclose(result.value, 2 * losses(params, x, y).mean(), rtol=1e-6)
    np.testing.assert_allclose(result.aux["mean"], x.reshape(2, -1).mean(axis=1), rtol=1e-5)
    assert result.aux["name"] == "mlp"
    assert result.directional.shape == (1, 2)


def test_a_batch_that_cannot_be_cut_is_refused(key):
    params, losses, (x, y) = site_models.relu_mlp(key)
    with pytest.raises(ValueError, match=r"num_groups=3.*shapes \[\(4, 3\), \(4, 2\)\].*divides"):
        pg.value_and_grad(losses, pg.WeightPerturbation(num_groups=3))(key, params, x, y)
    with pytest.raises(ValueError, match=r"one first axis"):
        pg.value_and_grad(lambda p, x, m: losses(p, x @ m, y), pg.WeightPerturbation(num_groups=2))(
            key, params, x, jnp.eye(3)
        )
    with pytest.raises(ValueError, match=r"combine='projection' with num_groups=2"):
        pg.WeightPerturbation(combine="projection", num_groups=2)


def test_an_empty_leaf_is_no_obstacle(key):
    params = {"w": jnp.ones((2, 2)), "empty": jnp.zeros((0, 3))}
    for estimator in (
        pg.WeightPerturbation(pg.Rademacher(), 3),
        pg.WeightPerturbation(num_tangents=4, chunk=2),
    ):
        loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["empty"])
        _, grads = jax.jit(pg.value_and_grad(loss, estimator))(key, params)
        assert grads["empty"].shape == (0, 3)
