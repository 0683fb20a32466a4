"""A controller is tuned through 100,000 steps of a pendulum, with the memory of a single step.

Forward mode gives the exact gradient of the mean cost in six gains. It stores nothing on the way,
so the horizon may be as long as you like. `jax.grad` would keep some hundred numbers of every step.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import prograde as pg

STEPS, DT = 100_000, 0.02


def mean_cost(gains, steps=STEPS):
    """Mean cost of a pendulum that hangs at first, has friction, and is pushed all the time."""

    def step(t, carry):
        angle, rate, total = carry  # angle 0 is upright
        s, c = jnp.sin(angle), jnp.cos(angle)
        features = (s, rate, s * c, rate * c, c, 1.0)
        u = jnp.tanh(sum(gain * feature for gain, feature in zip(gains, features, strict=True)))
        rate += DT * (9.81 * s - 0.2 * rate + 15 * u + jnp.sin(0.014 * t) + 2.0)
        return angle + DT * rate, rate, total + 1 - c + 0.01 * rate**2 + 0.02 * u**2

    return lax.fori_loop(0, steps, step, (3.0, 0.0, 0.0))[2] / steps


def main():
    """Prints the memory, and the cost while it falls."""
    grad_fn = pg.value_and_grad(mean_cost, pg.ForwardJacobian())
    optimizer = optax.adam(0.1)

    @jax.jit
    def update(gains, state):
        cost, grads = grad_fn(None, gains)
        updates, state = optimizer.update(grads, state, gains)
        return optax.apply_updates(gains, updates), state, cost

    gains = jnp.array([-1.5, -0.5, 0.0, 0.0, 0.0, 0.0])  # stands up, but leans
    memory = [
        jax.jit(lambda g, n=n: grad_fn(None, g, n)).lower(gains).compile().memory_analysis()
        for n in (1000, STEPS)
    ]
    short, long = (m.temp_size_in_bytes for m in memory)
    print(f"temporary memory: {short} bytes for 1,000 steps, {long} bytes for {STEPS:,}")
    state, costs = optimizer.init(gains), []
    for i in range(101):
        gains, state, cost = update(gains, state)
        costs.append(float(cost))
        if i % 20 == 0:
            print(f"update {i:3d}: mean cost of {STEPS:,} steps {costs[-1]:.5f}")
    print("gains:", gains.round(2))
    assert long <= 2 * short
    assert costs[-1] < 0.5 * costs[0]


if __name__ == "__main__":
    main()
