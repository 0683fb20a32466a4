"""Recurrent cells as plain functions: `(params, state, x) -> (state, output)`, for any batch axes.

The recurrence of `min_gru`, `rg_lru` and `lru` is element by element, so that the influence of
their parameters on their state is sparse; that of `gru` is dense. Each has a linear readout.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Params = dict[str, Array]
State = Any  # an array, or a dict of arrays
Cell = Callable[[Params, State, Any], tuple[State, Array]]


def gru(params: Params, state: Float[Array, "*batch units"], x: Float[Array, "*batch inputs"]):
    """A gated recurrent unit (arXiv 1406.1078)."""
    from_x = jnp.split(x @ params["x"] + params["b"], 3, axis=-1)
    from_h = jnp.split(state @ params["h"], 3, axis=-1)
    update, reset = jax.nn.sigmoid(from_x[0] + from_h[0]), jax.nn.sigmoid(from_x[1] + from_h[1])
    state = (1 - update) * jnp.tanh(from_x[2] + reset * from_h[2]) + update * state
    return state, state @ params["out"] + params["bias"]


def min_gru(params: Params, state: Float[Array, "*batch units"], x: Float[Array, "*batch inputs"]):
    """A gated recurrent unit whose gate and candidate do not look at the state (arXiv 2410.01201).

    s <- (1 - z) s + z g, where z = sigmoid(x W_z + b_z) and g = x W_g.
    """
    z = jax.nn.sigmoid(x @ params["gate"] + params["gate_bias"])
    state = state + z * (x @ params["candidate"] - state)
    return state, state @ params["out"] + params["bias"]


def rg_lru(params: Params, state: Float[Array, "*batch units"], x: Float[Array, "*batch inputs"]):
    """The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, equations 1 to 4).

    s <- a s + sqrt(1 - a^2) i u, where u = x W_u, i = sigmoid(x W_i + b_i), and
    log a = -8 softplus(decay) sigmoid(x W_r + b_r).
    """
    gate = jax.nn.sigmoid(x @ params["gate"] + params["gate_bias"])
    log_a = -8 * jax.nn.softplus(params["decay"]) * gate
    into = jax.nn.sigmoid(x @ params["into"] + params["into_bias"]) * (x @ params["candidate"])
    state = jnp.exp(log_a) * state + jnp.sqrt(-jnp.expm1(2 * log_a)) * into
    return state, state @ params["out"] + params["bias"]


def lru(params: Params, state: dict[str, Array], x: Float[Array, "*batch inputs"]):
    """The linear recurrent unit (arXiv 2303.06349), its complex state as pairs of reals.

    s <- lambda s + sqrt(1 - |lambda|^2) x B, where log lambda = -exp(decay) + i exp(phase). The
    output is the real part of s C, and x D.
    """
    size = jnp.exp(-jnp.exp(params["decay"]))
    phase = jnp.exp(params["phase"])
    re, im = size * jnp.cos(phase), size * jnp.sin(phase)
    scale = jnp.sqrt(1 - size**2)
    state = {
        "re": re * state["re"] - im * state["im"] + scale * (x @ params["into_re"]),
        "im": re * state["im"] + im * state["re"] + scale * (x @ params["into_im"]),
    }
    output = state["re"] @ params["out"] - state["im"] @ params["out_im"] + x @ params["through"]
    return state, output + params["bias"]


def start(
    cell: Cell, key: Key[Array, ""], inputs: int, units: int, outputs: int, longest: float = 100.0
) -> Params:
    """Draws the first parameters of a cell. Its units forget with half-lives of 1 to `longest`."""
    keys = iter(jax.random.split(key, 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / shape[0] ** 0.5  # noqa: E731
    params = {"out": normal(units, outputs), "bias": jnp.zeros(outputs)}
    if cell is gru:
        gates = {"x": normal(inputs, 3 * units), "h": normal(units, 3 * units)}
        return params | gates | {"b": jnp.zeros(3 * units)}
    spread = jax.random.uniform(next(keys), (units,), maxval=jnp.log(longest))
    rate = jnp.log(2) / jnp.exp(spread)  # a unit keeps exp(-rate) a step
    if cell is lru:
        return params | {
            "decay": jnp.log(rate),
            "phase": jnp.log(jax.random.uniform(next(keys), (units,), minval=0.01, maxval=0.3)),
            "into_re": normal(inputs, units),
            "into_im": normal(inputs, units),
            "out_im": normal(units, outputs),
            "through": normal(inputs, outputs),
        }
    gate = {"gate": 0.1 * normal(inputs, units) * inputs**0.5, "gate_bias": jnp.zeros(units)}
    params = params | gate | {"candidate": normal(inputs, units)}
    if cell is min_gru:
        return params | {"gate_bias": jnp.log(jnp.expm1(rate))}  # 1 - z = exp(-rate)
    return params | {
        "decay": jnp.log(jnp.expm1(rate / 4)),  # at a gate of one half
        "into": 0.1 * normal(inputs, units) * inputs**0.5,
        "into_bias": jnp.zeros(units),
    }


def first_state(cell: Cell, units: int, batch: tuple[int, ...] = ()) -> State:
    """The state before the first step: zeros."""
    zeros = jnp.zeros((*batch, units))
    return {"re": zeros, "im": zeros} if cell is lru else zeros
