"""Two rates of a predator and its prey in BlackJAX: a window adaptation, and NUTS.

The equation is solved by adaptive steps of diffrax, whose number depends on the rates. With
`ForwardMode` the solver stores no step, and `forward_mode` lets `jax.grad` through it.
"""

import blackjax
import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import prograde as pg

jax.config.update("jax_enable_x64", True)
times = np.linspace(0.0, 12.0, 25)
rates = lambda t, y, p: jnp.stack([y[0] * (p[0] - y[1]), y[1] * (y[0] - p[1])])


@pg.forward_mode
def populations(log_rates):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        diffrax.Tsit5(),
        t0=0.0,
        t1=12.0,
        dt0=None,
        y0=jnp.array([1.0, 0.5]),
        args=jnp.exp(log_rates),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-7),
        adjoint=diffrax.ForwardMode(),
        throw=False,
    )
    return solution.ys


truth = jnp.log(jnp.array([0.9, 1.1]))
noise = 0.1 * jax.random.normal(jax.random.key(0), (len(times), 2))
data = jnp.log(populations(truth)) + noise


def log_density(log_rates):
    misses = (jnp.log(populations(log_rates)) - data) / 0.1
    return -jnp.sum(misses**2) / 2 - jnp.sum(log_rates**2) / 2


key_warmup, key_draws = jax.random.split(jax.random.key(1))
warmup = blackjax.window_adaptation(blackjax.nuts, log_density)
(state, parameters), _ = warmup.run(key_warmup, jnp.zeros(2), num_steps=100)
nuts = blackjax.nuts(log_density, **parameters)


@jax.jit
def draw(state, key):
    state, _ = nuts.step(key, state)
    return state, state.position


_, draws = jax.lax.scan(draw, state, jax.random.split(key_draws, 100))
means, deviations = np.exp(draws).mean(0), np.exp(draws).std(0)
for name, mean, deviation in zip(("growth", "loss"), means, deviations, strict=True):
    print(f"{name}: {mean:.3f} +- {deviation:.3f}")
assert np.all(np.abs(draws.mean(0) - truth) < 5 * draws.std(0))
