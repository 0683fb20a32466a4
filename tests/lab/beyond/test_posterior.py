import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from prograde.lab.display import Display
from prograde.lab.studies.beyond.posterior import report, run
from prograde.lab.studies.beyond.posterior.equations import (
    BACKSOLVE,
    DIRECT,
    OURS,
    hares_and_lynxes,
    kinetics,
)

pytestmark = [pytest.mark.optimised, pytest.mark.long]


def test_gradient_of_the_posterior_is_that_of_reverse_mode_and_of_differences():
    with jax.enable_x64(True):
        equation = hares_and_lynxes()
        density = lambda z, name: equation.log_density(methods[name], z)
        methods, z, h = equation.methods(), jnp.asarray(equation.start), 1e-4
        grads = {
            name: jax.jit(jax.grad(density), static_argnums=1)(z, name)
            for name in methods.keys() - {DIRECT}
        }
        value = jax.jit(lambda z: density(z, OURS))
        differences = [(value(z + h * e) - value(z - h * e)) / (2 * h) for e in np.eye(8)]
        np.testing.assert_allclose(grads[OURS], differences, rtol=1e-3, atol=1e-3)
        for name, grad in grads.items():
            exact = name not in (BACKSOLVE, "odeint of JAX")
            tolerance = 1e-8 if exact else 1e-3
            np.testing.assert_allclose(grad, grads[OURS], rtol=tolerance, atol=tolerance)


def test_log_posterior_of_the_kinetics_is_highest_near_the_truth():
    """The data are made by another solver, at a smaller tolerance."""
    with jax.enable_x64(True):
        equation = kinetics(1e-6)
        density = jax.jit(lambda z: equation.log_density(equation.forward_alone, z))
        at_truth = density(jnp.zeros(5))
        for i in range(5):
            for side in (-1, 1):
                assert density(side * 0.3 * jnp.eye(5)[i]) < at_truth


def test_posterior_shows_what_it_measured(tmp_path):
    with jax.enable_x64(True):
        short = dataclasses.replace(hares_and_lynxes(), max_steps=256, warmup=40, draws=24)
    quiet = Display(Console(quiet=True))
    record = run.measure(False, quiet, (short,), contact=False)
    (equation,) = record["equations"].values()
    assert equation["refused"] == {}
    assert equation["costs"]["RecursiveCheckpointAdjoint"]["error"] < 1e-8
    assert set(equation["chains"]) == set(run.sampled_methods(equation["costs"]))
    assert all(len(runs) == 2 for runs in equation["chains"].values())
    for table in report.tables(record):
        assert all(len(row) == len(table.columns) for row in table.rows), table.title
    figure = Figure()
    report.draw(record, figure)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert "effective samples a second" in report.conclusion(record)
    for run_of_ours in equation["chains"][OURS]:
        run_of_ours["seconds"] /= 1000
    assert "met" in report.conclusion(record)
    for run_of_ours in equation["chains"][OURS]:
        run_of_ours["seconds"] *= 1e6
    assert "missed" in report.conclusion(record)
