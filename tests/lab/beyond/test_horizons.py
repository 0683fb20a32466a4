"""Long horizons and hypergradients: the gradients of reverse mode, at a memory that stays."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.studies.beyond.horizon import loops as horizon_loops
from prograde.lab.studies.beyond.horizon import report as horizon_report
from prograde.lab.studies.beyond.horizon import run as horizon
from prograde.lab.studies.beyond.hyper import report as hyper_report
from prograde.lab.studies.beyond.hyper import run as hyper
from prograde.lab.studies.beyond.hyper import training as hyper_training


@pytest.fixture
def display():
    return Display(Console(file=io.StringIO()))


def shown(report, record):
    """Draws a record that went through JSON, makes its tables, and returns its conclusion."""
    record = json.loads(json.dumps(record))
    for table in report.tables(record):
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows), table.title
    figure = Figure()
    report.draw(record, figure)
    figure.savefig(io.BytesIO(), format="svg")
    assert all(axes.lines or axes.collections or axes.patches for axes in figure.axes)
    return report.conclusion(record)


def temp_bytes(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.long
def test_every_method_has_the_gradient_of_backprop():
    """In float64, 60 steps: nothing but rounding may lie between them."""
    with jax.enable_x64(True):
        pendulum = horizon_loops.Pendulum()
        run = lambda method, unroll: jax.jit(horizon_loops.gradient(pendulum, method, 60, unroll))(
            None, pendulum.params()
        )
        value, gradient = run("backprop", 1)
        assert gradient.dtype == np.float64
        for method, unroll in (("ours", 7), *((m, 1) for m in horizon_loops.CHECKPOINTED)):
            got = run(method, unroll)
            np.testing.assert_allclose(got[0], value, rtol=1e-12, err_msg=method)
            np.testing.assert_allclose(
                got[1], gradient, rtol=0, atol=1e-11 * np.abs(gradient).max(), err_msg=method
            )


def test_one_tangent_of_the_gru_is_a_directional_derivative(key):
    """The estimate is exact along its own tangent: g . v = (grad f . v) |v|^2."""
    with jax.enable_x64(True):
        gru = horizon_loops.Recurrent(4)
        both = lambda key, params: [
            horizon_loops.gradient(gru, name, 50)(key, params)[1] for name in ("ours", "backprop")
        ]
        ours, exact = jax.tree.map(np.asarray, jax.jit(both)(key, gru.params()))
        inner, square = (
            sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
            for pair in ((ours, exact), (ours, ours))
        )
        # g = d v with d = grad f . v, so that g . grad f = d^2; and |g|^2 = d^2 n for tangents of
        # signs
        n = sum(w.size for w in jax.tree.leaves(exact))
    np.testing.assert_allclose(float(inner) * n, float(square), rtol=1e-9)


@pytest.mark.long
def test_memory_grows_with_the_horizon_for_reverse_mode_alone():
    pendulum = horizon_loops.Pendulum()
    at = lambda method: [
        temp_bytes(horizon_loops.gradient(pendulum, method, t), None, pendulum.params())
        for t in (100, 6400)
    ]
    ours, backprop, square_root = at("ours"), at("backprop"), at("square root")
    assert ours[1] <= 1.05 * ours[0]
    assert backprop[1] > 30 * backprop[0]
    assert square_root[1] < 8 * square_root[0]  # eight times the segments, eight times as long


def test_exact_gradient_runs_the_function_once():
    """With all tangents in one chunk, the value comes from the same run of the loop."""
    loss = lambda x: jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x), x).sum()
    jaxpr = jax.make_jaxpr(pg.value_and_grad(loss, pg.ForwardJacobian()))(None, jnp.ones(3))
    assert str(jaxpr).count(" scan[") == 1


@pytest.mark.long
def test_horizon_is_told_from_a_tiny_record(display, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in the process that it starts
    plan = horizon.Plan(
        lengths=(64,), unrolls=(1,), search_length=16, rounds=1, widths=(2,), recurrent=(16,)
    )
    plan = dataclasses.replace(plan, methods=("bare", "ours", "backprop", "each step"))
    record = horizon.measured(
        {"default": dataclasses.replace(plan, lengths=()), "one kernel": plan}, display
    )
    said = shown(horizon_report, record)
    assert "the target of 0.5 is" in said
    # where ours takes ten times as long, and its memory grows, that is what is said
    for figures in record["pendulum"].values():
        for at in figures["lengths"].values():
            at["ours"]["seconds"] = {k: 1e6 * v for k, v in at["ours"]["seconds"].items()}
    record["pendulum"]["one kernel"]["lengths"]["64"]["ours"]["temp_bytes"] *= 10
    said = horizon_report.conclusion(record)
    assert "missed" in said
    assert "slower" in said
    assert "grew by a factor" in said


@pytest.mark.parametrize("kind", ["numbers", pytest.param("weights", marks=pytest.mark.long)])
def test_hypergradients_are_those_of_reverse_mode(kind):
    """In float64, through 40 training steps: eight numbers, or the weights of 16 examples."""
    with jax.enable_x64(True):
        if kind == "numbers":
            run, at = hyper_training.Classifier(40), hyper_training.centre()
        else:
            run, at = hyper_training.Cleaning(40, examples=16), jnp.linspace(-1.0, 1.0, 16)
        loss = lambda h: run.outcome(h)[0]
        value, wanted = jax.jit(jax.value_and_grad(loss))(at)
        got_value, got = jax.jit(pg.value_and_grad(loss, pg.ForwardJacobian(chunk=8)))(None, at)
        np.testing.assert_allclose(got_value, value, rtol=1e-12)
        for g, w in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            assert g.dtype == np.float64
            assert np.all(w != 0)
            np.testing.assert_allclose(g, w, rtol=1e-7)


@pytest.mark.long
def test_hypergradient_memory_does_not_grow_with_the_training_run():
    at = hyper_training.centre()
    ours, backprop = (
        [
            temp_bytes(hyper.hypergradients(hyper_training.Classifier(t).outcome)[method], at)
            for t in (20, 640)
        ]
        for method in (hyper.OURS, hyper.BACKPROP)
    )
    assert ours[1] <= 1.05 * ours[0]
    assert backprop[1] > 8 * backprop[0]


def test_wrong_labels_are_as_many_as_said_and_small_weights_tell_them():
    run = hyper_training.Cleaning(10, examples=100)
    labels, wrong = run.labels
    true = hyper_training.digits()["train"][1][:100]
    assert wrong.sum() == 30
    assert ((labels != true) == wrong).all()
    assert run.found(np.where(wrong, -1.0, 1.0)) == {"auc": 1.0, "precision": 1.0}
    assert run.found(np.zeros(100))["auc"] == 0.5
    assert run.found(np.where(wrong, 1.0, -1.0)) == {"auc": 0.0, "precision": 0.0}


@pytest.mark.long
def test_hyper_is_told_from_a_tiny_record(display):
    plan = hyper.Plan(
        (16,), 1, run_steps=8, meta_steps=2, starts=2, cleaning_steps=4, cleaning_seconds=1e-3,
        cleaning_rates=(0.1,), num_tangents=2,
    )  # fmt: skip
    record = hyper.measured(plan, display)
    said = shown(hyper_report, record)
    assert "is missed in float64" in said  # eight steps are no memory to speak of
    for figures in record["long"].values():
        figures["methods"][hyper.BACKPROP]["temp_bytes"] = (
            100 * figures["methods"][hyper.OURS]["temp_bytes"]
        )
        figures["errors"] = {"float32": 1e-3, "float64": 1e-14}
    said = hyper_report.conclusion(record)
    assert "is met in float64, in float32 not" in said
