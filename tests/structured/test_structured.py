"""Every rule for structured tangents of weights, against the same tangent formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import dense
from jax import lax
from structured_twins import DISTRIBUTIONS, array, directional, directional_and_twin, fallbacks

import prograde as pg
from prograde._structured import inner_products, inner_products_with, weighted_sum

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 8e-2}


def use(w_shape, function, x_shape=(4, 6)):
    return w_shape, lambda w: function(w, jnp.asarray(array(*x_shape), w.dtype))


PRODUCTS_AND_SHAPES = {
    "x @ w": use((6, 5), lambda w, x: x @ w),
    "w @ x": use((5, 4), lambda w, x: w @ x),
    "x @ w.T": use((5, 6), lambda w, x: x @ w.T),
    "w @ w.T": use((5, 6), lambda w, x: w @ w.T),
    "einsum to heads": use((6, 3, 5), lambda w, x: jnp.einsum("tm,mhd->thd", x, w)),
    "einsum from heads": use((3, 5, 8), lambda w, x: jnp.einsum("thd,hdm->tm", x, w), (4, 3, 5)),
    "einsum, fused qkv": use((6, 3, 2, 5), lambda w, x: jnp.einsum("tm,mahd->athd", x, w)),
    "experts": use((3, 6, 7), lambda w, x: jnp.einsum("etm,emn->etn", x, w), (3, 4, 6)),
    "weight first, batched": use(
        (3, 7, 6), lambda w, x: jnp.einsum("enm,etm->ent", w, x), (3, 4, 6)
    ),
    "heads by reshape": use((6, 8), lambda w, x: jnp.einsum("tm,mhd->htd", x, w.reshape(6, 4, 2))),
    "heads flattened": use((6, 3, 4), lambda w, x: x @ w.reshape(6, 12)),
    "flattened across the cut": use((3, 4, 6), lambda w, x: x @ w.reshape(12, 6).T),
    "squeeze": use((1, 6, 5), lambda w, x: x @ w[0]),
    "expand and broadcast": use(
        (6, 5), lambda w, x: x @ jnp.broadcast_to(w[None], (2, 6, 5)), (2, 4, 6)
    ),
    "slice": use((8, 5), lambda w, x: x @ w[1:7] + x[:, :3] @ w[2:8:2]),
    "layer of a stack": use((3, 6, 5), lambda w, x: x @ w[jnp.asarray(1)] + 2 * x @ w[2]),
    "dynamic slice": use((6, 9), lambda w, x: x @ lax.dynamic_slice(w, (0, 2), (6, 5))),
    "dynamic slice, both axes": use(
        (9, 6), lambda w, x: x @ lax.dynamic_slice(w, (jnp.asarray(2), jnp.asarray(1)), (6, 4))
    ),
    "slice, strides": use((13, 7), lambda w, x: x @ w[1::2, ::3]),
    "reversed columns": use(
        (6, 5), lambda w, x: jnp.cos(x @ w[:, ::-1]) @ jnp.arange(5.0, dtype=w.dtype)
    ),
    "split rows": use(
        (12, 3), lambda w, x: sum(i * x @ v for i, v in enumerate(jnp.split(w, 2), 1))
    ),
    "copied": use((6, 5), lambda w, x: x @ jnp.copy(w)),
    "stopped": use((6, 5), lambda w, x: x @ w + x @ lax.stop_gradient(w)),
    "outer product": use((6, 5), lambda w, x: jnp.einsum("ij,mn->ijmn", x, w)),
    "contracted to a number": use((4, 6), lambda w, x: jnp.einsum("mn,mn->", x, w)),
    "batched over a last axis": use((6, 5, 3), lambda w, x: jnp.einsum("tm,mnb->btn", x, w)),
    "weight first, two free axes": use((5, 3, 6), lambda w, x: jnp.einsum("abm,tm->abt", w, x)),
    "the larger weight first": use((6, 5), lambda w, x: w.T @ w[:, :2]),
    "the larger weight second": use((6, 5), lambda w, x: w[:, :2].T @ w),
    "divided by what depends on it": use((6, 9), lambda w, x: x @ (w / jnp.sum(w**2))),
    "taken from an array": use((6, 9), lambda w, x: x @ (jnp.asarray(array(6, 9), w.dtype) - w)),
    "taken from a number": use((6, 9), lambda w, x: x @ (2 - w)),
    "to integers": use((6, 9), lambda w, x: x @ w + jnp.sum(w.astype(int)).astype(w.dtype)),
    "split": use((6, 9), lambda w, x: sum(i * x @ v for i, v in enumerate(jnp.split(w, 3, 1), 1))),
    "reversed": use((6, 5), lambda w, x: x @ w[::-1]),
    "embedding": use((8, 9), lambda w, x: w[jnp.array([[0, 3], [7, -2]])]),
    "embedding, take": use((8, 9), lambda w, x: jnp.take(w, jnp.array([[0, 3], [5, 2]]), axis=0)),
    "embedding, out of bounds": use(
        (8, 9), lambda w, x: jnp.nan_to_num(jnp.take(w, jnp.array([0, 8, 3, 99]), axis=0))
    ),
    "embedding, clipped": use(
        (8, 9), lambda w, x: jnp.take(w, jnp.array([0, 8, 3, 99]), axis=0, mode="clip")
    ),
    "embedding, out of bounds, filled": use(
        (8, 9), lambda w, x: w.at[jnp.array([0, 8, 3, 99])].get(mode="fill", fill_value=0.5)
    ),
    "embedding, in bounds by promise": use(
        (8, 9), lambda w, x: w.at[jnp.array([7, 0, 3])].get(mode="promise_in_bounds")
    ),
    "an embedding for each": use((3, 8, 9), lambda w, x: jax.vmap(lambda w, i: w[i])(w, X_ROWS)),
    "windows": use(
        (8, 9),
        lambda w, x: jnp.einsum(
            "bij,tj->bti",
            jax.vmap(lambda i: lax.dynamic_slice(w, (i, i), (3, 6)))(jnp.asarray(X_ROWS)),
            x,
        ),
    ),
    "columns": use((8, 9), lambda w, x: w[:, jnp.array([[0, 3], [7, -2]])]),
    "rows and columns": use((8, 9), lambda w, x: w[jnp.array([0, 3, 5]), jnp.array([1, 2, 4])]),
    "an expert for each token": use(
        (3, 6, 9), lambda w, x: jnp.einsum("tm,tmn->tn", x, w[jnp.array([0, 2, 1, 1])])
    ),
    "tied embedding": use((9, 6), lambda w, x: w[jnp.array([1, 2])] @ w.T),
    "a row": use((6, 8), lambda w, x: w[0] @ jnp.arange(8.0, dtype=w.dtype)),
    "flattened": use((6, 8), lambda w, x: w.ravel() @ jnp.arange(48.0, dtype=w.dtype)),
    "repeated": use((6, 5), lambda w, x: x @ jnp.repeat(w, 2, axis=0)[:6]),
    "broadcast and reshaped": use(
        (6, 8),
        lambda w, x: jnp.broadcast_to(w[:, None], (6, 4, 8)).reshape(24, 8) @ x.T[:8],
        (4, 8),
    ),
    "scaled": use((6, 9), lambda w, x: x @ (w * 2 / 3)),
    "scaled by what depends on it": use((6, 9), lambda w, x: x @ (w * jnp.sum(w**2))),
    "numbers added": use((6, 9), lambda w, x: x @ (1 - w + 2) - 3 * x @ (-w - 1)),
    "arrays added": use((6, 9), lambda w, x: x @ (w + jnp.asarray(array(6, 9), w.dtype))),
    "converted": use(
        (6, 9), lambda w, x: (x.astype(jnp.float32) @ w.astype(jnp.float32)).astype(w.dtype)
    ),
    "vmap over experts": use((3, 6, 9), lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), (3, 4, 6)),
    "vmap over a last axis": use((6, 7, 3), lambda w, x: jax.vmap(lambda w: x @ w, in_axes=2)(w)),
    "vmap over the batch": use((6, 5), lambda w, x: jax.vmap(lambda row: row @ w)(x)),
}
X_ROWS = np.array([1, 0, 2])
FORMED = {
    "flattened", "w @ w.T", "arrays added", "scaled by what depends on it", "an embedding for each",
    "the larger weight first", "the larger weight second", "divided by what depends on it",
    "taken from an array", "to integers",
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS_AND_SHAPES)
def test_structured_equals_dense_and_is_not_formed(name, key, x64, strict):
    shape, function = PRODUCTS_AND_SHAPES[name]
    w = jnp.asarray(array(*shape))
    narrow = name == "converted"
    loss = lambda w: jnp.sum(jnp.sin(function(w)))
    actual, expected = directional_and_twin(loss, w, DISTRIBUTIONS, key)
    assert np.abs(expected).min() > 1e-6
    np.testing.assert_allclose(actual, expected, rtol=1e-5 if narrow else TOLERANCE["float64"])
    assert bool(fallbacks(loss, w, pg.LowRank(1))) == (name in FORMED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["x @ w", "einsum to heads", "embedding", "heads by reshape", "split"]
)
def test_structured_equals_dense_in_other_dtypes(name, dtype, key):
    shape, function = PRODUCTS_AND_SHAPES[name]
    w = jnp.asarray(array(*shape), dtype)
    loss = lambda w: jnp.mean(jnp.square(function(w).astype(jnp.float32)))
    distributions = (pg.LowRank(1), pg.LowRank(2, pg.Normal()))

    @jax.jit
    def both(w, wide):  # the twin computes in float32
        norm = jnp.sqrt(jnp.sum(jax.grad(loss)(wide) ** 2))
        tangents = [d.sample(key, w).dense().astype(jnp.float32) for d in distributions]
        expected = [jax.jvp(loss, (wide,), (v,))[1] for v in tangents]
        return [directional(loss, w, d, key) for d in distributions], expected, norm

    with jax.debug_key_reuse(False):  # the same key on purpose
        actual, expected, norm = both(w, w.astype(jnp.float32))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32
        assert abs(a - e) < TOLERANCE[dtype] * norm


def test_complex_and_wider_activations_keep_what_they_have(key, x64):
    w, x = jnp.asarray(array(6, 8)), jnp.asarray(array(4, 6))
    distributions = [pg.LowRank(1), pg.LowRank(2)]
    losses = {
        "complex": lambda w: jnp.sum(jnp.abs((x + 1j * x**2) @ w)),
        "Fourier": lambda w: jnp.sum(jnp.fft.irfft(jnp.fft.rfft(x, axis=0) @ w, axis=0) ** 3),
    }
    for loss in losses.values():
        actual, expected = directional_and_twin(loss, w, distributions, key)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
    narrow = w.astype(jnp.float32)
    actual, expected = directional_and_twin(
        lambda w: jnp.sum(jnp.sin(x @ w)), narrow, distributions, key
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_a_wide_sum_of_narrow_products_stays_wide(key):
    w, x = jnp.asarray(array(4096, 64), jnp.bfloat16), jnp.asarray(array(8, 4096), jnp.bfloat16)
    loss = lambda w: jnp.sum(jnp.dot(x, w, preferred_element_type=jnp.float32))
    actual = directional(loss, w, pg.LowRank(1), key)
    tangent = np.asarray(pg.LowRank(1).sample(key, w).dense(), np.float64)
    np.testing.assert_allclose(actual, np.sum(np.asarray(x, np.float64) @ tangent), rtol=1e-5)


def test_keys_of_another_kind_give_tangents_that_do_not_depend_on_chunks(seed):
    key = jax.random.key(seed, impl="rbg")
    w, x = jnp.asarray(array(6, 8), jnp.float32), jnp.asarray(array(4, 6), jnp.float32)
    loss = lambda w: jnp.sum(jnp.sin(x @ w))
    for distribution in (pg.LowRank(1), pg.Normal()):
        estimators = [pg.WeightPerturbation(distribution, 4, chunk=c) for c in (1, 2, 4)]
        estimates = [jax.jit(lambda w, e=e: e.estimate(loss, key, None, w))(w) for e in estimators]
        for other in estimates[1:]:
            np.testing.assert_allclose(
                other.directional, estimates[0].directional, rtol=1e-4, atol=1e-4
            )
            np.testing.assert_allclose(other.grads, estimates[0].grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_normal_numbers_have_no_mean(dtype, key):
    drawn = np.asarray(pg.Normal().sample(key, jnp.zeros(2_000_000, dtype)), np.float64)
    assert abs(drawn.mean()) < 4.9 / np.sqrt(drawn.size)  # one in a million
    assert abs(drawn.var() - 1) < 4.9 * np.sqrt(2 / drawn.size) + 2**-9  # and the rounding


def test_weights_of_numpy_are_parameters(key):
    w = array(6, 8).astype(np.float32)
    grads = (
        pg.WeightPerturbation()
        .estimate(lambda w: jnp.sum(w**2), key, None, {"w": w, "rate": 0.1, "n": 3}["w"])
        .grads
    )
    assert grads.shape == (6, 8)


@jax.custom_jvp
def looked_up(table, tokens):
    return table[tokens]


looked_up.defjvp(lambda p, t: (looked_up(*p), 3 * t[0][p[1]]))  # not the derivative of its code


@jax.custom_jvp
def cubed(w):
    return w**3


cubed.defjvp(lambda p, t: (cubed(*p), 5 * p[0] ** 2 * t[0]))


def test_a_rule_by_hand_is_obeyed_and_keeps_the_factors_where_it_needs_the_tangent_alone(key, x64):
    """The first never forms [vocabulary, width]; both give what the rule says, and not the code."""
    w, tokens = jnp.asarray(array(50, 6)), jnp.array([[3, 7], [1, 3]])
    for loss, formed in (
        (lambda w: jnp.sum(jnp.sin(looked_up(w, tokens))), []),
        (lambda w: jnp.sum(jnp.sin(looked_up(jax.jit(jnp.negative)(w), tokens))), []),
        (lambda w: jnp.sum(jnp.sin(cubed(w)[tokens])), ["cubed"]),
    ):
        actual, expected = directional_and_twin(loss, w, DISTRIBUTIONS, key)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
        assert fallbacks(loss, w, pg.LowRank(1)) == formed


def test_an_operand_of_a_rule_by_hand_that_has_a_tangent_keeps_it(key, x64):
    """x carries a tangent too: the output's is the sum of both."""

    @jax.custom_jvp
    def product(x, w):
        return x @ w

    @product.defjvp
    def _(primals, tangents):
        (x, w), (xdot, wdot) = primals, tangents
        return x @ w, 2 * (xdot @ w) + 3 * (x @ wdot)

    x = jnp.asarray(array(4, 6))
    loss = lambda w: jnp.sum(jnp.sin(product(jnp.tanh(x @ w), w)))
    w = jnp.asarray(array(6, 6)) / 3
    actual, expected = directional_and_twin(loss, w, DISTRIBUTIONS, key)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_a_bias_that_is_broadcast_is_not_listed_as_dense():
    """What is formed is smaller than what it is added to.

    A sum of weights of one shape does cost.
    """
    x = jnp.ones((5, 4, 3))
    for function in (lambda b: x + b, lambda b: b * x, lambda b: x - jnp.broadcast_to(b, x.shape)):
        assert (
            fallbacks(
                lambda b, f=function: jnp.sum(jnp.tanh(f(b))), jnp.ones((4, 3)), pg.LowRank(1)
            )
            == []
        )
    loss = lambda w: jnp.sum(jnp.tanh(x @ (w + jnp.ones((3, 3)))))
    assert fallbacks(loss, jnp.eye(3), pg.LowRank(1)) == ["add"]


@pytest.mark.parametrize("k", [3, 20])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_sums_and_products_of_tangents_equal_those_of_formed_ones(distribution, k, key, x64):
    """A few terms are added up, and many multiplied as matrices.

    Both equal the sum of formed tangents.
    """
    params = {"w": jnp.zeros((6, 5)), "t": jnp.zeros((2, 6, 3)), "b": jnp.zeros(4)}
    sample = jax.jit(jax.vmap(lambda i: distribution.sample(key, params, i, k)))
    tangents = jax.device_get(sample(jnp.arange(k)))
    each = [jax.tree.map(lambda x, i=i: x[i], tangents) for i in range(k)]
    flat = np.stack(
        [np.concatenate([np.ravel(x) for x in jax.tree.leaves(dense(t))]) for t in each]
    )
    c = np.arange(1.0, k + 1)
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(weighted_sum(tangents, c))])
    np.testing.assert_allclose(found, c @ flat, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(inner_products(tangents), flat @ flat.T, rtol=1e-9, atol=1e-9)
    tree = jax.tree.map(lambda x: jnp.asarray(array(*x.shape)), params)
    expected = flat @ np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    np.testing.assert_allclose(inner_products_with(tree, tangents), expected, rtol=1e-9)


def test_many_rows_times_a_vector_equal_few(key, x64):
    """Above 2^17 numbers the product with a factor is another operation."""
    for rows in (4, 520):
        x = jnp.asarray(array(rows, 256))
        w = jnp.asarray(array(256, 3)) / 16
        loss = lambda w, x=x: jnp.mean(jnp.sin(x @ w))
        actual, expected = directional_and_twin(loss, w, [pg.LowRank(1)], key)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
