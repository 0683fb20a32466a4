"""Recurrences of many steps, and ways to run and to differentiate their loop."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax

import prograde as pg

_STEP = 0.02  # seconds
_HELD = [-8.0, -2.0, -0.5, 0.1, 0.0, 0.0, 0.0, 0.0]  # gains that keep the pendulum upright


@dataclass(frozen=True)
class Pendulum:
    """A driven pendulum with friction. A controller of eight gains swings it up and keeps it there.

    The state is (angle, rate, z), where z is a leaky integral that belongs to the controller. The
    torque is 15 tanh(gains . features). A slow push of two sines keeps the pendulum in motion. The
    classical Runge-Kutta method of fourth order integrates state and cost together.
    """

    count: int = 1  # pendulums that start at different angles and share one controller

    def params(self) -> jax.Array:
        return jnp.asarray(_HELD, jnp.result_type(float))

    def start(self) -> tuple:
        angle = jnp.asarray(3.0) if self.count == 1 else jnp.linspace(2.5, 3.5, self.count)
        return jnp.int32(0), (angle, 0 * angle, 0 * angle, 0 * angle)

    def step(self, gains: jax.Array, carry: tuple) -> tuple:
        t, state = carry
        time = _STEP * t
        push = 0.3 * jnp.sin(0.7 * time) + 0.2 * jnp.sin(2.9 * time)

        def motion(angle, rate, z, _):
            s, c = jnp.sin(angle), jnp.cos(angle)
            features = (s, rate, z, s * c, rate * jnp.abs(rate), c, s * rate * rate, 1.0)
            u = jnp.tanh(sum(gains[i] * feature for i, feature in enumerate(features)))
            cost = 1 - c + 0.1 * rate * rate + 0.1 * u * u
            return rate, 9.81 * s - 0.2 * rate + 15 * u + push, s - 0.5 * z, cost

        ahead = lambda slope, by: tuple(x + by * k for x, k in zip(state, slope, strict=True))  # noqa: E731
        k1 = motion(*state)
        k2 = motion(*ahead(k1, _STEP / 2))
        k3 = motion(*ahead(k2, _STEP / 2))
        k4 = motion(*ahead(k3, _STEP))
        slope = tuple(
            (a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)
        )
        return t + 1, ahead(slope, _STEP)

    def loss(self, carry: tuple, steps: int) -> jax.Array:
        return jnp.mean(carry[1][3]) / (_STEP * steps)


@dataclass(frozen=True)
class Recurrent:
    """A GRU that learns to output the product of its two inputs of ten steps before."""

    units: int = 32

    def params(self) -> dict[str, jax.Array]:
        inputs, states = jax.random.split(jax.random.key(0))
        width = 3 * self.units
        return {
            "inputs": jax.random.normal(inputs, (2, width)),
            "states": jax.random.normal(states, (self.units, width)) / math.sqrt(self.units),
            "bias": jnp.zeros(width),
            "readout": jnp.full((self.units, 1), 1 / self.units),
        }

    def start(self) -> tuple:
        return jnp.int32(0), (jnp.zeros((1, self.units)), jnp.zeros(()))

    def step(self, params: dict[str, jax.Array], carry: tuple) -> tuple:
        t, (h, total) = carry
        x = jnp.stack([jnp.sin(0.1 * t), jnp.sin(0.037 * t)])[None]
        of_x, of_h = x @ params["inputs"] + params["bias"], h @ params["states"]
        reset, update = jnp.split(jax.nn.sigmoid((of_x + of_h)[:, : 2 * self.units]), 2, axis=1)
        candidate = jnp.tanh(of_x[:, 2 * self.units :] + reset * of_h[:, 2 * self.units :])
        h = update * h + (1 - update) * candidate
        wanted = jnp.sin(0.1 * (t - 10)) * jnp.sin(0.037 * (t - 10))
        return t + 1, (h, total + jnp.sum((h @ params["readout"] - wanted) ** 2))

    def loss(self, carry: tuple, steps: int) -> jax.Array:
        return carry[1][1] / steps


Body = Callable[[tuple], tuple]


def straight(body: Body, carry: tuple, steps: int, unroll: int) -> tuple:
    """Runs the loop without checkpoints."""
    return lax.scan(
        lambda carry, _: (body(carry), None), carry, None, steps, unroll=min(unroll, steps)
    )[0]


def nested(levels: int) -> Callable[[Body, tuple, int, int], tuple]:
    """Makes a loop of T^(1/levels) segments, of which reverse mode keeps only the starts.

    The next level cuts each segment again. Memory grows as T^(1/levels), and each level runs the
    steps once more (Chen et al., arXiv 1604.06174). All segments have the same length, the divisor
    of T that is nearest to the root.
    """

    def run(body: Body, carry: tuple, steps: int, unroll: int, level: int = levels) -> tuple:
        if level == 1:
            return straight(body, carry, steps, unroll)
        root = steps ** (1 - 1 / level)
        size = min(
            (d for d in range(1, steps + 1) if steps % d == 0),
            key=lambda d: abs(math.log(d / root)),
        )
        segment = jax.checkpoint(
            lambda carry: run(body, carry, size, unroll, level - 1), prevent_cse=False
        )
        return straight(segment, carry, steps // size, 1)

    return run


def equinox_loop(body: Body, carry: tuple, steps: int, unroll: int) -> tuple:
    """Runs Equinox's loop, which places √T checkpoints for T iterations while it runs."""

    def several(carry, _):
        for _ in range(unroll):
            carry = body(carry)
        return carry, None

    whole, rest = divmod(steps, unroll)
    carry = eqxi.scan(several, carry, None, whole, kind="checkpointed")[0]
    return straight(body, carry, rest, 1) if rest else carry


# method -> (loop, reverse mode or None for ours, what it is called, style in figures)
METHODS: dict[str, tuple[Any, pg.Estimator | None, str, dict[str, Any]]] = {
    "bare": (
        straight,
        None,
        "bare forward run",
        {"color": "#000000", "linestyle": ":", "marker": "v"},
    ),
    "ours": (
        straight,
        None,
        "forward gradient",
        {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    ),
    "backprop": (
        straight,
        pg.Backprop(),
        "backprop",
        {"color": "#0072B2", "linestyle": "--", "marker": "^"},
    ),
    "each step": (
        straight,
        pg.CheckpointedBackprop(),
        "backprop, each step checkpointed",
        {"color": "#56B4E9", "linestyle": "--", "marker": "<"},
    ),
    "square root": (
        nested(2),
        pg.Backprop(),
        "backprop, √T segments",
        {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
    ),
    "cube root": (
        nested(3),
        pg.Backprop(),
        "backprop, two levels of ∛T",
        {"color": "#009E73", "linestyle": "-.", "marker": "s"},
    ),
    "equinox": (
        equinox_loop,
        pg.Backprop(),
        "backprop, Equinox's loop",
        {"color": "#E69F00", "marker": "x"},
    ),
}
CHECKPOINTED = ("each step", "square root", "cube root", "equinox")


def gradient(problem: Any, method: str, steps: int, unroll: int = 1) -> Callable[[Any, Any], Any]:
    """Makes the program of a method: (key, params) -> (loss, gradient), or the loss for "bare"."""
    loop, reverse, *_ = METHODS[method]

    def loss(params: Any) -> jax.Array:
        return problem.loss(
            loop(lambda carry: problem.step(params, carry), problem.start(), steps, unroll), steps
        )

    if method == "bare":
        return lambda key, params: loss(params)
    few = isinstance(problem, Pendulum)
    estimator = reverse or (
        pg.ForwardJacobian() if few else pg.WeightPerturbation(pg.LowRank(rank=1))
    )
    return pg.value_and_grad(loss, estimator)
