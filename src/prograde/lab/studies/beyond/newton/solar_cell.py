"""The current of a solar cell by Newton's method, and five ways to differentiate the iteration."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Volts and amperes of a silicon cell of 57 mm at 33 degrees Celsius: T. Easwarakhanthan, J. Bottin,
# I. Bouhouch, C. Boutrit, "Nonlinear minimization algorithm for determining the solar cell
# parameters with microcomputers", International Journal of Solar Energy 4 (1986). These are the
# usual test data for fits of solar cells.
# fmt: off
VOLTS = np.array([
    -0.2057, -0.1291, -0.0588, 0.0057, 0.0646, 0.1185, 0.1678, 0.2132, 0.2545, 0.2924, 0.3269,
    0.3585, 0.3873, 0.4137, 0.4373, 0.4590, 0.4784, 0.4960, 0.5119, 0.5265, 0.5398, 0.5521,
    0.5633, 0.5736, 0.5833, 0.5900,
])
AMPERES = np.array([
    0.7640, 0.7620, 0.7605, 0.7605, 0.7600, 0.7590, 0.7570, 0.7570, 0.7555, 0.7540, 0.7505,
    0.7465, 0.7385, 0.7280, 0.7065, 0.6755, 0.6320, 0.5730, 0.4990, 0.4130, 0.3165, 0.2120,
    0.1035, -0.0100, -0.1230, -0.2100,
])
# fmt: on
NAMES = (
    "photocurrent (A)",
    "saturation current (A)",
    "ideality",
    "series resistance (ohm)",
    "shunt resistance (ohm)",
)
THERMAL_VOLTAGE = 1.380649e-23 * 306.15 / 1.602176634e-19  # kT/q
TOLERANCE = 1e-10  # amperes

Params = Float[Array, " 5"]  # logarithms of what NAMES lists
Solver = Callable[[Params, Array, int], Array]


def residual(params: Params, volts: Array, amperes: Array) -> Array:
    """Residual of the single-diode model, which is zero at the current I of each voltage V.

    I_L - I_0 (exp(x / (n V_T)) - 1) - x / R_sh - I, with x = V + I R_s.
    """
    light, saturation, ideality, series, shunt = jnp.exp(params)
    x = volts + amperes * series
    return light - saturation * jnp.expm1(x / (ideality * THERMAL_VOLTAGE)) - x / shunt - amperes


def step(params: Params, volts: Array, amperes: Array) -> Array:
    """Takes a step of Newton's method for each current separately."""
    value, slope = jax.jvp(partial(residual, params, volts), (amperes,), (jnp.ones_like(amperes),))
    return -value / slope


def start(params: Params, volts: Array) -> tuple[Array, Array]:
    """Returns the first currents, which are the photocurrent, and an infinite last step.

    The residual is concave and decreasing, so that all currents converge from there.
    """
    return jnp.exp(params[0]) + 0 * volts, jnp.asarray(jnp.inf, volts.dtype)


def advance(params: Params, volts: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns the next currents and the largest step, which ends the loop and has no derivative."""
    change = step(params, volts, state[0])
    return state[0] + change, lax.stop_gradient(jnp.max(jnp.abs(change)))


def solve(
    params: Params,
    volts: Array,
    tolerance: float = TOLERANCE,
    stop: Literal["step", "residual"] = "step",
) -> tuple[Array, Int[Array, ""]]:
    """Returns the currents and the number of iterations, which depends on the parameters.

    A loop that ends when the *step* is small makes one more step after convergence. The derivative
    of that step is that of the implicit-function theorem, up to a term of the size of the step. A
    loop that ends when the *residual* is small does not make that step. The error of its derivative
    is of the order of the missing step, the square root of the remaining error.
    """

    def body(state):
        new, change = advance(params, volts, state[:2])
        if stop == "residual":
            change = lax.stop_gradient(jnp.max(jnp.abs(residual(params, volts, new))))
        return new, change, state[2] + 1

    first = (*start(params, volts), jnp.asarray(0))
    amperes, _, count = lax.while_loop(lambda state: state[1] > tolerance, body, first)
    return amperes, count


def by_while_loop(params: Params, volts: Array, bound: int) -> Array:
    """Runs the plain `while` loop, which only forward mode differentiates."""
    return solve(params, volts)[0]


def by_scan_cond(params: Params, volts: Array, bound: int) -> Array:
    """Runs `bound` iterations. `lax.cond` skips those after convergence."""

    def body(state, _):
        return lax.cond(
            state[1] > TOLERANCE, partial(advance, params, volts), lambda s: s, state
        ), None

    return lax.scan(body, start(params, volts), None, length=bound)[0][0]


def by_scan_where(params: Params, volts: Array, bound: int) -> Array:
    """Runs `bound` iterations, and discards the results of those after convergence."""

    def body(state, _):
        new = advance(params, volts, state)
        return jax.tree.map(lambda a, b: jnp.where(state[1] > TOLERANCE, a, b), new, state), None

    return lax.scan(body, start(params, volts), None, length=bound)[0][0]


def by_checkpoints(params: Params, volts: Array, bound: int) -> Array:
    """Runs Equinox's `while` loop, whose reverse mode has checkpoints for up to `bound` steps."""
    return eqx.internal.while_loop(
        lambda state: state[1] > TOLERANCE,
        partial(advance, params, volts),
        start(params, volts),
        kind="checkpointed",
        max_steps=bound,
    )[0]


def by_implicit_function(params: Params, volts: Array, bound: int) -> Array:
    """Differentiates implicitly by `lax.custom_root`: dI = -(df/dI)^-1 df for any iteration."""
    fixed = lax.stop_gradient(params)
    return lax.custom_root(
        partial(residual, params, volts),
        start(fixed, volts)[0],
        lambda f, first: solve(fixed, volts)[0],
        lambda g, y: y / g(jnp.ones_like(y)),  # the Jacobian is diagonal
    )


def misfit(solver: Solver, params: Params, bound: int) -> Float[Array, ""]:
    """Returns the mean squared error of the currents, in units of (10 mA)^2."""
    return jnp.mean(((solver(params, jnp.asarray(VOLTS), bound) - AMPERES) / 1e-2) ** 2)
