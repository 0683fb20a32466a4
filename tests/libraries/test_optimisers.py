"""Optimistix, Optax and SciPy through `forward_mode`: they find the minimum of the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from solver_models import CLOSED, MODELS, misfit, residuals

import prograde as pg

optimistix = pytest.importorskip("optimistix")

pytestmark = pytest.mark.filterwarnings("default")
START = np.zeros(2)


def by_bfgs(name, predict):
    fun = misfit(name, predict)
    solver = optimistix.BFGS(rtol=1e-10, atol=1e-10)
    return optimistix.minimise(lambda z, _: fun(z), solver, jnp.asarray(START)).value


def by_levenberg_marquardt(name, predict):
    fun = residuals(name, predict)
    solver = optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
    return optimistix.least_squares(lambda z, _: fun(z), solver, jnp.asarray(START)).value


def by_optax(name, predict):
    fun = misfit(name, predict)
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(fun)

    def step(carry, _):
        z, state = carry
        value, grad = value_and_grad(z, state=state)
        updates, state = solver.update(grad, state, z, value=value, grad=grad, value_fn=fun)
        return (optax.apply_updates(z, updates), state), None

    run = lambda z: jax.lax.scan(step, (z, solver.init(z)), length=25)[0][0]
    return jax.jit(run)(jnp.asarray(START))


def by_scipy(name, predict):
    value_and_grad = jax.jit(jax.value_and_grad(misfit(name, predict)))
    found = scipy.optimize.minimize(
        lambda z: jax.tree.map(np.asarray, value_and_grad(z)),
        START,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-8},
    )
    return found.x


def by_newton(name, predict):
    """Newton's method of SciPy, with the Hessian."""
    fun = misfit(name, predict)
    value_and_grad, hessian = jax.jit(jax.value_and_grad(fun)), jax.jit(jax.hessian(fun))
    found = scipy.optimize.minimize(
        lambda z: jax.tree.map(np.asarray, value_and_grad(z)),
        START,
        jac=True,
        hess=lambda z: np.asarray(hessian(z)),
        method="trust-exact",
    )
    return found.x


METHODS = [by_bfgs, by_levenberg_marquardt, by_optax, by_scipy, by_newton]


@pytest.mark.parametrize("run", METHODS)
@pytest.mark.parametrize("name", ["orbit", pytest.param("growth", marks=pytest.mark.long)])
def test_the_minimum_is_that_of_the_closed_form(name, run):
    got = run(name, pg.forward_mode(MODELS[name]))
    want = (by_levenberg_marquardt if run is by_levenberg_marquardt else by_scipy)(
        name, CLOSED[name]
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("run", [by_bfgs, by_optax, by_scipy])
def test_without_the_wrapper_they_cannot(run):
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        run("orbit", MODELS["orbit"])
