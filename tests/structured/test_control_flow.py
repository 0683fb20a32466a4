"""Loops, branches, calls and shards that a weight with a structured tangent enters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import combinations
from jax import lax
from jax.sharding import PartitionSpec as P
from structured_twins import array, directional, directional_and_twin, fallbacks

import prograde as pg

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


@pytest.mark.long
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
