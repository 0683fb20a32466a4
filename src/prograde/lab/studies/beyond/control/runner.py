"""A runner on a springy leg: ballistic flight, stance on a spring, and the events between them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Units are those of the body: leg length, body mass, gravity. A speed of 1 is sqrt(g l), 3.1 m/s
# for a leg of 1 m.
_TIME_STEP = 0.01
USUAL_HEIGHT = 1.08
_LONGEST_STANCE = 400  # steps; a spring that has not let go by then holds a runner that has stopped


class Apex(NamedTuple):
    """The runner at the top of its flight, where it does not move up or down."""

    height: Float[Array, ""]
    speed: Float[Array, ""]


class Hop(NamedTuple):
    """What a hop came to. `fell` says whether it did not come to another apex."""

    apex: Apex
    distance: Float[Array, ""]
    fell: Float[Array, ""]
    touchdown: Float[Array, " 4"]
    liftoff: Float[Array, " 4"]
    stiffness: Float[Array, ""]
    steps: Array


def _accelerate(y: Float[Array, " 4"], stiffness: Array) -> Float[Array, " 4"]:
    """The body over its foot at the origin: a spring along the leg of rest length 1, and
    gravity.
    """
    position, velocity = y[:2], y[2:]
    length = jnp.sqrt(position @ position)
    pull = stiffness * (1 / length - 1)
    return jnp.concatenate([velocity, pull * position + jnp.array([0.0, -1.0], y.dtype)])


def _rk4(y: Array, stiffness: Array, dt: Array | float) -> Array:
    k1 = _accelerate(y, stiffness)
    k2 = _accelerate(y + dt / 2 * k1, stiffness)
    k3 = _accelerate(y + dt / 2 * k2, stiffness)
    k4 = _accelerate(y + dt * k3, stiffness)
    return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def stance(y: Float[Array, " 4"], stiffness: Array) -> tuple[Float[Array, " 4"], Array, Array]:
    """From touch-down until the leg has its rest length again: state at lift-off, whether it came
    to that, steps of the loop.

    The last step is cut at the event: its length is found by Newton's method, and is a function of
    the state before it. So the derivative holds how the event itself moves, by -(dg/dt)^-1 dg for
    the length g of the leg.
    """

    def going(state):
        y, _, count = state
        return (y[:2] @ y[:2] < 1) & (y[1] > 0) & (count < _LONGEST_STANCE) | (count == 0)

    def body(state):
        y, _, count = state
        return _rk4(y, stiffness, _TIME_STEP), y, count + 1

    y, before, count = lax.while_loop(going, body, (y, y, jnp.asarray(0)))
    released = y[:2] @ y[:2] >= 1
    dt = jnp.asarray(_TIME_STEP, y.dtype)

    def newton(_, dt):
        end, rate = jax.jvp(lambda dt: _rk4(before, stiffness, dt), (dt,), (jnp.ones_like(dt),))
        return dt - (end[:2] @ end[:2] - 1) / (2 * end[:2] @ rate[:2])

    dt = lax.fori_loop(0, 4, newton, dt)  # from the end of a step of 0.01 it converges to rounding
    return jnp.where(released, _rk4(before, stiffness, dt), y), released, count


def hop(apex: Apex, angle: Array, stiffness: Array, drop: Array) -> Hop:
    """From apex to apex, with the leg set at `angle` from the vertical, over ground that is `drop`
    lower after it.

    A runner whose leg does not fit under the apex, whose stance does not end, or who leaves it
    downwards or backwards, has fallen.
    """
    foot = jnp.stack([-jnp.sin(angle), jnp.cos(angle)])
    fall = apex.height - foot[1]
    fits = fall > 0
    down = jnp.sqrt(2 * jnp.where(fits, fall, 1.0))
    touchdown = jnp.concatenate([foot, jnp.stack([apex.speed, -down])])
    liftoff, released, steps = stance(touchdown, stiffness)
    upwards = liftoff[3] > 0
    rise = jnp.where(upwards, liftoff[3], 0.0)
    stands = fits & released & upwards & (liftoff[2] > 0)
    distance = apex.speed * down + liftoff[0] - foot[0] + liftoff[2] * rise
    after = Apex(liftoff[1] + rise**2 / 2 + drop, liftoff[2])
    after = jax.tree.map(lambda a, b: jnp.where(stands, a, b), after, apex)
    return Hop(
        after, jnp.where(stands, distance, 0.0), 1.0 - stands, touchdown, liftoff, stiffness, steps
    )


Controller = Callable[[Array], Array]


def run(
    controller: Controller, apex: Apex, command: Array, drops: Float[Array, " hops"]
) -> tuple[Hop, Array]:
    """As many hops as there are drops, until the runner falls: the hops, and for each whether it
    began on its feet.

    The controller sees apex height, speed and the command, each less what is usual, and gives
    changes of angle and log stiffness.
    """

    def one(carry, drop):
        apex, upright = carry
        sees = jnp.stack([apex.height - USUAL_HEIGHT, apex.speed - command, command - 1.75])
        turn, tighten = controller(sees)
        angle = 0.225 + 0.15 * command + 0.2 * jnp.tanh(turn)
        hopped = hop(apex, angle, 20.0 * jnp.exp(0.5 * jnp.tanh(tighten)), drop)
        return (hopped.apex, upright * (1 - hopped.fell)), (hopped, upright)

    _, (hops, upright) = lax.scan(one, (apex, jnp.ones_like(command)), drops)
    return hops, upright


def cost(controller: Controller, apex: Apex, command: Array, drops: Float[Array, " hops"]) -> Array:
    """Mean over the hops of the squared errors of speed and height; a hop that was not made counts
    1, more than nearly all others.

    A fall has a value and no derivative. The errors of the height before it are what tells a
    gradient that it comes nearer.
    """
    hops, upright = run(controller, apex, command, drops)
    errors = (hops.apex.speed - command) ** 2 + 2 * (hops.apex.height - USUAL_HEIGHT) ** 2
    return jnp.mean(jnp.where(upright * (1 - hops.fell) > 0, errors, 1.0))


def path(controller: Controller, apex: Apex, command: Array, drops: Array) -> list[list[float]]:
    """[x, height] of the body through the hops that were made, and of the one that was not as far
    as its touch-down.
    """
    hops, upright = jax.jit(lambda *start: run(controller, *start))(apex, command, drops)
    step = jax.jit(_rk4)
    points, x, ground, before = [], 0.0, 0.0, apex
    for i in range(len(drops)):
        if not upright[i]:
            break
        made = jax.tree.map(lambda v, i=i: v[i], hops)
        fall = before.height - made.touchdown[1]
        lasts = jnp.sqrt(2 * jnp.maximum(fall, 0))
        t = jnp.linspace(0, lasts, 12)
        points += [
            [float(x + before.speed * s), float(ground + before.height - s * s / 2)] for s in t
        ]
        if made.fell:
            break
        foot = x + before.speed * lasts - made.touchdown[0]
        stiffness, y = hops.stiffness[i], made.touchdown
        for n in range(int(made.steps) - 1):
            y = step(y, stiffness, _TIME_STEP)
            if n % 6 == 0:
                points.append([float(foot + y[0]), float(ground + y[1])])
        t = jnp.linspace(0, made.liftoff[3], 12)
        points += [
            [
                float(foot + made.liftoff[0] + made.liftoff[2] * s),
                float(ground + made.liftoff[1] + made.liftoff[3] * s - s * s / 2),
            ]
            for s in t
        ]
        x, ground, before = (
            foot + made.liftoff[0] + made.liftoff[2] * made.liftoff[3],
            ground - float(drops[i]),
            made.apex,
        )
    return points
