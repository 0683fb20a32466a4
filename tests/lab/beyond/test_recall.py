"""Recall after distractors: the task, equal gradients of two methods, and the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from prograde.lab.display import Display
from prograde.lab.models.recurrent import first_state, lru, min_gru, rg_lru, start
from prograde.lab.studies.beyond.recall.methods import methods
from prograde.lab.studies.beyond.recall.report import conclusion, draw, tables
from prograde.lab.studies.beyond.recall.run import Delay, Setting, measure_setting
from prograde.lab.studies.beyond.recall.task import GUESSING, INPUTS, SYMBOLS, episode, loss


def test_the_symbol_is_asked_for_after_distractors(key):
    inputs, targets = episode(key, 7, 50)
    assert inputs["x"].shape == (8, 50, INPUTS)
    which = np.asarray(jnp.argmax(inputs["x"], -1))
    np.testing.assert_array_equal(which[0], targets[7])
    assert (targets[:7] == -1).all()
    assert ((which[1:7] >= SYMBOLS) & (which[1:7] < INPUTS - 1)).all()
    assert (which[7] == INPUTS - 1).all()
    np.testing.assert_array_equal(inputs["first"], [1, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(loss(jnp.zeros((50, SYMBOLS)), targets[7]), GUESSING, rtol=1e-6)
    assert not loss(jnp.ones((50, SYMBOLS)), targets[0]).any()


def test_online_learning_updates_as_backprop_through_the_episode(key):
    """And a window that is shorter does not."""
    after = {}
    for name, method in methods(6, (3,), noisy=False).items():
        carry, opt_state = method.begin(5, 3, 6, 0.01, 0)
        for i in range(3):
            data = episode(jax.random.fold_in(key, i), 6, 3)
            carry, opt_state, _ = method.learn(6, carry, opt_state, *data)
        after[name] = getattr(carry, "params", carry)
    close = lambda a, b: jax.tree.all(
        jax.tree.map(lambda x, y: jnp.allclose(x, y, atol=1e-5), a, b)
    )
    assert close(after["RTRL"], after["backprop"])
    assert not close(after["window 3"], after["backprop"])


@pytest.mark.long
def test_recall_is_told_from_a_tiny_record():
    plan = Delay(3, 0.2, (0.01,), 0, (2,), ("RTRL", "backprop", "window 2", "UORO", "SnAp"))
    setting = Setting(4, 2, (plan,), (3, 9), (8,), 4, 2)
    record = measure_setting(setting, Display(Console(quiet=True)))
    learned, used, costs = tables(record)
    assert [row[0] for row in learned.rows][:2] == ["RTRL, exact", "backprop, all 4 steps"]
    assert len(used.rows) == 2
    assert costs.rows[0][0] == "8"
    draw(record, Figure(layout="constrained"))
    ends = record["tasks"]["3"]["methods"]
    for name, value in (("RTRL", 0.001), ("backprop", 0.002), ("window 2", 1.3)):
        ends[name]["runs"] = [ends[name]["runs"][0] | {"loss": value, "learned_seconds": 0.1}]
    said = conclusion(record)
    assert "RTRL and backprop end below 0.01 nats" in said
    assert "window 2 ends at 1.3" in said


@pytest.mark.parametrize("cell", [min_gru, rg_lru, lru], ids=lambda cell: cell.__name__)
def test_units_of_a_first_cell_forget_with_half_lives_up_to_the_longest(key, cell):
    params = start(cell, jax.random.clone(key), 3, 200, 2, longest=50.0)
    kept = cell(params, jax.tree.map(jnp.ones_like, first_state(cell, 200)), jnp.zeros(3))[0]
    size = jnp.hypot(kept["re"], kept["im"]) / 2**0.5 if cell is lru else kept
    half_lives = np.log(0.5) / np.log(np.asarray(size))
    assert 0.99 < half_lives.min() < 1.2
    assert 40 < half_lives.max() < 50.1
