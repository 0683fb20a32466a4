"""A network in equilibrium, found by Newton's method."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Weights = dict[str, Array]


def predict(
    weights: Weights, inputs: Float[Array, "batch 2"], implicit: bool = False
) -> Float[Array, " batch"]:
    """Returns the output c . x of the equilibrium x = tanh(x W + z U + b).

    Newton's method runs until no unit of the batch moves. With `implicit`, the derivative is that
    of the implicit-function theorem, by one step from the solution held constant (arXiv
    2305.13768). Reverse mode can differentiate that step.
    """
    n = weights["bias"].size

    def gap(weights, x):
        active = jnp.tanh(x @ weights["recurrent"] + inputs @ weights["input"] + weights["bias"])
        return x - active, jnp.eye(n, dtype=x.dtype) - (1 - active**2)[:, :, None] * weights[
            "recurrent"
        ].T

    def change(weights, x, jacobian_weights):
        jacobian = gap(jacobian_weights, lax.stop_gradient(x))[1]
        return -jnp.linalg.solve(jacobian, gap(weights, x)[0][:, :, None])[:, :, 0]

    # the derivative of the Jacobian can be left out: its factor vanishes at the solution
    constant = lax.stop_gradient(weights)

    def body(state):
        x, _, count = state
        moved = change(constant if implicit else weights, x, constant)
        return x + moved, lax.stop_gradient(jnp.max(jnp.abs(moved))), count + 1

    first = (
        jnp.zeros((len(inputs), n), inputs.dtype),
        jnp.asarray(jnp.inf, inputs.dtype),
        jnp.asarray(0),
    )
    x = lax.while_loop(lambda state: (state[1] > 1e-8) & (state[2] < 50), body, first)[0]
    if implicit:
        x = x + change(weights, x, constant)
    return x @ weights["output"]


def initial(key: Array, n: int) -> Weights:
    """Draws weights of n units. Recurrent weights are small, so that there is one equilibrium."""
    recurrent, given, output = jax.random.split(key, 3)
    return {
        "recurrent": 0.4 / math.sqrt(n) * jax.random.normal(recurrent, (n, n)),
        "input": jax.random.normal(given, (2, n)),
        "bias": jnp.zeros(n),
        "output": 0.3 / math.sqrt(n) * jax.random.normal(output, (n,)),
    }


def examples(key: Array, batch: int) -> tuple[Array, Array]:
    """Draws points of a square, and a product of waves at these points."""
    z = jax.random.uniform(key, (batch, 2), minval=-1.5, maxval=1.5)
    return z, jnp.sin(2 * z[:, 0]) * jnp.cos(2 * z[:, 1])
