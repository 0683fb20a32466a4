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
_LONGEST_STANCE = 400  # steps; a runner that is still on the ground after these has stopped


class Apex(NamedTuple):
    """The runner at the top of its flight, where its vertical speed is zero."""

    height: Float[Array, ""]
    speed: Float[Array, ""]


class Hop(NamedTuple):
    """The result of a hop. `fell` is true if the runner did not reach another apex."""

    apex: Apex
    distance: Float[Array, ""]
    fell: Float[Array, ""]
    touchdown: Float[Array, " 4"]
    liftoff: Float[Array, " 4"]
    stiffness: Float[Array, ""]
    steps: Array


def _accelerate(y: Float[Array, " 4"], stiffness: Array) -> Float[Array, " 4"]:
    """Time derivative of the body over its foot at the origin.

    The forces are a spring along the leg, whose rest length is 1, and gravity.
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
    """Simulates from touch-down until the leg has its rest length again.

    Returns the state at lift-off, whether there was a lift-off, and the number of steps of the
    loop. The last step ends at the event: Newton's method finds its length, which is a function of
    the state before it. The derivative therefore includes how the time of the event moves, which is
    -(dg/dt)^-1 dg for the length g of the leg.
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

    dt = lax.fori_loop(0, 4, newton, dt)  # converges to rounding from the end of a step of 0.01
    return jnp.where(released, _rk4(before, stiffness, dt), y), released, count


def hop(apex: Apex, angle: Array, stiffness: Array, drop: Array) -> Hop:
    """Simulates one hop from apex to apex.

    The leg is set at `angle` from the vertical. The ground after the hop is lower by `drop`. The
    runner falls if its leg does not fit under the apex, if its stance does not end, or if it leaves
    the ground downwards or backwards.
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
    """Simulates one hop for each drop, until the runner falls.

    Returns the hops, and for each whether the runner had not fallen before it. The controller gets
    apex height, speed and command, each minus its usual value. It returns changes of the angle and
    of the log stiffness.
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
    """Returns the mean over the hops of the squared errors of speed and height.

    A hop that was not made counts 1, which is more than nearly all others. A fall has a value and
    no derivative. A gradient notices a fall that comes nearer only by the errors of the height
    before it.
    """
    hops, upright = run(controller, apex, command, drops)
    errors = (hops.apex.speed - command) ** 2 + 2 * (hops.apex.height - USUAL_HEIGHT) ** 2
    return jnp.mean(jnp.where(upright * (1 - hops.fell) > 0, errors, 1.0))


def path(controller: Controller, apex: Apex, command: Array, drops: Array) -> list[list[float]]:
    """Returns points [x, height] of the body along the hops.

    A hop that ends in a fall is included as far as its touch-down.
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
