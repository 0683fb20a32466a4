"""Four parameters of a stiff reaction, fitted through an adaptive implicit solver (diffrax).

The Oregonator is a clock reaction: its concentrations jump over five decades. The solver takes
thousands of steps, and their number depends on the parameters. Forward mode carries the four
derivatives along and stores no step.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

import prograde as pg

jax.config.update("jax_enable_x64", True)
truth = jnp.array([77.27, 8.375e-6, 0.161, 1.0])  # s, q, w, f
times = jnp.linspace(0.0, 60.0, 61)


def rates(t, y, params):
    s, q, w, f = params
    a, b, c = y
    return jnp.stack([s * (b - a * b + a - q * a * a), (f * c - b - a * b) / s, w * (a - c)])


def catalyst(log_params):
    """The measured quantity: decades of the oxidised catalyst, as an electrode shows them."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        diffrax.Kvaerno3(),
        t0=0.0,
        t1=60.0,
        dt0=1e-3,
        y0=jnp.array([1.0, 2.0, 3.0]),
        args=truth * jnp.exp(log_params),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-8),
        adjoint=diffrax.ForwardMode(),
        max_steps=10_000,
    )
    return jnp.log10(solution.ys[:, 2])


measured = catalyst(jnp.zeros(4)) + 0.02 * jax.random.normal(jax.random.key(0), times.shape)
misfit = lambda log_params: jnp.mean(((catalyst(log_params) - measured) / 0.02) ** 2)
grad_fn = jax.jit(
    lambda log_params: pg.value_and_grad(misfit, pg.ForwardJacobian())(None, log_params)
)

start = np.array([0.2, -0.2, 0.15, 0.1])
fit = minimize(
    lambda p: jax.tree.map(np.asarray, grad_fn(p)),
    start,
    jac=True,
    method="BFGS",
    options={"gtol": 1e-2},
)
print(f"misfit in squares of the noise: {float(misfit(start)):.1f} at the start")
print(f"after {fit.nfev} gradients: {fit.fun:.3f}")
for name, begun, found in zip("sqwf", np.expm1(start), np.expm1(fit.x), strict=True):
    print(f"{name}: {100 * begun:+.1f} % off the truth at the start, {100 * found:+.1f} % after")
assert fit.fun < 1.3
