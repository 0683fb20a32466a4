"""What runs along structured tangents take of memory."""

import jax
import jax.numpy as jnp
from jax import lax

import prograde as pg


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
