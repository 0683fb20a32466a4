"""Random small programs: a tangent kept as factors equals the same tangent formed."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from structured_twins import array, directional_and_twin

import prograde as pg

# each step takes a matrix [a, b], and returns a matrix: of a weight, whose factors it keeps or not
STEPS = {
    "transpose": lambda w: w.T,
    "rows reversed": lambda w: w[::-1],
    "columns cut": lambda w: w[:, 1:],
    "every other row": lambda w: w[::2],
    "scaled": lambda w: -0.5 * w,
    "shifted": lambda w: 1 - w,
    "repeated": lambda w: jnp.repeat(w, 2, axis=0),
    "reshaped": lambda w: w.reshape(-1, w.shape[0]).T if w.size % w.shape[0] == 0 else w,
    "rows gathered": lambda w: w[jnp.array([0, 1, 0])],
    "a layer of a stack": lambda w: jnp.stack([w, 2 * w])[1],
    "squashed": jnp.tanh,
    "normalised": lambda w: w / (1 + jnp.sum(w**2)),
    "halves": lambda w: sum(jnp.split(w[:, : w.shape[1] // 2 * 2], 2, axis=1)),
}
# each use takes such a matrix and an activation [3, a], and returns an array
USES = {
    "product": lambda w, x: x @ w,
    "product from the left": lambda w, x: w.T @ x.T,
    "with itself": lambda w, x: x @ w @ w.T,
    "rows": lambda w, x: w[jnp.array([1, 0])] * 2,
    "einsum": lambda w, x: jnp.einsum("ta,ab,sb->ts", x, w, jnp.ones((2, w.shape[1]), w.dtype)),
}
AROUND = {
    "as it is": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda w, x: lax.scan(lambda c, _: (c + f(w, x), None), f(w, x), None, 2)[0],
    "while": lambda f: (
        lambda w, x: lax.fori_loop(0, jnp.asarray(2), lambda i, c: c + f(w, x), f(w, x))
    ),
    "cond": lambda f: lambda w, x: lax.cond(x[0, 0] > 0, f, lambda w, x: -f(w, x), w, x),
    "vmap": lambda f: lambda w, x: jax.vmap(lambda s: f(s * w, x))(jnp.arange(2.0, dtype=w.dtype)),
}


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=4),
    how=st.sampled_from(sorted(USES)),
    around=st.sampled_from(sorted(AROUND)),
    distribution=st.sampled_from([pg.LowRank(1), pg.LowRank(2), pg.Separable(1)]),
)
def test_structured_equals_dense(steps, how, around, distribution):
    def program(w, x):
        for step in steps:
            w = STEPS[step](w)
        return USES[how](
            w, x[:, : w.shape[0]] if w.shape[0] <= 6 else jnp.tile(x, (1, 4))[:, : w.shape[0]]
        )

    with jax.enable_x64(True):
        w, x = jnp.asarray(array(6, 5)), jnp.asarray(array(3, 6))
        loss = lambda w: jnp.sum(jnp.sin(AROUND[around](program)(w, x)))
        actual, expected = directional_and_twin(loss, w, [distribution], jax.random.key(0))
        np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10)
