"""Two models whose predictions run loops of unknown length, and the same in closed form.

- `orbit`: positions of a planet; Kepler's equation is solved by Newton's method, in a `while_loop`;
- `growth`: a population, by an adaptive solver of diffrax.

Each takes two numbers of any size. A library that works on a model gives what it gives on the
closed form.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TIMES = np.linspace(0.1, 4.0, 8)
TRUTH = np.array([0.3, -0.2])
SIZES = {"orbit": 0.02, "growth": 0.05}  # of the noise


def anomaly(mean, eccentricity):
    """Solves E - e sin E = M by steps of Newton's method, until they are small."""

    def step(carry):
        x, _, count = carry
        moved = (x - eccentricity * jnp.sin(x) - mean) / (1 - eccentricity * jnp.cos(x))
        return x - moved, moved, count + 1

    def goes_on(carry):
        x, moved, count = carry
        return jnp.any(jnp.abs(moved) > 1e-12 * (1 + jnp.abs(x))) & (count < 50)

    return lax.while_loop(goes_on, step, (mean, jnp.ones_like(mean), 0))[0]


def anomaly_implicit(mean, eccentricity):
    """The same, with the derivative of the implicit function: one more step of Newton's method."""
    x = anomaly(*map(lax.stop_gradient, (mean, eccentricity)))
    slope = 1 - lax.stop_gradient(eccentricity) * jnp.cos(x)
    return x - (x - eccentricity * jnp.sin(x) - mean) / slope


def orbit(z, solve=anomaly):
    eccentricity, period = jax.nn.sigmoid(z[0] - 1), 3 + jnp.tanh(z[1])
    x = solve(2 * jnp.pi * TIMES / period, eccentricity)
    return jnp.cos(x) - eccentricity


def growth(z):
    rate, limit = 1.5 + jnp.tanh(z[0]), 2 + jnp.tanh(z[1])
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, _: rate * y * (1 - y / limit)),
        diffrax.Tsit5(),
        t0=0.0,
        t1=4.0,
        dt0=None,
        y0=jnp.asarray(0.1),
        saveat=diffrax.SaveAt(ts=TIMES),
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
        adjoint=diffrax.ForwardMode(),
    )
    return solution.ys


def logistic(z):
    rate, limit = 1.5 + jnp.tanh(z[0]), 2 + jnp.tanh(z[1])
    return limit / (1 + (limit / 0.1 - 1) * jnp.exp(-rate * TIMES))


MODELS = {"orbit": orbit, "growth": growth}
CLOSED = {"orbit": lambda z: orbit(z, anomaly_implicit), "growth": logistic}


def measured(name):
    noise = np.random.default_rng(0).normal(size=TIMES.size)
    with jax.ensure_compile_time_eval():
        return np.asarray(CLOSED[name](TRUTH)) + SIZES[name] * noise


def residuals(name, predict):
    """A function of two numbers: differences from the data, in units of the noise."""
    data = measured(name)
    return lambda z: (predict(z) - data) / SIZES[name]


def misfit(name, predict):
    """Half the square of the residuals, and of the numbers themselves."""
    of = residuals(name, predict)
    return lambda z: (jnp.sum(of(z) ** 2) + jnp.sum(z**2)) / 2
