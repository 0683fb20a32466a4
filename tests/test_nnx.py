"""Flax NNX modules: gradients and state equal those of `nnx.value_and_grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import prograde as pg
import prograde.nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.asarray(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.norm(self.linear(x)))


def loss_fn(model, x, y):
    return jnp.mean((model(x).sum(-1) - y) ** 2)


def values(module):
    """The arrays of a module, with keys as numbers."""
    leaves = jax.tree.leaves(nnx.state(module))
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in leaves]


@pytest.fixture
def batch(key):
    return jax.random.normal(key, (5, 3)), jnp.ones(5)


@pytest.mark.parametrize("estimator", [pg.Backprop(), pg.ForwardJacobian()], ids=str)
def test_exact_gradients_and_state_equal_those_of_nnx(estimator, batch):
    """Over three calls: each draws a new mask, and moves statistics and counters once."""
    theirs, ours = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    losses = []
    for i in range(3):
        want_loss, want = nnx.value_and_grad(loss_fn)(theirs, *batch)
        loss, grads = pg.nnx.value_and_grad(loss_fn, estimator)(jax.random.key(i), ours, *batch)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
        assert jax.tree.structure(grads) == jax.tree.structure(want)
        for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
        for a, b in zip(values(ours), values(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        losses.append(float(loss))
    assert len(set(losses)) == 3
    assert int(ours.calls[...]) == 3


def test_all_tangents_share_one_mask_and_one_update(batch):
    estimator = pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=7)
    one, many = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    want = loss_fn(one, *batch)
    loss, grads = pg.nnx.value_and_grad(loss_fn, estimator)(jax.random.key(0), many, *batch)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for a, b in zip(values(one), values(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert sorted(grads) == ["linear", "norm"]
    assert sorted(grads["norm"]) == ["bias", "scale"]


def test_training_moves_parameters_through_an_optimizer_of_nnx(batch):
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    grad_fn = pg.nnx.value_and_grad(loss_fn, pg.WeightPerturbation(num_tangents=8))

    @nnx.jit
    def step(key, model, optimizer):
        loss, grads = grad_fn(key, model, *batch)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(key, model, optimizer)) for key in jax.random.split(jax.random.key(1), 60)]
    assert losses[-1] < 0.2 * losses[0]


def test_a_filter_picks_what_is_differentiated(batch):
    model = Net(nnx.Rngs(0))
    norm_only = nnx.DiffState(0, lambda path, value: path[0] == "norm" and path[1] == "bias")
    want = nnx.grad(loss_fn, argnums=norm_only)(Net(nnx.Rngs(0)), *batch)
    grad_fn = pg.nnx.value_and_grad(loss_fn, pg.ForwardJacobian(), argnums=norm_only)
    _, grads = grad_fn(None, model, *batch)
    assert jax.tree.structure(grads) == jax.tree.structure(want)
    np.testing.assert_allclose(*map(jax.tree.leaves, (grads, want)), rtol=1e-4, atol=1e-5)


def test_two_modules_auxiliary_output_and_keywords(batch):
    def loss(first, scale, second, x, *, y):
        out = scale * (first(x) + second(x))
        return jnp.mean((out.sum(-1) - y) ** 2), out.shape

    x, y = batch
    modules = lambda: (Net(nnx.Rngs(0)), Net(nnx.Rngs(1)))
    first, second = modules()
    grad_fn = pg.nnx.value_and_grad(loss, pg.ForwardJacobian(), argnums=(2, 0), has_aux=True)
    (value, aux), grads = grad_fn(None, first, 2.0, second, x, y=y)
    with_y = lambda first, scale, second, x: loss(first, scale, second, x, y=y)
    others = modules()
    (want_value, _), want = nnx.value_and_grad(with_y, argnums=(2, 0), has_aux=True)(
        others[0], 2.0, others[1], x
    )
    assert aux == (5, 4)
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
    assert int(first.calls[...]) == int(second.calls[...]) == 1


@pytest.mark.parametrize(
    ("argnums", "error", "words"),
    [
        (3, ValueError, "called with 3 positional"),
        (1, TypeError, "argument 1 is .*holds no nnx variables"),
        ((0, 0), ValueError, "names argument 0 more than once"),
        (nnx.DiffState(0, lambda path, value: False), ValueError, "picks no variable"),
    ],
)
def test_bad_argnums_are_named(argnums, error, words, batch):
    grad_fn = pg.nnx.value_and_grad(loss_fn, pg.ForwardJacobian(), argnums=argnums)
    with pytest.raises(error, match=words):
        grad_fn(None, Net(nnx.Rngs(0)), *batch)


def test_an_estimator_that_learns_is_refused(batch):
    with pytest.raises(TypeError, match="learns from step to step"):
        pg.nnx.value_and_grad(loss_fn, pg.Guided("momentum"))(
            jax.random.key(0), Net(nnx.Rngs(0)), *batch
        )


def test_the_plain_drop_in_refuses_a_module_with_state(batch):
    """It would perturb the variance of the batch and train it on noise."""
    grad_fn = pg.value_and_grad(loss_fn, pg.WeightPerturbation())
    with pytest.raises(TypeError, match=r"norm.mean \(BatchStat\).*prograde\.nnx"):
        grad_fn(jax.random.key(0), Net(nnx.Rngs(0)), *batch)
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    pure = lambda params, x, y: loss_fn(nnx.merge(graph, params, rest, copy=True), x, y)
    _, grads = pg.value_and_grad(pure, pg.Backprop())(None, params, *batch)
    assert sorted(grads) == ["linear", "norm"]
