"""BlackJAX through `forward_mode`: what it finds is what it finds on the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_models import CLOSED, MODELS, TRUTH, misfit

import prograde as pg

blackjax = pytest.importorskip("blackjax")

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]


def samples(name, predict):
    """A window adaptation, and NUTS with what it found."""
    fun = misfit(name, predict)
    density = lambda z: -fun(z)
    key_warm, key_run = jax.random.split(jax.random.key(0))
    warmup = blackjax.window_adaptation(blackjax.nuts, density)
    (state, parameters), _ = warmup.run(key_warm, jnp.asarray(TRUTH), num_steps=20)
    step = blackjax.nuts(density, **parameters).step

    def next_sample(state, key):
        state, _ = step(key, state)
        return state, state.position

    _, found = jax.lax.scan(next_sample, state, jax.random.split(key_run, 5))
    return parameters["step_size"], found


@pytest.mark.parametrize("name", MODELS)
def test_same_key_gives_what_the_closed_form_gives(name):
    got, want = samples(name, pg.forward_mode(MODELS[name])), samples(name, CLOSED[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_without_the_wrapper_blackjax_cannot():
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        samples("orbit", MODELS["orbit"])
