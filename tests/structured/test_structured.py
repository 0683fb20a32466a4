"""Every rule for structured tangents against its dense twin: primitives, control flow, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import combinations
from jax import lax
from jax.sharding import PartitionSpec as P

import prograde as pg
from prograde._structured import LowRankTangent

DISTRIBUTIONS = [pg.LowRank(1), pg.LowRank(2, pg.Normal()), pg.Separable(2)]
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 8e-2}


def array(*shape, dtype="float64"):
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def dense(tangents):
    return jax.tree.map(
        lambda t: t.dense() if isinstance(t, LowRankTangent) else t,
        tangents,
        is_leaf=lambda t: isinstance(t, LowRankTangent),
    )


def directional(loss, w, distribution, key):
    return pg.WeightPerturbation(distribution).estimate(loss, key, None, w).directional[0]


def directional_and_twin(loss, w, distributions, key, jit=True):
    """grad . v through the rules, and by plain jax.jvp along the dense tangent, for each distribution."""

    def both(w, key):
        actual = [directional(loss, w, distribution, key) for distribution in distributions]
        tangents = [dense(distribution.sample(key, w)) for distribution in distributions]
        _, expected = jax.vmap(lambda v: jax.jvp(loss, (w,), (v,)))(jnp.stack(tangents))
        return jnp.stack(actual), expected

    with jax.debug_key_reuse(False):  # the same key on purpose
        return (jax.jit(both) if jit else both)(w, key)


def fallbacks(loss, w, distribution):
    return [
        f.primitive
        for _, f in pg.check(
            loss, w, estimator=pg.WeightPerturbation(distribution), memory=False
        ).dense
    ]


def conv(x_shape, w_shape, **kwargs):
    kwargs = {"window_strides": (1,) * (len(x_shape) - 2), "padding": "SAME"} | kwargs
    return w_shape, lambda w: lax.conv_general_dilated(
        jnp.asarray(array(*x_shape), w.dtype), w, **kwargs
    )


NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
NHC = {"dimension_numbers": ("NHC", "HIO", "NHC")}
CONVOLUTIONS = {
    "2-D": conv((2, 8, 7, 3), (3, 3, 3, 4), **NHWC),
    "strides": conv(
        (2, 8, 7, 3), (3, 2, 3, 4), **NHWC | {"window_strides": (2, 3), "padding": "VALID"}
    ),
    "channels first, dilated kernel": conv(
        (2, 6, 8, 7),
        (4, 6, 3, 3),
        window_strides=(1, 2),
        padding=((1, 2), (0, 1)),
        rhs_dilation=(2, 1),
    ),
    "groups": conv((2, 8, 7, 6), (3, 3, 3, 4), **NHWC | {"feature_group_count": 2}),
    "groups, channels first": conv((2, 6, 5, 7), (4, 3, 3, 3), feature_group_count=2),
    "depthwise": conv((2, 8, 7, 6), (3, 3, 1, 6), **NHWC | {"feature_group_count": 6}),
    "one channel": conv((2, 8, 7, 1), (3, 3, 1, 6), **NHWC),
    "1 x 1": conv((2, 8, 7, 5), (1, 1, 5, 6), **NHWC),
    "transposed": conv(
        (2, 6, 5, 3), (3, 3, 3, 4), **NHWC | {"padding": ((2, 2), (2, 3)), "lhs_dilation": (2, 2)}
    ),
    "negative padding": conv((2, 8, 7, 3), (3, 3, 3, 4), **NHWC | {"padding": ((-1, 0), (0, -2))}),
    "1-D": conv((2, 20, 3), (9, 3, 4), **NHC | {"window_strides": (2,)}),
    "1-D, cut at the offsets": conv((2, 20, 16), (9, 16, 4), **NHC),
    "1-D, cut at the offsets, groups": conv(
        (2, 20, 32), (9, 16, 4), **NHC | {"feature_group_count": 2}
    ),
    "3-D": conv(
        (1, 5, 6, 4, 3),
        (2, 3, 2, 3, 4),
        window_strides=(1, 1, 2),
        dimension_numbers=("NHWDC", "HWDIO", "NHWDC"),
    ),
    "input channels first": conv(
        (2, 9, 8, 8), (9, 4, 3, 3), dimension_numbers=("NCHW", "IOHW", "NCHW")
    ),
    "output before input": conv(
        (2, 8, 8, 5), (3, 3, 4, 5), dimension_numbers=("NHWC", "HWOI", "NHWC")
    ),
}


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
    "columns": use((8, 9), lambda w, x: w[:, jnp.array([[0, 3], [7, -2]])]),
    "rows and columns": use((8, 9), lambda w, x: w[jnp.array([0, 3]), jnp.array([1, 2])]),
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
FORMED = {"flattened", "w @ w.T", "arrays added", "scaled by what depends on it"}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *PRODUCTS_AND_SHAPES])
def test_structured_equals_dense_and_is_not_formed(name, key, x64, strict):
    shape, function = (CONVOLUTIONS | PRODUCTS_AND_SHAPES)[name]
    w = jnp.asarray(array(*shape))
    narrow = name == "converted"
    loss = lambda w: jnp.sum(jnp.sin(function(w)))
    actual, expected = directional_and_twin(loss, w, DISTRIBUTIONS, key)
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(actual, expected, rtol=1e-5 if narrow else TOLERANCE["float64"])
    if name not in FORMED:
        assert fallbacks(loss, w, pg.LowRank(1)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["2-D", "groups", "einsum to heads", "embedding", "heads by reshape", "split"]
)
def test_structured_equals_dense_in_other_dtypes(name, dtype, key):
    shape, function = (CONVOLUTIONS | PRODUCTS_AND_SHAPES)[name]
    w = jnp.asarray(array(*shape), dtype)
    loss = lambda w: jnp.mean(jnp.square(function(w).astype(jnp.float32)))
    for distribution in (pg.LowRank(1), pg.LowRank(2, pg.Normal())):
        actual = pg.WeightPerturbation(distribution).estimate(loss, key, None, w).directional[0]
        assert actual.dtype == jnp.float32
        tangent = (
            distribution.sample(key, w).dense().astype(jnp.float32)
        )  # the twin computes in float32
        expected = jax.jvp(loss, (w.astype(jnp.float32),), (tangent,))[1]
        scale = jnp.sqrt(jnp.sum(jax.grad(loss)(w.astype(jnp.float32)) ** 2))
        assert abs(actual - expected) < TOLERANCE[dtype] * scale


CONTROL_FLOW = {
    "jit": lambda w, x: jax.jit(lambda w: x @ w[0])(w),
    "scan over the stack": lambda w, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0],
    "scan in reverse, weights out": lambda w, x: lax.scan(
        lambda h, w: (h @ w, h @ w), x, w, reverse=True
    )[1],
    "scan in scan": lambda w, x: lax.scan(
        lambda h, w: (lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, w)[0], None),
        x,
        w.reshape(2, 2, 6, 6),
    )[0],
    "scan, weight constant": lambda w, x: lax.scan(
        lambda h, _: (jnp.tanh(h @ w[0]), None), x, None, 3
    )[0],
    "fori_loop": lambda w, x: lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ w[i]), x),
    "while_loop": lambda w, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w[0])), (0, x)
    )[1],
    "while_loop, weight in its condition": lambda w, x: lax.while_loop(
        lambda h: jnp.sum(h @ w[1]) < 1e3, lambda h: h * 1.5 + 0.1 * jnp.abs(h @ w[0]), x
    ),
    "vmapped while_loop": lambda w, x: jax.vmap(
        lambda x: lax.while_loop(
            lambda h: jnp.sum(h**2) < 99, lambda h: 1.3 * h + 0.1 * h @ w[0], x
        )
    )(x),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda w: jnp.sin(x @ w[0]), lambda w: x @ w[1], w),
    "switch": lambda w, x: lax.switch(
        1, [lambda w: x @ w[0], lambda w: jnp.cos(x @ w[1]), lambda w: x], w
    ),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w: jnp.tanh(x @ w[0]) @ w[1])(w),
    "checkpointed scan": lambda w, x: lax.scan(
        jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, w
    )[0],
    "vmap": lambda w, x: jax.vmap(lambda w, row: row @ w)(w, x),
    "custom_jvp": lambda w, x: jax.nn.silu(jax.nn.relu(x @ w[0])),
    "bias added at the end of a body": lambda w, x: lax.scan(
        lambda h, b: (h + b, None), x, w[0][:4]
    )[0],
    "bias in fori_loop": lambda w, x: lax.fori_loop(0, 3, lambda i, h: h + w[0, 0], x),
    "bias in while_loop": lambda w, x: lax.while_loop(
        lambda h: jnp.sum(h) < 99, lambda h: 1.5 * h + 1 + w[1, :4], x
    ),
    "body that returns a weight": lambda w, x: x @ lax.scan(lambda c, v: (v, None), w[0], w[1:])[0],
    "cond in scan in jit": lambda w, x: jax.jit(
        lambda w: lax.scan(
            lambda h, w: (lax.cond(h[0, 0] > 0, lambda: h @ w, lambda: h @ w.T), None), x, w
        )[0]
    )(w),
}


# without `jit`, one of each kind of control flow
WITHOUT_JIT = ("jit", "scan over the stack", "while_loop", "cond", "checkpoint", "vmap")


@combinations(
    lambda name, jit: jit or name in WITHOUT_JIT, name=list(CONTROL_FLOW), jit=[False, True]
)
def test_control_flow_keeps_the_factors(name, jit, key, x64):
    w, x = jnp.asarray(array(4, 6, 6)) / 2, jnp.asarray(array(4, 6))
    loss = lambda w: jnp.sum(jnp.sin(CONTROL_FLOW[name](w, x)))
    distributions = (pg.LowRank(1), pg.Separable(2)) if jit else (pg.LowRank(1),)
    actual, expected = directional_and_twin(loss, w, distributions, key, jit)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    if "bod" not in name and "bias" not in name:
        assert fallbacks(loss, w, pg.LowRank(1)) == []


@pytest.mark.parametrize(
    ("x_spec", "spec", "out_spec"),
    [
        (P(None, "i"), P("i", None), P()),
        (P(), P(None, "i"), P(None, "i")),
        (P("i", None), P(), P("i", None)),
        (P(), P(), P()),
    ],
    ids=["inputs sharded", "outputs sharded", "batch sharded", "replicated"],
)
def test_weights_enter_shard_map_with_their_factors(x_spec, spec, out_spec, key, x64):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices: XLA_FLAGS was set without them")
    mesh = jax.make_mesh(
        (2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    w, x = jnp.asarray(array(6, 8)), jnp.asarray(array(4, 6))

    def product(x, w):
        z = x @ w
        return lax.psum(z, "i") if spec == P("i", None) else z

    sharded = jax.shard_map(product, mesh=mesh, in_specs=(x_spec, spec), out_specs=out_spec)
    loss = lambda w: jnp.sum(jnp.sin(sharded(x, w)))
    twin = lambda w: jnp.sum(jnp.sin(x @ w))
    for distribution in (pg.LowRank(1), pg.LowRank(2)):
        assert fallbacks(loss, w, distribution) == []
        actual = float(jax.jit(lambda w, key: directional(loss, w, distribution, key))(w, key))
        tangent = distribution.sample(key, w).dense()
        np.testing.assert_allclose(actual, float(jax.jvp(twin, (w,), (tangent,))[1]), rtol=1e-9)


def test_chunks_do_not_form_structured_tangents(key):
    """K tangents in chunks take the memory of their factors, and of one gradient."""
    n, k = 512, 32
    w, x = jnp.zeros((n, n)), jnp.ones((2, n))
    estimator = pg.WeightPerturbation(pg.LowRank(1), num_tangents=k, chunk=4)
    step = jax.jit(
        lambda w, key: estimator.estimate(lambda w: jnp.sum(jnp.tanh(x @ w)), key, None, w).grads
    )
    assert step.lower(w, key).compile().memory_analysis().temp_size_in_bytes < 2 * w.nbytes


def test_memory_of_a_step_is_flat_in_depth_and_has_no_array_of_the_size_of_the_weights(key):
    width, batch = 256, 4
    x = jnp.ones((batch, width))

    def temporaries(depth, estimator):
        def loss(ws):
            return jnp.mean(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0] ** 2)

        def step(ws, key):
            _, grads = pg.value_and_grad(loss, estimator)(key, ws)
            return ws - 1e-3 * grads

        shape = jax.ShapeDtypeStruct((depth, width, width), jnp.float32)
        compiled = jax.jit(step, donate_argnums=0).lower(shape, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_layer = 4 * width**2
    for estimator in (pg.WeightPerturbation(), pg.WeightPerturbation(pg.Separable())):
        shallow, deep = temporaries(2, estimator), temporaries(40, estimator)
        factors = 40 * 4 * (2 * width) * 4
        assert deep < shallow + factors < 2 * one_layer + factors
        assert deep < 40 * one_layer / 10


def test_a_chunk_is_chosen_that_fits_into_memory(key):
    def size(num_tangents, width, prepare=lambda x: x):
        x = jnp.ones((2048, width))
        loss = lambda w: jnp.sum(jnp.tanh(jnp.tanh(prepare(x) @ w) @ w))
        estimate = pg.WeightPerturbation(num_tangents=num_tangents).estimate
        program = jax.make_jaxpr(lambda w: estimate(loss, key, None, w).directional)(
            jnp.zeros((width, width))
        )
        loops = [
            e for e in program.jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] > 2
        ]
        return -(-num_tangents // (1 + loops[0].params["length"])) if loops else num_tangents

    wide, narrow = size(1000, 256), size(1000, 16)
    assert 1 <= wide < narrow <= 1000
    each = 2048 * 256 * 4
    assert 2**28 / (8 * each) < wide <= 2**28 / each
    assert size(3, 16) == 3
    # what has no tangent does not hide what has one
    large = lambda x: x + jnp.sum(jnp.sin(jnp.ones((16, *x.shape)) * x), 0)
    assert size(1000, 256, large) <= 1.2 * wide


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
        estimates = [
            pg.WeightPerturbation(distribution, 4, chunk=chunk).estimate(loss, key, None, w)
            for chunk in (1, 2, 4)
        ]
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


def test_chunks_inside_shard_map(key):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices: XLA_FLAGS was set without them")
    mesh = jax.make_mesh(
        (2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    w, x = jnp.asarray(array(6, 8), jnp.float32), jnp.asarray(array(4, 6), jnp.float32)

    def estimate(chunk):
        estimator = pg.WeightPerturbation(pg.LowRank(1), 4, chunk=chunk)
        inside = lambda w, x: estimator.estimate(
            lambda w: jnp.sum(jnp.sin(x @ w)), key, None, w
        ).directional[None]
        return jax.shard_map(inside, mesh=mesh, in_specs=(P(), P("i")), out_specs=P("i"))(w, x)

    np.testing.assert_allclose(estimate(2), estimate(4), rtol=1e-4, atol=1e-4)


def test_a_strided_kernel_takes_no_more_memory_than_its_dense_tangent(key):
    w, x = (
        jax.ShapeDtypeStruct((16, 16, 3, 96), jnp.float32),
        jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32),
    )

    def temporaries(distribution):
        loss = lambda w, x: jnp.mean(
            lax.conv_general_dilated(
                x, w, (16, 16), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            ** 2
        )
        estimate = lambda w, x: (
            pg.WeightPerturbation(distribution).estimate(loss, key, None, w, x).directional
        )
        return jax.jit(estimate).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(pg.LowRank(1)) < 2 * temporaries(pg.Rademacher()) + 2**20


def test_weights_of_numpy_are_parameters(key):
    w = array(6, 8).astype(np.float32)
    grads = (
        pg.WeightPerturbation()
        .estimate(lambda w: jnp.sum(w**2), key, None, {"w": w, "rate": 0.1, "n": 3}["w"])
        .grads
    )
    assert grads.shape == (6, 8)
