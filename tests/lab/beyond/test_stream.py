"""Streams that are learned from: the tasks, and what the report says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from prograde.lab.display import Display
from prograde.lab.studies.beyond.stream.report import conclusion, draw, tables
from prograde.lab.studies.beyond.stream.run import (
    Setting,
    adding,
    characters,
    delayed_copy,
    library_text,
    measure_setting,
)


def test_the_copy_task_asks_for_what_was_shown_delay_steps_before(key):
    task = delayed_copy(7)
    inputs, targets = map(np.asarray, jax.jit(task.draw, static_argnums=1)(key, 50))
    assert inputs.shape == (50, 8, 5)
    np.testing.assert_array_equal(inputs[:, 0, :4].argmax(-1), targets[:, 7])
    assert not inputs[:, 1:7].any()
    assert (targets[:, :7] == -1).all()
    assert len(set(targets[:, 7])) == 4
    assert float(task.loss(jnp.zeros(4), targets[0, 7])) == pytest.approx(task.guessing)
    assert float(task.loss(jnp.ones(4), targets[0, 0])) == 0


def test_the_adding_task_asks_for_the_sum_of_two_marked_numbers(key):
    inputs, targets = map(np.asarray, jax.jit(adding(9).draw, static_argnums=1)(key, 2000))
    assert (inputs[:, :, 1].sum(1) == 2).all()
    np.testing.assert_allclose(
        ((inputs[:, :, 0] + 0.5) * inputs[:, :, 1]).sum(1), targets[:, -1], rtol=1e-6
    )
    # the best guess without looking is the mean, 1, whose error is the variance, 1/6
    error = (targets[:, -1] - 1) ** 2
    assert error.mean() == pytest.approx(adding(9).guessing, abs=5 * float(error.std()) / 2000**0.5)


def test_characters_are_those_that_follow(key):
    text = library_text()
    assert len(text) > 100_000
    task = characters(text)
    inputs, targets = map(np.asarray, jax.jit(task.draw, static_argnums=1)(key, 3))
    read = inputs.reshape(-1, task.inputs).argmax(-1)
    np.testing.assert_array_equal(read[1:], targets.reshape(-1)[:-1])


def test_stream_is_told_from_a_tiny_record():
    setting = Setting(
        units=4,
        delay=2,
        windows=(2, 6),
        rates=(1e-2,),
        seconds=0.2,
        learners=("RTRL",),
        tasks=("copy",),
    )
    record = measure_setting(setting, Display(Console(quiet=True)))
    (table,) = tables(record)
    assert [row[0] for row in table.rows] == [
        "RTRL, exact",
        *(f"backprop truncated to {w} steps" for w in (2, 6)),
    ]
    assert all(
        run["steps"] > 0 for m in record["tasks"]["copy"]["methods"].values() for run in m["runs"]
    )
    figure = Figure(layout="constrained")
    draw(record, figure)
    ends = record["tasks"]["copy"]["methods"]
    loss = lambda name, value: ends[name]["runs"][0].update(loss=value)
    loss("RTRL", 0.1), loss("backprop 2", 1.0), loss("backprop 6", 0.01)
    said = conclusion(record)
    assert "RTRL ends at 0.1" in said
    assert "(2 steps) at 1: RTRL is lower" in said
    assert "RTRL ends at 0.1, truncated backprop with 6 steps at 0.01: RTRL is higher" in said
    loss("RTRL", 2.0)
    assert "(2 steps) at 1: RTRL is higher" in conclusion(record)
    ends["RTRL"]["runs"].append({"loss": 0.1})
    assert "(2 steps) at 1: no clear difference" in conclusion(record)
