"""Contact in MJX through `forward_mode`: the solver of the contact forces is a `while_loop`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg

pytest.importorskip("mujoco", reason="mujoco-mjx is not installed")
pytest.importorskip("mujoco.mjx", reason="mujoco-mjx is not installed")

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]


def test_gradient_of_the_height_by_the_velocity_is_that_of_central_differences():
    """Over 20 steps, of which the last ones are in contact."""
    from prograde.lab.studies.beyond.posterior.contact import sphere_on_a_plane

    height = sphere_on_a_plane()
    velocity, h = jnp.array([0.1, 0.0, -1.0]), 1e-5
    assert velocity.dtype == jax.eval_shape(height, velocity).dtype == jnp.float64
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(height)).trace(velocity)
    value, grad = jax.jit(jax.value_and_grad(pg.forward_mode(height)))(velocity)
    heights = jax.jit(height)
    by_differences = np.stack(
        [(heights(velocity + h * e) - heights(velocity - h * e)) / (2 * h) for e in np.eye(3)]
    )
    np.testing.assert_allclose(value, heights(velocity), rtol=1e-12)
    assert value < 0.1  # the sphere is pressed into the plane
    assert abs(grad[2]) > 1e-3
    np.testing.assert_allclose(grad, by_differences, atol=1e-6)
