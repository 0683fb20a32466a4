"""The orbit of a double star in NumPyro: NUTS and a variational guide through Kepler's equation.

Kepler's equation is solved by Newton's method, in a loop that ends when it has converged. NumPyro
calls `jax.grad`, which refuses such a loop. One wrapper around one function lets it through.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, autoguide

import prograde as pg

jax.config.update("jax_enable_x64", True)


@pg.forward_mode
def anomaly(mean, eccentricity):
    """Solves E - e sin E = M."""

    def newton(carry):
        x, _ = carry
        moved = (x - eccentricity * jnp.sin(x) - mean) / (1 - eccentricity * jnp.cos(x))
        return x - moved, moved

    far = lambda carry: jnp.max(jnp.abs(carry[1])) > 1e-10
    return lax.while_loop(far, newton, (mean, jnp.ones_like(mean)))[0]


def orbit(times, data=None):
    eccentricity = numpyro.sample("eccentricity", dist.Uniform(0.0, 0.8))
    period = numpyro.sample("period", dist.Uniform(2.7, 3.5))
    x = anomaly(2 * jnp.pi * times / period, eccentricity)
    numpyro.sample("position", dist.Normal(jnp.cos(x) - eccentricity, 0.05), obs=data)


times = np.linspace(0.1, 9.0, 30)
x = anomaly(2 * jnp.pi * times / 3.1, 0.4)
data = jnp.cos(x) - 0.4 + 0.05 * jax.random.normal(jax.random.key(0), times.shape)

sampler = MCMC(NUTS(orbit), num_warmup=100, num_samples=200, progress_bar=False)
sampler.run(jax.random.key(1), times, data)
for name, draws in sampler.get_samples().items():
    print(f"NUTS, {name}: {draws.mean():.3f} +- {draws.std():.3f}")

guide = autoguide.AutoNormal(orbit)
svi = SVI(orbit, guide, numpyro.optim.Adam(0.03), Trace_ELBO())
fitted = svi.run(jax.random.key(2), 600, times, data, progress_bar=False).params
for name, value in guide.median(fitted).items():
    print(f"guide, {name}: {value:.3f}")
    draws = sampler.get_samples()[name]
    assert abs(value - draws.mean()) < draws.std()
assert abs(sampler.get_samples()["period"].mean() - 3.1) < 0.05
