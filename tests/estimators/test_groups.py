"""Groups of examples with tangents of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models

import prograde as pg
from prograde.testing import assert_unbiased

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("distribution", [pg.LowRank(1), pg.Rademacher(), pg.Basis()], ids=repr)
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_estimate_is_the_mean_of_estimates_on_each_group(distribution, chunk, key):
    """Group g of G has the tangents number g, G + g, 2 G + g ... of K G."""
    params, losses, (x, y) = site_models.relu_mlp(key)
    x, y = jnp.tile(x, (2, 1)) + jnp.arange(8.0)[:, None] / 8, jnp.tile(y, (2, 1))
    k, g = 3, 4
    result = pg.WeightPerturbation(distribution, k, chunk, num_groups=g).estimate(
        losses, key, None, params, x, y
    )
    expected = jax.tree.map(jnp.zeros_like, params)
    for i in range(k * g):
        group = slice(2 * (i % g), 2 * (i % g) + 2)
        tangent = distribution.sample(key, params, i, k * g)
        tangent = jax.tree.map(
            lambda v: v.dense() if hasattr(v, "dense") else v,
            tangent,
            is_leaf=lambda v: hasattr(v, "dense"),
        )
        _, d = jax.jvp(lambda p, s=group: losses(p, x[s], y[s]), (params,), (tangent,))
        expected = jax.tree.map(lambda e, v, d=d: e + d.mean() * v / (k * g), expected, tangent)
        np.testing.assert_allclose(result.directional[i // g, group], d, rtol=1e-4, atol=1e-5)
    assert result.directional.shape == (k, 8)
    for name in params:
        np.testing.assert_allclose(result.grads[name], expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.value, losses(params, x, y).mean(), rtol=1e-6)


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

    result = pg.WeightPerturbation(num_groups=2).estimate(
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
        _, grads = pg.value_and_grad(
            lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["empty"]), estimator
        )(key, params)
        assert grads["empty"].shape == (0, 3)
