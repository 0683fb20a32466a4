"""Measures what bounds a structured step."""

# ruff: noqa: E731

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import prograde as pg
from prograde.lab import models
from prograde.lab.display import Display
from prograde.lab.measure.timing import Visit, compiled, programs_in_turns, take_turns

_COMPILE_ROUNDS = 3


def product(rounds: int, display: Display) -> dict[str, Any]:
    """Measures primal and tangent rows in one product with a weight, or in two."""
    x, w = jnp.ones((64, 1024)), jnp.ones((1024, 1024))
    two = compiled(lambda x, v, w: (x @ w, v @ w), x, 0.5 * x, w)
    stacked = lambda x, v, w: jnp.split(jnp.concatenate([x, v]) @ w, 2)
    programs = {
        "two products": two,
        "one product of stacked rows": compiled(stacked, x, 0.5 * x, w),
    }
    return programs_in_turns(programs, rounds, "two products", display, "one product")


def cnn(rounds: int, display: Display) -> dict[str, Any]:
    """Measures the paper's CNN: loss, tangent along the input, forward gradient, backprop."""
    network = models.cnn()
    params = network.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (64, 28, 28))
    labels = jnp.zeros(64, jnp.int32)
    loss = lambda params, x: network.loss(params, x, labels)
    by_input = lambda p, x, v: jax.jvp(lambda x: loss(p, x), (x,), (v,))
    grad_fn = pg.value_and_grad(loss, pg.WeightPerturbation())
    programs = {
        "loss": compiled(loss, params, x),
        "jax.jvp by the input": compiled(by_input, params, x, 0.3 * x),
        "forward gradient": compiled(grad_fn, jax.random.key(2), params, x),
        "backprop": compiled(jax.value_and_grad(loss), params, x),
    }
    return programs_in_turns(programs, rounds, "loss", display, "the paper's CNN")


def convolution(rounds: int, display: Display) -> dict[str, Any]:
    """Measures one layer of the CNN: XLA's convolution, and products of shifted slices.

    The input is 64 x 26 x 26 x 64, and the kernel 3 x 3 with 64 outputs.
    """
    x = jax.random.normal(jax.random.key(0), (64, 26, 26, 64))
    w = jax.random.normal(jax.random.key(1), (3, 3, 64, 64))
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=numbers)
    pool = lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    layer = lambda x, w: jax.nn.relu(conv(x, w))
    corners = [(i, j) for i in range(3) for j in range(3)]
    shifted = lambda x, w: sum(x[:, i : i + 24, j : j + 24] @ w[i, j] for i, j in corners)
    np.testing.assert_allclose(shifted(x, w), conv(x, w), rtol=1e-3, atol=1e-3)
    tangent = lambda x, v, w: jax.jvp(lambda x: layer(x, w), (x,), (v,))
    stacked = lambda x, v, w: conv(jnp.concatenate([x, v]), w)
    programs = {
        "convolution": compiled(conv, x, w),
        "convolution and ReLU": compiled(layer, x, w),
        "convolution, ReLU and pooling": compiled(lambda x, w: pool(layer(x, w)), x, w),
        "jvp of convolution and ReLU": compiled(tangent, x, 0.3 * x, w),
        "primal and tangent as one batch": compiled(stacked, x, 0.3 * x, w),
        "products of shifted slices": compiled(shifted, x, w),
    }
    return programs_in_turns(programs, rounds, "convolution", display, "a convolution")


def compilation(
    rounds: int, display: Display, layers: int = 100, width: int = 1024, batch: int = 64
) -> dict[str, Any]:
    """Measures the seconds to trace, lower and compile a step of an unrolled network."""
    shapes = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * layers
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)

    def loss(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return jnp.mean(x**2)

    def visit(estimator: pg.Estimator) -> Visit:
        def step(key, params, x):
            value, gradient = pg.value_and_grad(loss, estimator)(key, params, x)
            return jax.tree.map(lambda w, g: w - 1e-3 * g, params, gradient), value

        def compile_it(_: int) -> float:
            jax.clear_caches()
            begin = time.perf_counter()
            jax.jit(step, donate_argnums=1).lower(jax.random.key(0), shapes, x).compile()
            return time.perf_counter() - begin

        return compile_it

    visits = {
        "backprop": visit(pg.Backprop()),
        "prograde-1": visit(pg.WeightPerturbation()),
        "prograde-4": visit(pg.WeightPerturbation(num_tangents=4)),
    }
    turns = take_turns(visits, min(rounds, _COMPILE_ROUNDS), display, "compilation", calls=1)
    return turns.summary("backprop")


PARTS = {
    "product": product,
    "cnn": cnn,
    "convolution": convolution,
    "compilation": compilation,
}
"""The parts of the study: the name of each record, and what measures it."""
