"""A solar cell in SciPy's minimize, with gradient and Hessian through Newton's method.

The current of the cell stands on both sides of its law. A loop solves it to full precision.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.optimize import minimize

import prograde as pg

jax.config.update("jax_enable_x64", True)
volts = np.linspace(-0.2, 0.58, 26)


@pg.forward_mode
def amperes(params):
    """Solves I = photo - dark (exp((V + I R) / 0.039) - 1), with R in ohms."""
    photo, dark, resistance = jnp.exp(params)

    def newton(carry):
        current, _ = carry
        power = dark * jnp.exp((volts + current * resistance) / 0.039)
        moved = (photo + dark - power - current) / (1 + power * resistance / 0.039)
        return current + moved, moved

    far = lambda carry: jnp.max(jnp.abs(carry[1])) > 1e-12
    start = jnp.zeros(volts.shape)
    return lax.while_loop(far, newton, (start, start + 1.0))[0]


truth = np.log([0.76, 3e-7, 0.036])
data = amperes(truth) + 1e-3 * jax.random.normal(jax.random.key(0), volts.shape)
misfit = lambda params: jnp.sum(((amperes(params) - data) / 1e-3) ** 2) / 2
value_and_grad, hessian = jax.jit(jax.value_and_grad(misfit)), jax.jit(jax.hessian(misfit))

found = minimize(
    lambda p: jax.tree.map(np.asarray, value_and_grad(p)),
    truth + np.array([0.05, -0.3, 0.2]),
    jac=True,
    hess=lambda p: np.asarray(hessian(p)),
    method="trust-exact",
)
errors = np.sqrt(np.diag(np.linalg.inv(hessian(found.x))))
print(f"{found.nit} steps of Newton's method, misfit {found.fun:.1f}")
for name, value, error in zip(("photo", "dark", "resistance"), found.x, errors, strict=True):
    print(f"{name}: {np.exp(value):.3g}, off by about {100 * error:.2f} %")
assert found.success
assert np.all(np.abs(found.x - truth) < 5 * errors)
