"""Learned feedback: when it learns, and how large its state is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models

import prograde as pg


def test_feedback_learns_on_the_first_step_and_then_every_so_often(key):
    params, losses, args = site_models.relu_mlp(key)
    estimator = pg.LearnedFeedback(every=3)
    state = estimator.init(losses, params, *args)
    step = jax.jit(lambda k, s: estimator.estimate(losses, k, s, params, *args).state)
    changed = []
    for i in range(7):
        new = step(jax.random.fold_in(key, i), state)
        changed.append(not np.array_equal(new.feedback[0], state.feedback[0]))
        state = new
        assert int(state.step) == i + 1
    assert changed == [True, False, False, True, False, False, True]


def test_a_state_much_larger_than_the_parameters_is_named_before_it_is_made():
    """It grows with the square of the length of a sequence: 64 x 8 units and 64 x 8 outputs."""
    params = {"in": jnp.ones((8, 8)), "out": jnp.ones((8, 8))}
    losses = lambda p, x: jnp.sum(jnp.tanh(x @ p["in"]) @ p["out"], axis=(1, 2))
    estimator = pg.LearnedFeedback()
    state = estimator.init(losses, params, jnp.ones((2, 64, 8)))
    assert state.feedback[0].shape == (512, 512)
    with pytest.warns(RuntimeWarning, match=r"state of LearnedFeedback takes 1,024 MiB.*length"):
        jax.eval_shape(lambda: estimator.init(losses, params, jnp.ones((2, 2048, 8))).feedback)
