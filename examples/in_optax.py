"""The angle of a throw with drag, by L-BFGS of Optax.

The ball flies until it meets the ground. The number of steps depends on the throw, and the line
search of L-BFGS calls `jax.grad` inside.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import prograde as pg

TARGET, STEP = 6.0, 0.01


@pg.forward_mode
def landing(throw):
    """The distance at which a ball lands, thrown at an angle with a speed."""
    angle, speed = throw
    velocity = speed * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    flies = lambda state: (state[0][1] > 0) | (state[1][1] > 0)

    def step(state):
        place, velocity = state
        push = jnp.array([0.0, -9.81]) - 0.1 * jnp.linalg.norm(velocity) * velocity
        return place + STEP * velocity, velocity + STEP * push

    place, velocity = lax.while_loop(flies, step, (jnp.zeros(2), velocity))
    return place[0] - place[1] / velocity[1] * velocity[0]  # back to the ground


def cost(throw):
    return (landing(throw) - TARGET) ** 2 + 0.01 * throw[1] ** 2  # near the target, with little


solver = optax.lbfgs()
value_and_grad = optax.value_and_grad_from_state(cost)


def step(carry, _):
    throw, state = carry
    value, grad = value_and_grad(throw, state=state)
    updates, state = solver.update(grad, state, throw, value=value, grad=grad, value_fn=cost)
    return (optax.apply_updates(throw, updates), state), value


start = jnp.array([1.2, 9.0])
(throw, _), costs = jax.jit(lambda t: lax.scan(step, (t, solver.init(t)), length=20))(start)
print(f"lands at {landing(start):.2f} at first, at {landing(throw):.2f} after 20 steps")
print(f"angle {jnp.degrees(throw[0]):.1f} degrees, speed {throw[1]:.2f}")
assert abs(landing(throw) - TARGET) < 0.3
assert cost(throw) < 0.2 * cost(start)
