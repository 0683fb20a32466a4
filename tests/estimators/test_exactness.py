"""Identities that hold to rounding, for every distribution and model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from comparisons import close, dense, floats

import prograde as pg

DISTRIBUTIONS = [
    pg.Normal(),
    pg.Rademacher(),
    pg.Sphere(),
    pg.Basis(),
    pg.LowRank(1),
    pg.LowRank(2, pg.Normal()),
]
TOLERANCE = {"float32": 2e-4, "float64": 1e-11, "bfloat16": 6e-2}


def slow_twin(loss, params, args, tangents):
    """Value, directional derivatives and gradient estimate by plain jax.jvp along dense
    tangents."""
    part, rest = eqx.partition(params, eqx.is_inexact_array)
    along = jax.jit(lambda p, v: jax.jvp(lambda p: loss(eqx.combine(p, rest), *args), (p,), (v,)))
    value, directional = None, []
    for tangent in tangents:
        value, slope = along(part, tangent)
        directional.append(slope)
    grads = jax.tree.map(
        lambda *v: (
            sum(float(d) * np.asarray(t, np.float64) for d, t in zip(directional, v, strict=True))
            / len(v)
        ),
        *tangents,
    )
    return value, jnp.stack(directional), grads


# the rules of every model under factored tangents, and every distribution on one model
@pytest.mark.parametrize(
    ("model", "distribution"),
    [(model, pg.LowRank(1)) for model in models.ALL]
    + [(models.mlp, d) for d in DISTRIBUTIONS if d != pg.LowRank(1)],
    ids=lambda x: getattr(x, "__name__", None) or repr(x),
)
def test_estimate_equals_plain_jvp_along_the_dense_twins(model, distribution, key):
    params, loss, args = model(key)
    estimator = pg.WeightPerturbation(distribution, num_tangents=3)
    result = eqx.filter_jit(estimator.estimate)(loss, key, None, params, *args)
    tangents = [dense(distribution.sample(key, floats(params), i, 3)) for i in range(3)]
    value, directional, grads = slow_twin(loss, params, args, tangents)
    close(result.value, value, 1e-5)
    close(result.directional, directional, TOLERANCE["float32"])
    close(result.grads, grads, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize(
    "model", [models.mlp, models.scan_over_layers, models.attention], ids=lambda m: m.__name__
)
def test_low_rank_equals_dense_twin_in_other_dtypes(model, dtype, key):
    with jax.enable_x64(dtype == "float64"):
        params, loss, args = model(key, jnp.dtype(dtype))
        estimator = pg.WeightPerturbation(pg.LowRank(2), num_tangents=1)
        result = eqx.filter_jit(estimator.estimate)(loss, key, None, params, *args)
        assert result.directional.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        assert all(g.dtype == dtype for g in jax.tree.leaves(result.grads))
        tangents = dense(pg.LowRank(2).sample(key, params))
        wide = (
            jnp.float64 if dtype == "float64" else jnp.float32
        )  # the twin of bfloat16 computes in float32
        cast = lambda tree: jax.tree.map(lambda x: x.astype(wide), tree)
        value, directional, _ = slow_twin(loss, cast(params), cast(args), [cast(tangents)])
        close(result.value, value, TOLERANCE[dtype])
        close(result.directional, directional, TOLERANCE[dtype])


@pytest.mark.parametrize("model", models.ALL, ids=lambda m: m.__name__)
def test_full_basis_equals_reverse_mode(model, key):
    params, loss, args = model(key)
    n = sum(leaf.size for leaf in jax.tree.leaves(floats(params)))
    estimator = pg.WeightPerturbation(pg.Basis(), num_tangents=n, chunk=64)
    grads = eqx.filter_jit(estimator.estimate)(loss, key, None, params, *args).grads
    close(grads, eqx.filter_jit(eqx.filter_grad(loss))(params, *args), 1e-4)


def test_one_dense_normal_tangent_is_the_estimator_of_the_paper(key):
    """The estimate is its derivative times the tangent, bit for bit; the derivative is a jvp."""
    params, loss, args = models.mlp(key)
    tangents = pg.Normal().sample(key, params)
    _, directional = jax.jvp(lambda p: loss(p, *args), (params,), (tangents,))
    found = pg.WeightPerturbation(pg.Normal()).estimate(loss, key, None, params, *args)
    np.testing.assert_allclose(found.directional, [directional], rtol=2e-6)
    for g, v in zip(jax.tree.leaves(found.grads), jax.tree.leaves(tangents), strict=True):
        np.testing.assert_array_equal(g, found.directional[0] * v)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_chunks_change_nothing_but_rounding(distribution, key):
    params, loss, args = models.scan_over_layers(key)

    def estimate(chunk):
        estimator = pg.WeightPerturbation(distribution, num_tangents=7, chunk=chunk)
        return jax.jit(lambda key: estimator.estimate(loss, key, None, params, *args))(key)

    whole = estimate(None)
    for chunk in (1, 3, 100):
        part = estimate(chunk)
        assert part.directional.shape == (7,)
        close(part.directional, whole.directional, 1e-4)
        close(part.grads, whole.grads, 1e-4)
        close(part.value, whole.value, 1e-6)


def test_weight_on_either_side_and_both(key):
    k = jax.random.split(jax.random.fold_in(key, 17), 3)
    params = {"w": jax.random.normal(k[0], (6, 5)), "u": jax.random.normal(k[1], (5, 6))}
    x = jax.random.normal(k[2], (5, 4))

    def loss(params):
        left = params["w"] @ x
        right = x.T @ params["u"]
        batched = jax.vmap(lambda column: params["w"] @ column, in_axes=1)(x)
        return (
            jnp.sum(jnp.sin(left))
            + jnp.sum(jnp.cos(right))
            + jnp.sum((params["w"] @ params["u"]) * batched.sum())
        )

    estimator = pg.WeightPerturbation(pg.LowRank(2))
    result = eqx.filter_jit(estimator.estimate)(loss, key, None, params)
    _, directional, grads = slow_twin(loss, params, (), [dense(pg.LowRank(2).sample(key, params))])
    close(result.directional, directional, TOLERANCE["float32"])
    close(result.grads, grads, TOLERANCE["float32"])


@jax.custom_jvp
def straight_through(w):
    return jnp.sign(w)


straight_through.defjvp(lambda primals, tangents: (straight_through(primals[0]), tangents[0]))

ON_THE_WEIGHT_ITSELF = {
    "relu": lambda w, x: jnp.sum(x @ jax.nn.relu(w)),
    "softplus": lambda w, x: jnp.sum(jax.nn.softplus(w) ** 2),
    "logaddexp": lambda w, x: jnp.sum(jnp.logaddexp(w, 0.0)),
    "slogdet": lambda w, x: jnp.linalg.slogdet(w)[1],
    "det": lambda w, x: jnp.linalg.det(w),
    "solve": lambda w, x: jnp.sum(jnp.linalg.solve(w, x.T)),
    "straight through": lambda w, x: jnp.sum(x @ straight_through(w)),
    "softplus in scan": lambda w, x: jnp.sum(
        jax.lax.scan(lambda h, _: (jnp.tanh(h @ jax.nn.softplus(w)), None), x, None, 3)[0]
    ),
    "carried by scan": lambda w, x: jnp.sum(
        x @ jax.lax.scan(lambda c, _: (0.9 * c + 0.1 * c**2, None), w, None, 3)[0]
    ),
    "carried unchanged": lambda w, x: jnp.sum(
        jax.lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (x, w), None, 3)[0][0]
    ),
    "fori_loop": lambda w, x: jnp.sum(x @ jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c), w)),
    "while_loop": lambda w, x: jnp.sum(
        x @ jax.lax.while_loop(lambda c: jnp.sum(c**2) > 9, lambda c: 0.8 * c, w)
    ),
    "cond": lambda w, x: jnp.sum(
        (x @ jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, w)) ** 2
    ),
    "switch": lambda w, x: jnp.sum(
        jax.lax.switch(1, [lambda w: x @ w, lambda w: x @ jnp.sin(w)], w)
    ),
    "checkpoint": lambda w, x: jnp.sum(jax.checkpoint(lambda w: jnp.tanh(x @ w))(w)),
    "custom_jvp of product": lambda w, x: jnp.sum(jax.nn.silu(jax.nn.relu(x @ w))),
}


# without `jit` the rules are the same; loops and branches are not
@pytest.mark.parametrize(
    ("use", "jit"),
    [(use, True) for use in ON_THE_WEIGHT_ITSELF]
    + [(use, False) for use in ("softplus in scan", "while_loop", "cond", "checkpoint")],
)
def test_whatever_is_done_to_a_weight_its_tangent_arrives(use, jit, key):
    k = jax.random.split(jax.random.fold_in(key, 17))
    w, x = jax.random.normal(k[0], (5, 5)), jax.random.normal(k[1], (3, 5))
    loss = ON_THE_WEIGHT_ITSELF[use]
    estimate = lambda w, x: (
        pg.WeightPerturbation(pg.LowRank(1)).estimate(loss, key, None, w, x).directional
    )
    expected = slow_twin(loss, w, (x,), [dense(pg.LowRank(1).sample(key, w))])[1]
    assert np.abs(expected).max() > 1e-3
    close((jax.jit(estimate) if jit else estimate)(w, x), expected, 1e-3)


@pytest.mark.parametrize("distribution", [pg.Normal(), pg.LowRank(1), pg.LowRank(2)], ids=repr)
def test_directional_derivatives_can_be_differentiated_again(distribution, key):
    """Reverse mode over the estimate: the gradient of the directional derivative by the input, and
    by the weight."""
    k = jax.random.split(jax.random.fold_in(key, 17))
    w, x = jax.random.normal(k[0], (5, 4)), jax.random.normal(k[1], (3, 5))
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 3)
    tangent = dense(distribution.sample(key, w))
    slope = lambda w, x: jax.jvp(lambda w: loss(w, x), (w,), (tangent,))[1]
    estimate = lambda w, x: (
        pg.WeightPerturbation(distribution).estimate(loss, key, None, w, x).directional[0]
    )
    of_both = [jax.jit(jax.grad(fun, (0, 1))) for fun in (estimate, slope)]
    close(*(of(w, x) for of in of_both), 1e-3)


def test_chunks_of_bfloat16_lose_nothing(key):
    """One parameter and Rademacher tangents: the estimate is 1 exactly, in however many chunks."""
    for chunk in (None, 1, 300):
        estimator = pg.WeightPerturbation(pg.Rademacher(), num_tangents=2048, chunk=chunk)
        of = jax.jit(lambda w, e=estimator: e.estimate(lambda w: w, key, None, w).grads)
        assert of(jnp.ones((), jnp.bfloat16)) == 1


def test_an_empty_stack_of_weights(key):
    params = {"w": jnp.ones((8, 8)), "none": jnp.zeros((0, 8, 8))}
    loss = lambda p: jnp.sum(p["w"]) + jnp.sum(p["none"])
    assert pg.WeightPerturbation(pg.LowRank(1)).estimate(loss, key, None, params).grads[
        "none"
    ].shape == (0, 8, 8)


def test_inject_refuses_another_shape():
    with pytest.raises(ValueError, match=r"shape \(2,\).*shape \(3, 2\)"):
        pg.inject(0.0, jnp.zeros((3, 2)), jnp.zeros(2))


def test_low_rank_tangent_is_not_formed(key):
    """The compiled step holds no array of the size of the matrix but the matrix itself and its
    update."""
    n = 512
    w = jnp.zeros((n, n))
    x = jnp.ones((2, n))

    def slope(w, key):
        estimator = pg.WeightPerturbation(pg.LowRank(1))
        return estimator.estimate(lambda w: jnp.sum(jnp.tanh(x @ w)), key, None, w).directional

    compiled = jax.jit(slope).lower(w, key).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * n  # a quarter of one dense tangent


@pytest.mark.parametrize(
    ("model", "distribution"),
    [(model, pg.LowRank(2)) for model in models.STRICT]
    + [(models.mlp, d) for d in (pg.Normal(), pg.Sphere(), pg.LowRank(1))],
    ids=lambda x: getattr(x, "__name__", None) or repr(x),
)
def test_nothing_is_promoted_silently(model, distribution, key, strict):
    params, loss, args = model(key)
    estimator = pg.WeightPerturbation(distribution, 4, chunk=3)
    result = eqx.filter_jit(estimator.estimate)(loss, key, None, params, *args)
    assert jnp.isfinite(result.directional).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_a_key_gives_one_tangent_and_another_key_another(distribution, key):
    params, _, _ = models.mlp(key)
    first, again = distribution.sample(key, params), distribution.sample(key, params)
    close(dense(first), dense(again), 0)
    other = distribution.sample(jax.random.fold_in(key, 1), params)
    same = [
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    ]
    assert not all(same)


@pytest.mark.parametrize("distribution", [pg.Normal(), pg.Rademacher(), pg.LowRank(1)], ids=repr)
def test_a_leaf_keeps_its_tangent_when_the_tree_around_it_changes(distribution, key):
    alone = distribution.sample(key, {"w": jnp.zeros((8, 8))})
    among = distribution.sample(
        key, {"a": jnp.zeros((8, 8)), "w": jnp.zeros((8, 8)), "z": jnp.zeros(3)}
    )
    close(dense(alone["w"]), dense(among["w"]), 0)
    assert not np.array_equal(dense(among["a"]), dense(among["w"]))


def test_large_draws_of_signs_are_signs_and_balanced(key):
    signs = np.asarray(
        pg.Rademacher().sample(key, jnp.zeros((300, 333)))
    )  # large enough to be unpacked from bits
    assert set(np.unique(signs)) == {-1.0, 1.0}
    # 4.9 standard deviations of a sum of n signs, and of the sums of products of neighbours (32
    # lanes, one word)
    assert abs(signs.sum()) < 4.9 * signs.size**0.5
    flat = signs.reshape(-1)
    for lag in (1, 32, 333, flat.size // 32, -(-flat.size // 32)):
        assert abs((flat[lag:] * flat[:-lag]).sum()) < 4.9 * flat.size**0.5
