"""The law of a cooling reactor in Optimistix: Levenberg-Marquardt and BFGS through a solver.

Levenberg-Marquardt asks for products with the Jacobian and its transpose, BFGS for a gradient by
reverse mode. `forward_mode` gives both. The derivative of the fit itself, here by the data, is
that of the implicit function at the minimum: Optimistix computes it, and asks for second
derivatives of the solver.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix

import prograde as pg

jax.config.update("jax_enable_x64", True)
times = np.linspace(0.5, 10.0, 20)


@pg.forward_mode
def temperature(log_params):
    rate, order = jnp.exp(log_params)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, _: -rate * y**order),
        diffrax.Tsit5(),
        t0=0.0,
        t1=10.0,
        dt0=None,
        y0=jnp.asarray(1.0),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
        adjoint=diffrax.ForwardMode(),
    )
    return solution.ys


truth = jnp.log(jnp.array([0.6, 1.4]))
noise = 0.01 * jax.random.normal(jax.random.key(0), times.shape)
data = temperature(truth) + noise
residuals = lambda log_params, data: (temperature(log_params) - data) / 0.01


def fit(data):
    solver = optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    return optimistix.least_squares(residuals, solver, jnp.zeros(2), data).value


fit_and_slope = jax.jit(lambda data: (fit(data), jax.jacobian(fit)(data)))
found, by_data = fit_and_slope(data)
for name, value, slope in zip(("rate", "order"), jnp.exp(found), by_data, strict=True):
    print(f"{name}: {value:.3f}, which the sample at time {times[3]} moves by {slope[3]:+.2f}")
assert jnp.max(jnp.abs(found - truth)) < 0.1
h = 1e-4 * (np.arange(20) == 3)
by_differences = (fit_and_slope(data + h)[0] - fit_and_slope(data - h)[0]) / 2e-4
np.testing.assert_allclose(by_differences, by_data[:, 3], rtol=1e-3)

misfit = lambda log_params, data: jnp.sum(residuals(log_params, data) ** 2) / 2
bfgs = optimistix.BFGS(rtol=1e-8, atol=1e-8)
by_bfgs = jax.jit(lambda z: optimistix.minimise(misfit, bfgs, z, data).value)(jnp.zeros(2))
assert jnp.allclose(found, by_bfgs, atol=1e-5)
