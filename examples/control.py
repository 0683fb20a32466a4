"""A hopping robot learns to land on a target, through a simulation that ends at an event.

The leg pushes while it is compressed: a loop whose length depends on the spring. `jax.grad`
refuses it. Forward mode differentiates the loop and the moment at which the leg lets go. It finds
the stiffness and the angle of the leg.
"""

import jax
import jax.numpy as jnp
import optax

import prograde as pg

length = lambda y: jnp.linalg.norm(y[:2])
STEP = 0.005  # units: leg length, mass of the body, gravity


def slope(y, stiffness):
    position, velocity = y[:2], y[2:]
    pull = stiffness * (1 / jnp.linalg.norm(position) - 1)
    return jnp.concatenate([velocity, pull * position - jnp.array([0.0, 1.0])])


def move(y, stiffness, dt):
    middle = y + dt / 2 * slope(y, stiffness)
    return y + dt * slope(middle, stiffness)


def landing(params):
    """The apex of a hop from height 1.2 with speed 1: distance from the foot, and height."""
    angle, stiffness = params["angle"], jnp.exp(params["log_stiffness"])
    foot_to_body = jnp.stack([-jnp.sin(angle), jnp.cos(angle)])
    falls = jnp.sqrt(2 * (1.2 - foot_to_body[1]))
    y = jnp.concatenate([foot_to_body, jnp.stack([jnp.ones_like(angle), -falls])])
    first = (move(y, stiffness, STEP), y)
    y, before = jax.lax.while_loop(
        lambda s: length(s[0]) < 1, lambda s: (move(s[0], stiffness, STEP), s[0]), first
    )
    # the leg lets go within the last step; the moment depends on the parameters, too
    y = move(before, stiffness, STEP * (1 - length(before)) / (length(y) - length(before)))
    return jnp.stack([y[0] + y[2] * y[3], y[1] + y[3] ** 2 / 2])


target = jnp.array([0.9, 1.25])  # the next apex: 0.9 beyond the foot, at a height of 1.25
loss_fn = lambda params: jnp.sum((landing(params) - target) ** 2)
params = {"angle": jnp.array(0.2), "log_stiffness": jnp.log(20.0)}
optimizer = optax.adam(0.01)


def step(carry, _):
    params, state = carry
    loss, grads = pg.value_and_grad(loss_fn, pg.ForwardJacobian())(None, params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), loss


print("before: apex at", landing(params).round(3), "target", target)
(params, _), losses = jax.jit(
    lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=500)
)(params)
print(
    "after: apex at",
    landing(params).round(3),
    f"angle {params['angle']:.3f}, loss {losses[0]:.2g} to {losses[-1]:.2g}",
)
assert losses[-1] < 1e-3 * losses[0]
