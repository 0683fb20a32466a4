from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.studies.beyond.control import report as control_report
from prograde.lab.studies.beyond.control import run as control
from prograde.lab.studies.beyond.control import runner
from prograde.lab.studies.beyond.control.run import gradient_errors
from prograde.lab.studies.beyond.newton import equilibrium, solar_cell
from prograde.lab.studies.beyond.newton import report as newton_report
from prograde.lab.studies.beyond.newton import run as newton
from prograde.lab.studies.beyond.newton.run import (
    OURS,
    REVERSE,
    START,
    fitted,
    refusal,
    smallest_bound,
)
from prograde.lab.studies.beyond.ode import report as ode_report
from prograde.lab.studies.beyond.ode import run as ode
from prograde.lab.studies.beyond.ode.run import Oregonator, programs


@pytest.fixture
def quiet():
    return Display(Console(quiet=True))


def differences(fun, params, h=1e-5):
    """Central differences of a function of a vector, whose error is about h^2 and 1e-16 / h."""
    return jnp.stack(
        [(fun(params + h * e) - fun(params - h * e)) / (2 * h) for e in jnp.eye(params.size)]
    )


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def shown(report, record, tmp_path):
    """Tables whose rows fit their columns, a conclusion, and a figure that can be rendered."""
    for table in report.tables(record):
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows), table.title
    figure = Figure()
    report.draw(record, figure)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    return report.conclusion(record)


def gradient_by_hand(params):
    """dI = -(df/dI)^-1 df, as in the book."""
    volts = jnp.asarray(solar_cell.VOLTS)
    amperes = solar_cell.solve(params, volts)[0]
    slopes = jax.vmap(jax.grad(solar_cell.residual, 2), (None, 0, 0))(params, volts, amperes)
    by_hand = -jax.jacfwd(solar_cell.residual)(params, volts, amperes) / slopes[:, None]
    return (2e4 * (amperes - solar_cell.AMPERES)) @ by_hand / len(volts)


def test_derivative_of_a_converged_loop_is_that_of_the_implicit_function():
    with jax.enable_x64(True):
        loss = partial(solar_cell.misfit, solar_cell.by_while_loop, bound=8)
        ours = lambda p: pg.value_and_grad(loss, pg.ForwardJacobian())(None, p)[1]
        params = jnp.log(jnp.asarray(START))
        grads, exact = jax.jit(lambda p: (ours(p), gradient_by_hand(p)))(params)
        assert relative(grads, exact) < 1e-12


@pytest.mark.long
def test_every_way_round_the_loop_has_the_same_derivative():
    with jax.enable_x64(True):
        params, bound = jnp.log(jnp.asarray(START)), 8
        exact = jax.jit(gradient_by_hand)(params)
        loss = jax.jit(partial(solar_cell.misfit, solar_cell.by_while_loop, bound=bound))
        assert relative(differences(loss, params), exact) < 1e-7
        for name, solver in REVERSE.items():
            reverse = jax.jit(jax.grad(partial(solar_cell.misfit, solver, bound=bound)))(params)
            assert relative(reverse, exact) < 1e-12, name


def test_a_loop_that_stops_before_its_last_step_has_a_worse_derivative():
    with jax.enable_x64(True):
        params = jnp.log(jnp.asarray(START))
        volts = jnp.asarray(solar_cell.VOLTS)
        slope = lambda p, stop: jax.jacfwd(lambda p: solar_cell.solve(p, volts, 1e-2, stop)[0])(p)
        implicit = jax.jacfwd(lambda p: solar_cell.by_implicit_function(p, volts, 0))
        every = jax.jit(lambda p: (slope(p, "step"), slope(p, "residual"), implicit(p)))
        last, before, exact = every(params)
        assert relative(last, exact) < 1e-8 < 1e-6 < relative(before, exact)


def test_bound_serves_the_ranges_and_no_smaller_one_does():
    with jax.enable_x64(True):
        bound, volts = smallest_bound(), jnp.asarray(solar_cell.VOLTS)
        worst = jnp.log(jnp.array([1.0, 1e-6, 1.0, 0.5, 100.0]))
        exact = solar_cell.solve(worst, volts)[0]
        by_scan = jax.jit(partial(solar_cell.by_scan_cond, worst, volts), static_argnums=0)
        error = lambda bound: float(np.abs(by_scan(bound) - exact).max())
        assert error(bound) < 1e-12 < 1e-8 < error(bound - 3)


def test_fit_finds_the_published_optimum_of_the_cell():
    # photocurrent, saturation current, ideality, resistances and rms error that fits by Lambert's W
    # report for these data
    published, rmse = np.array([0.76078797, 3.10684e-7, 1.477268, 0.03654695, 52.88979]), 7.7301e-4
    with jax.enable_x64(True):
        loss = partial(solar_cell.misfit, solar_cell.by_while_loop, bound=0)
        gradient = partial(pg.value_and_grad(loss, pg.ForwardJacobian()), None)
        best, losses = jax.jit(lambda p: fitted(gradient, loss, p, 150))(
            jnp.log(jnp.asarray(START))
        )
        np.testing.assert_allclose(np.exp(best), published, rtol=1e-4)
        np.testing.assert_allclose(1e-2 * np.sqrt(losses[-1]), rmse, rtol=1e-4)


def test_gradient_of_the_equilibrium_network_is_exact(key):
    key_examples, key_weights = jax.random.split(key)
    with jax.enable_x64(True):
        inputs, targets = equilibrium.examples(key_examples, 8)
        weights = equilibrium.initial(key_weights, 4)
        loss = lambda w, implicit=False: jnp.mean(
            (equilibrium.predict(w, inputs, implicit) - targets) ** 2
        )
        ours = lambda w: pg.value_and_grad(loss, pg.ForwardJacobian())(None, w)[1]
        both = jax.jit(lambda w: (ours(w), jax.grad(partial(loss, implicit=True))(w)))
        grads, reverse = (jax.flatten_util.ravel_pytree(g)[0] for g in both(weights))
        # no better than the last step of the loop, whose Jacobian has no derivative here
        assert relative(grads, reverse) < 1e-8
        assert refusal(loss, weights)


@pytest.mark.long
def test_newton_shows_what_it_measured(quiet, tmp_path):
    record = newton.measure(False, quiet, steps=60, rounds=2)
    assert record["refused"].startswith(
        "Reverse-mode differentiation does not work for lax.while_loop"
    )
    assert record["costs"][OURS]["error"] < 1e-6
    assert all(
        run["losses"][-1] < 0.5 * run["losses"][0] for run in record["network"]["runs"].values()
    )
    assert "missed" not in shown(newton_report, slower(record, 1 / 1000), tmp_path)
    assert "missed" in shown(newton_report, slower(record, 1000), tmp_path)


def slower(record, factor):
    costs = {name: dict(cost) for name, cost in record["costs"].items()}
    seconds = costs[OURS]["seconds"]
    costs[OURS]["seconds"] = seconds | {"median": factor * seconds["median"]}
    return record | {"costs": costs}


def hires(t, y, k):
    """HIRES, a reaction of 8 reactants: from the test set of Mazzia and Magherini (Bari)."""
    k1, k2, k3, k4, k5, k6, plus, minus, star, source = k
    binding = plus * y[5] * y[7]
    released = (k2 + minus + star) * y[6]
    return jnp.stack(
        [
            -k1 * y[0] + k2 * y[1] + k6 * y[2] + source,
            k1 * y[0] - (k2 + k3) * y[1],
            -(k6 + k1) * y[2] + k2 * y[3] + k5 * y[4],
            k3 * y[1] + k1 * y[2] - (k2 + k4) * y[3],
            -(k5 + k1) * y[4] + k2 * (y[5] + y[6]),
            -binding + k4 * y[3] + k1 * y[4] - k2 * y[5] + minus * y[6],
            binding - released,
            released - binding,
        ]
    )


@pytest.mark.long
def test_stiff_solver_has_the_published_value_and_the_derivative_of_reverse_mode():
    reference = [
        7.371312573325668e-4,
        1.442485726315185e-4,
        5.888729740967575e-5,
        1.175651343283149e-3,
    ]
    reference += [
        2.386356198831331e-3,
        6.238968252742796e-3,
        2.849998395185769e-3,
        2.850001604814231e-3,
    ]
    rates = np.array([1.71, 0.43, 8.32, 0.69, 0.035, 8.32, 280.0, 0.69, 0.69, 0.0007])
    start = np.array([1.0, 0, 0, 0, 0, 0, 0, 0.0057])

    def end(log_factors, adjoint):
        controller = diffrax.PIDController(rtol=1e-6, atol=1e-10)
        term, solver, args = (
            diffrax.ODETerm(hires),
            diffrax.Kvaerno5(),
            rates * jnp.exp(log_factors),
        )
        many = {
            "stepsize_controller": controller,
            "adjoint": adjoint,
            "max_steps": 8192,
            "throw": False,
        }
        ys = diffrax.diffeqsolve(term, solver, 0.0, 321.8122, 1e-4, start, args, **many).ys
        return jnp.sum((ys[0] / np.array(reference) - 1.5) ** 2), ys[0]

    with jax.enable_x64(True):
        forward = pg.value_and_grad(
            partial(end, adjoint=diffrax.ForwardMode()), pg.ForwardJacobian(), has_aux=True
        )
        (_, ys), grads = jax.jit(forward)(None, jnp.zeros(10))
        np.testing.assert_allclose(ys, reference, rtol=1e-4)
        reverse = jax.jit(
            jax.grad(partial(end, adjoint=diffrax.RecursiveCheckpointAdjoint()), has_aux=True)
        )
        assert relative(grads, reverse(jnp.zeros(10))[0]) < 1e-9


@pytest.mark.long
def test_gradient_of_the_oregonator_is_that_of_differences(key):
    # over the first jump; solved closely, so that the number of steps, which a difference sees
    # change, matters little
    problem = Oregonator(until=20.0, rtol=1e-8)
    with jax.enable_x64(True):
        signal = jax.random.normal(key, (6, 2))
        loss = jax.jit(partial(problem.misfit, diffrax.ForwardMode(), 4096))
        _, grads = jax.jit(programs(problem, 4096)[ode.OURS])(jnp.zeros(4), signal)
        assert relative(differences(lambda p: loss(p, signal), jnp.zeros(4), 1e-3), grads) < 1e-3


@pytest.mark.long
def test_ode_shows_what_it_measured(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(ode, "_ALLOWED", (64,))
    record = ode.measure(
        False, quiet, Oregonator(until=12.0, solver=diffrax.Tsit5()), evaluations=4
    )
    assert record["fit"]["disagreement"] < 1e-8
    assert min(record["fit"]["losses"]) < record["fit"]["losses"][0]
    # of so few steps nobody has to keep much
    assert "missed" in shown(ode_report, record, tmp_path)


def test_stance_ends_where_the_leg_has_its_length_keeps_the_energy_and_has_its_derivative():
    with jax.enable_x64(True):
        y, one = jnp.array([-0.45, np.sqrt(1 - 0.45**2), 1.7, -0.5]), jnp.asarray(1.0)

        @jax.jit
        def stance(stiffness):
            """The end of the stance, its derivative by the stiffness, and the rest."""

            def ended(stiffness):
                end, *rest = runner.stance(y, stiffness)
                return end, rest

            return jax.jvp(ended, (stiffness,), (one,), has_aux=True)

        end, slope, (released, steps) = stance(20 * one)
        assert released
        assert 10 < steps < 200
        np.testing.assert_allclose(end[:2] @ end[:2], 1, rtol=1e-14)
        energy = lambda y: y[2:] @ y[2:] / 2 + y[1]  # the spring is at rest at both ends
        np.testing.assert_allclose(energy(end), energy(y), rtol=1e-7)
        # the time of lift-off moves with the stiffness, and the derivative says so
        h = 1e-5
        by_differences = (stance(20 + h)[0] - stance(20 - h)[0]) / (2 * h)
        assert relative(slope, by_differences) < 1e-7


@pytest.mark.long
def test_gradient_through_the_events_is_that_of_differences():
    found = gradient_errors()
    assert found["fell"] == 0
    assert found["error"] < 1e-7


def test_a_runner_without_room_for_its_leg_has_fallen():
    apex = runner.Apex(jnp.asarray(0.8), jnp.asarray(1.5))
    made = jax.jit(runner.hop)(apex, jnp.asarray(0.3), jnp.asarray(20.0), jnp.asarray(0.0))
    assert made.fell == 1
    assert made.distance == 0


@pytest.mark.long
def test_control_shows_what_it_measured(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(
        control, "SEARCHES", {"differences along 1": control.SEARCHES["differences along 1"]}
    )
    monkeypatch.setitem(
        control.FORWARD,
        "network",
        {"forward gradients along 1": pg.WeightPerturbation(pg.Rademacher())},
    )
    record = control.measure(False, quiet, steps=10, batch_size=4)
    assert record["refused"].startswith(
        "Reverse-mode differentiation does not work for lax.while_loop"
    )
    assert all(
        r["after"] < f["runs"][n]["losses"][0]
        for f in record["found"].values()
        for n, r in f["runs"].items()
    )
    assert "lowest cost" in shown(control_report, record, tmp_path)
