"""NumPyro through `forward_mode`: what it finds is what it finds on the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_models import CLOSED, MODELS, SIZES, TRUTH, measured

import prograde as pg

numpyro = pytest.importorskip("numpyro")
dist, infer = numpyro.distributions, numpyro.infer

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]


def model(predict, size, data):
    z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(predict(z), size), obs=data)


def by_nuts(name, predict):
    start = numpyro.infer.init_to_value(values={"z": jnp.asarray(TRUTH)})
    sampler = infer.MCMC(
        infer.NUTS(model, init_strategy=start),
        num_warmup=10,
        num_samples=5,
        progress_bar=False,
    )
    sampler.run(jax.random.key(0), predict, SIZES[name], measured(name))
    return sampler.get_samples()["z"]


def by_guide(name, predict):
    guide = infer.autoguide.AutoNormal(model)
    svi = infer.SVI(model, guide, numpyro.optim.Adam(0.02), infer.Trace_ELBO())
    args = predict, SIZES[name], measured(name)
    found = svi.run(jax.random.key(0), 50, *args, progress_bar=False)
    return found.params


@pytest.mark.parametrize("run", [by_nuts, by_guide])
@pytest.mark.parametrize("name", MODELS)
def test_same_key_gives_what_the_closed_form_gives(name, run):
    got, want = run(name, pg.forward_mode(MODELS[name])), run(name, CLOSED[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_without_the_wrapper_numpyro_cannot():
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        by_nuts("orbit", MODELS["orbit"])
