"""Every estimator beside an obvious version of it in numpy, from the same random numbers; and laws
that hold exactly."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import site_models
from jax import lax

import prograde as pg
from prograde._jaxprs import equations
from prograde._sites import sites
from prograde._structured import inner_products, is_structured
from prograde.testing import assert_mean, required_samples


@functools.cache
def problem(seed):
    params, losses, args = site_models.relu_mlp(jax.random.key(seed))
    loss = lambda p: jnp.mean(losses(p, *args))
    gradient = np.concatenate([np.ravel(g) for g in jax.tree.leaves(jax.grad(loss)(params))])
    return params, loss, gradient


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def dense_tangents(distribution, key, params, num_tangents):
    """The tangents of an estimate as the columns of a matrix."""
    columns = []
    for k in range(num_tangents):
        tangent = distribution.sample(key, params, k, num_tangents)
        tangent = jax.tree.map(
            lambda v: v.dense() if is_structured(v) else v, tangent, is_leaf=is_structured
        )
        columns.append(flat(tangent))
    return np.stack(columns, axis=1).astype(np.float64)


DISTRIBUTIONS = [
    pg.Normal(),
    pg.Rademacher(),
    pg.Sphere(),
    pg.Basis(),
    pg.Orthogonal(),
    pg.Sparse(0.5),
    pg.LowRank(1),
    pg.Separable(),
]


def combined(turn):
    """How the tangents of the distribution with this number are combined, and by which chunk.

    Every two of distribution, combination and chunk meet.
    """
    ways = [("mean", None), ("shrunk", 2), ("projection", None)]
    return [(combine, None if (chunk is None) == (turn % 2 == 0) else 2) for combine, chunk in ways]


@pytest.mark.parametrize(
    ("distribution", "combine", "chunk"),
    [(d, *way) for turn, d in enumerate(DISTRIBUTIONS) for way in combined(turn)],
    ids=repr,
)
def test_weight_perturbation(distribution, combine, chunk, seed, key):
    params, loss, gradient = problem(seed)
    n, k = len(gradient), 5
    v = dense_tangents(distribution, key, params, k)
    d = v.T @ gradient
    expected = (
        v @ np.linalg.lstsq(v, gradient, rcond=None)[0] if combine == "projection" else v @ d / k
    )
    if combine == "shrunk":
        # all of these have one fourth moment: kappa_4 - 1 is 2 for normal numbers, 1/p - 1 for
        # sparse ones
        excess = {pg.Normal(): 2, pg.Sparse(0.5): 1}.get(distribution, 0)
        moment = (
            n / k
            if isinstance(distribution, pg.Basis | pg.Orthogonal)
            else 1 + (n + excess - 1) / k
        )
        expected = expected / moment
    estimator = pg.WeightPerturbation(distribution, k, chunk, combine)
    result = eqx.filter_jit(estimator.estimate)(loss, key, None, params)
    np.testing.assert_allclose(
        flat(result.grads), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )
    np.testing.assert_allclose(result.directional, d, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "distribution",
    [pg.Rademacher(), pg.LowRank(2), pg.LowRank(1, pg.Normal()), pg.Separable(2)],
    ids=repr,
)
def test_inner_products_of_tangents_are_those_of_the_dense_ones(distribution, key):
    params = {"w": jnp.zeros((8, 9)), "kernel": jnp.zeros((3, 3, 4, 5)), "b": jnp.zeros(3)}
    v = dense_tangents(distribution, key, params, 4)
    stacked = jax.vmap(lambda i: distribution.sample(key, params, i, 4))(jnp.arange(4))
    np.testing.assert_allclose(inner_products(stacked), v.T @ v, rtol=1e-5, atol=1e-4)


def test_dependent_tangents_are_projected_on_all_the_same(key):
    """More tangents than parameters: the Gram matrix is singular, and the projection is the
    gradient."""
    w = jnp.asarray([1.0, -2.0, 3.0])
    estimator = pg.WeightPerturbation(pg.Rademacher(), 12, combine="projection")
    _, grads = pg.value_and_grad(lambda w: jnp.sum(w**2), estimator)(key, w)
    np.testing.assert_allclose(grads, 2 * w, rtol=1e-5)


def test_a_projection_is_never_further_from_the_gradient_than_zero(seed, key):
    params, loss, gradient = problem(seed)
    estimator = pg.WeightPerturbation(pg.LowRank(1), 8, combine="projection")
    draw = jax.jit(jax.vmap(lambda k: estimator.estimate(loss, k, None, params).grads))
    grads = draw(jax.random.split(key, 200))
    samples = np.concatenate([np.reshape(g, (200, -1)) for g in jax.tree.leaves(grads)], axis=1)
    assert (np.linalg.norm(samples - gradient, axis=1) < np.linalg.norm(gradient)).all()


def test_bias_of_a_projection_on_a_uniform_span(seed, key):
    """E[g] = (K/n) grad f for normal tangents. Notices 5 %."""
    params, loss, gradient = problem(seed)
    n, k = len(gradient), 6
    estimator = pg.WeightPerturbation(pg.Normal(), k, combine="projection")
    draw = jax.jit(jax.vmap(lambda key: estimator.estimate(loss, key, None, params).grads))
    grads = draw(jax.random.split(key, 15_000))
    samples = np.concatenate([np.reshape(g, (15_000, -1)) for g in jax.tree.leaves(grads)], axis=1)
    assert_mean(samples @ gradient / (gradient @ gradient) * n / k, 1.0, effect=0.05)


@pytest.mark.parametrize(
    ("distribution", "excess"),
    [
        (pg.Normal(), 2),
        (pg.Rademacher(), 0),
        (pg.Sparse(0.25), 3),
        (pg.Sphere(), 0),
        (pg.LowRank(1), 0),
    ],
    ids=repr,
)
def test_the_shrunk_estimate_has_the_least_mean_squared_error(distribution, excess, seed, key):
    """1/(n + kappa_4 - 1) for one tangent; the error left is (1 - that) |grad|^2."""
    params, loss, gradient = problem(seed)
    n = len(gradient)
    estimator = pg.WeightPerturbation(distribution, combine="shrunk")
    mean = pg.WeightPerturbation(distribution)
    both = jax.jit(lambda: [e.estimate(loss, key, None, params).grads for e in (estimator, mean)])
    shrunk, whole = map(flat, both())
    np.testing.assert_allclose(shrunk, whole / (n + excess), rtol=1e-5)
    draw = jax.jit(jax.vmap(lambda k: estimator.estimate(loss, k, None, params).grads))
    grads = draw(jax.random.split(key, 20_000))
    samples = np.concatenate([np.reshape(g, (20_000, -1)) for g in jax.tree.leaves(grads)], axis=1)
    errors = ((samples - gradient) ** 2).sum(1) / (gradient @ gradient)
    assert_mean(errors, 1 - 1 / (n + excess), effect=0.01)


@pytest.mark.parametrize("model", models.ALL, ids=lambda m: m.__name__)
def test_forward_jacobian_is_reverse_mode(model, key):
    params, loss, args = model(key)

    @eqx.filter_jit
    def both(params, args):
        by = lambda e: pg.value_and_grad(loss, e)(None, params, *args)[1]
        return by(pg.ForwardJacobian(chunk=64)), by(pg.Backprop())

    for a, b in zip(*map(jax.tree.leaves, both(params, args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_a_central_difference_of_a_quadratic_function_is_the_directional_derivative(
    distribution, key
):
    params = {"a": jnp.arange(12.0).reshape(3, 4) / 5, "b": jnp.ones(4)}
    loss = lambda p: jnp.sum((p["a"] @ jnp.diag(p["b"] * 0 + 2)) ** 2) + jnp.sum(p["b"] ** 2)
    estimators = (
        pg.CentralDifference(distribution, 3, step=0.25),
        pg.WeightPerturbation(distribution, 3),
    )
    both = jax.jit(lambda p: [e.estimate(loss, key, None, p) for e in estimators])
    difference, exact = both(params)
    np.testing.assert_allclose(difference.directional, exact.directional, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(flat(difference.grads), flat(exact.grads), rtol=1e-3, atol=2e-3)


def test_bias_of_a_central_difference_of_a_cubic_function(key):
    """(h^2 / 6) E[D^3 f(v, v, v) v]: along all sqrt(n) e_i that is h^2 n a_i for f = sum a_i x_i^3,
    without chance."""
    a, x, h = jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([0.3, 0.2, -1.0]), 0.25
    result = pg.CentralDifference(pg.Basis(), 3, step=h).estimate(
        lambda x: jnp.sum(a * x**3), key, None, x
    )
    np.testing.assert_allclose(result.grads, 3 * a * x**2 + h**2 * 3 * a, rtol=1e-4)


def test_weights_of_one_and_a_half_spsa(key):
    """On a quadratic function the curvature that is measured is v^T H v, and the weight its power,
    or the floor."""
    x, h = jnp.asarray([0.3, 0.2, -1.0]), jnp.diag(jnp.asarray([1.0, 40.0, 900.0]))
    loss = lambda x: x @ h @ x / 2
    estimator = pg.CentralDifference(
        pg.Basis(), 3, step=0.5, curvature_power=0.5, curvature_floor=4.0
    )
    result = estimator.estimate(loss, key, None, x)
    weights = np.maximum(np.sqrt(3 * np.diag(h)), 4.0)
    np.testing.assert_allclose(result.grads, (h @ x) / weights, rtol=1e-3)
    np.testing.assert_allclose(result.value, loss(x), rtol=1e-6)


def test_activity_perturbation(key):
    params, losses, (x, y) = site_models.relu_mlp(key)
    estimator = pg.ActivityPerturbation(num_tangents=3)
    program, floats = estimator.program(losses, params, (x, y), False)
    noise = [
        np.asarray(s.perturbation, np.float64)
        for s in sites(estimator.perturbed_run(program, floats, key).records)
    ]
    result = estimator.estimate(losses, key, None, params, x, y)

    w, b, out, x, y = (
        np.asarray(a, np.float64) for a in (params["w"], params["b"], params["out"], x, y)
    )
    z = x @ w + b
    h, active = np.maximum(z, 0), z > 0
    error = 2 * (h @ out - y)
    expected = {name: np.zeros(value.shape) for name, value in params.items()}
    for k in range(3):
        dh = active * noise[0][k]
        dy = dh @ out + noise[1][k]
        d = (error * dy).sum(axis=1)
        np.testing.assert_allclose(result.directional[k], d, rtol=1e-4, atol=1e-5)
        hidden, last = d[:, None] * noise[0][k] / 12, d[:, None] * noise[1][k] / 12
        expected["w"] += x.T @ hidden
        expected["b"] += hidden.sum(axis=0)
        expected["out"] += h.T @ last
    for name in params:
        np.testing.assert_allclose(result.grads[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use", ["feedback", "control_variate"])
def test_learned_feedback(use, key):
    params, losses, (x, y) = site_models.relu_mlp(key)
    estimator = pg.LearnedFeedback(num_tangents=2, rate=0.1, use=use)
    state = estimator.init(losses, params, x, y)
    state = eqx.tree_at(
        lambda s: s.feedback, state, [jax.random.normal(jax.random.fold_in(key, 1), (8, 2))]
    )
    program, floats = estimator.program(losses, params, (x, y), False)
    noise = np.asarray(
        sites(estimator.perturbed_run(program, floats, key).records)[0].perturbation, np.float64
    )
    result = estimator.estimate(losses, key, state, params, x, y)

    w, b, out, x, y, feedback = (
        np.asarray(a, np.float64)
        for a in (params["w"], params["b"], params["out"], x, y, state.feedback[0])
    )
    z = x @ w + b
    h, active = np.maximum(z, 0), z > 0
    error = 2 * (h @ out - y)
    guess = active * (error @ feedback.T)
    cotangent, learned = guess.copy(), feedback.copy()
    power = (active * noise**2).sum() / (2 * 4)
    for k in range(2):
        felt = active * noise[k]
        dy = felt @ out
        learned += 0.1 / (1 + power / (2 * 4)) * felt.T @ (dy - felt @ feedback) / (2 * 4)
        if use == "control_variate":
            left = (error * dy).sum(axis=1) - (guess * noise[k]).sum(axis=1)
            cotangent += left[:, None] * noise[k] / 2
    np.testing.assert_allclose(result.state.feedback[0], learned, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.grads["out"], h.T @ error / 4, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.grads["w"], x.T @ cotangent / 4, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.grads["b"], cotangent.sum(axis=0) / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("distribution", "law"),
    [
        (pg.Normal(), lambda a, n: (1 - a) ** 2 + a**2 * (1 + n)),
        (pg.Rademacher(), lambda a, n: (1 - a) ** 2 + a**2 * (n - 1)),
        (pg.Sphere(), lambda a, n: (1 - a) ** 2 + a**2 * (n - 1)),
        (pg.LowRank(1), lambda a, n: (1 - a) ** 2 + a**2 * (n - 1)),
    ],
    ids=lambda x: repr(x) if isinstance(x, pg.TangentDistribution) else "",
)
def test_the_expected_loss_contracts_by_the_law(distribution, law, key):
    """f = |x|^2 / 2 and one step of gradient descent. Notices 3 % of what the step does."""
    n = 24
    x = jax.random.normal(jax.random.fold_in(key, 1), (4, 6))
    estimator = pg.WeightPerturbation(distribution)

    @jax.jit
    @jax.vmap
    def figures(key):
        grads = estimator.estimate(lambda x: jnp.sum(x**2) / 2, key, None, x).grads
        return jnp.stack([jnp.sum(grads * x), jnp.sum(grads**2)]) / jnp.sum(x**2)

    def contraction(rate, figures):  # |x - rate g|^2 / |x|^2
        return 1 - 2 * rate * figures[:, 0] + rate**2 * figures[:, 1]

    def draw(key, count):
        keys = jax.random.split(key, (-(-count // 20_000), 20_000))
        return np.concatenate([np.asarray(figures(k), np.float64) for k in keys])

    rate, effect = 0.02, 0.03 * 2 * 0.02
    needed = required_samples(1.2 * contraction(rate, draw(key, 20_000)).std(), effect)
    samples = draw(jax.random.fold_in(key, 2), needed)
    assert_mean(contraction(rate, samples), law(rate, n), effect)


def test_checkpoints_keep_fewer_activations():
    """A scan over layers of several products: XLA needs less than a quarter of the memory."""
    params, x = jnp.stack([jnp.eye(16)] * 36), jnp.ones((4096, 16))

    def loss(params, x):
        def layer(x, w):
            for _ in range(4):
                x = jnp.tanh(x @ w)
            return x, None

        return jnp.sum(lax.scan(layer, x, params)[0])

    def temporary(estimator):
        grads = jax.jit(lambda p: pg.value_and_grad(loss, estimator)(None, p, x)[1])
        return grads.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(pg.CheckpointedBackprop()) < 0.25 * temporary(pg.Backprop())


def test_checkpoints_compute_segments_again():
    """Of nine layers in three segments, those of the first two are computed twice; that of the last
    need not be."""
    params = [jnp.eye(4) for _ in range(9)]

    def loss(params):
        x = jnp.ones((2, 4))
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    def products(estimator):
        grads = jax.make_jaxpr(lambda p: pg.value_and_grad(loss, estimator)(None, p)[1])(params)
        return sum(eqn.primitive.name == "dot_general" for eqn in equations(grads.jaxpr))

    assert products(pg.CheckpointedBackprop(3)) - products(pg.Backprop()) in (6, 7, 8, 9)
