"""What a step does: which rows it sees, at which rate, with which state."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg
from prograde.lab import models
from prograde.lab.training.schedules import SCHEDULES, Rate
from prograde.lab.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Ones(pg.Estimator):
    """Says that every derivative is 1, so that a step is the rate."""

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = pg.Backprop().estimate(fun, key, None, params, *args, has_aux=has_aux)
        return dataclasses.replace(found, grads=jax.tree.map(jnp.ones_like, found.grads))


@dataclasses.dataclass(frozen=True)
class Counting(pg.Estimator):
    """The gradient times a state that grows by one from step to step."""

    def init(self, fun, params, *args, has_aux=False):
        return jnp.ones(())

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = pg.Backprop().estimate(fun, key, None, params, *args, has_aux=has_aux)
        grads = jax.tree.map(lambda g: state * g, found.grads)
        return dataclasses.replace(found, grads=grads, state=state + 1)


NUMBERS = np.arange(10, dtype=np.float32)


def mean_of(estimator, **options):
    """A parameter times the mean of the rows of a batch."""
    loss = lambda w, x: jnp.mean(w * x)
    return Trainer(lambda key: jnp.ones(()), loss, estimator, (NUMBERS,), batch_size=3, **options)


@pytest.mark.parametrize(
    ("schedule", "step", "length", "expected"),
    [
        ("exp", 0, 7, 1.0),
        ("exp", 1, 7, 0.99990000499983),
        ("exp", 10_000, 7, 0.36787944117144),
        ("cosine", 0, 4, 1.0),
        ("cosine", 1, 4, 0.85355339059327),
        ("cosine", 2, 4, 0.5),
        ("cosine", 3, 4, 0.14644660940673),
        ("cosine", 4, 4, 0.0),
        ("cosine", 5, 4, 0.0),
    ],
)
def test_schedules_are_as_written_down(schedule, step, length, expected):
    found = SCHEDULES[schedule](jnp.int32(step), jnp.float32(length))
    assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("in_scan", [True, False])
@pytest.mark.parametrize(
    ("schedule", "moved"),
    [
        ("cosine", [1.0, 0.85355339, 0.5, 0.14644661]),
        ("exp", [1.0, 0.9999, 0.99980002, 0.99970004]),
    ],
)
def test_every_step_moves_by_the_rate_of_its_number(schedule, moved, in_scan):
    """The first step has the whole rate; a schedule that is a step early or late fails."""
    trainer = mean_of(Ones(), schedule=schedule, in_scan=in_scan)
    carry, before = trainer.start(0), 1.0
    for step, expected in enumerate(moved):
        carry, _, _ = trainer.steps(carry, Rate(0.25, 4), 0, trainer.rows(0, step, 1))
        assert before - float(carry[0]) == pytest.approx(0.25 * expected, rel=1e-5)
        before = float(carry[0])


def test_a_step_sees_the_rows_it_is_given():
    trainer = mean_of(None)
    rows = trainer.rows(seed=2, first=0, count=5)
    _, losses, _ = trainer.steps(trainer.start(0), Rate(1.0), 0, rows)
    np.testing.assert_allclose(losses, NUMBERS[rows].mean(axis=1), rtol=1e-6)


def test_every_epoch_sees_every_example_once_in_its_own_order():
    """Ten examples in batches of three: three steps an epoch, one example left out."""
    trainer = mean_of(None)
    rows = trainer.rows(seed=1, first=0, count=9)
    epochs = [rows[i : i + 3] for i in (0, 3, 6)]
    for epoch in epochs:
        assert len(set(epoch.ravel())) == 9
        assert set(epoch.ravel()) < set(range(10))
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(trainer.rows(1, 2, 4), rows[2:6])
    assert not np.array_equal(trainer.rows(0, 0, 9), rows)


def test_bare_forward_pass_changes_no_parameter():
    trainer = mean_of(None)
    carry, losses, _ = trainer.steps(trainer.start(0), Rate(1.0), 0, trainer.rows(0, 0, 3))
    assert float(carry[0]) == 1.0
    assert losses.shape == (3,)


def test_the_state_of_an_estimator_goes_from_step_to_step():
    trainer = mean_of(Counting())
    rows = trainer.rows(0, 0, 3)
    carry, _, _ = trainer.steps(trainer.start(0), Rate(0.5), 0, rows)
    assert float(carry[3]) == 4
    slopes = NUMBERS[rows].mean(axis=1)
    rates = 0.5 * np.exp(-1e-4 * np.arange(3))
    assert float(carry[0]) == pytest.approx(1 - (rates * slopes * [1, 2, 3]).sum(), rel=1e-5)


def test_a_traced_trainer_returns_the_parameters_before_each_step():
    loss = lambda p: jnp.sum(p)
    trainer = Trainer(lambda key: jnp.zeros(2), loss, Ones(), traced=True)
    carry, _, visited = trainer.steps(trainer.start(0), Rate(1.0), 0, trainer.rows(0, 0, 2))
    np.testing.assert_allclose(visited, [[0, 0], [-1, -1]])
    np.testing.assert_allclose(carry[0], -1 - math.exp(-1e-4), rtol=1e-6)


def test_the_compiled_step_is_the_step():
    trainer = mean_of(Ones())
    compiled, carry, arguments = trainer.compiled_step()
    (params, _, step, _), (value, _) = compiled(carry, *arguments)
    assert (float(params), int(step)) == (1.0, 1)  # the rate is 0
    assert float(value) == pytest.approx(NUMBERS[trainer.rows(0, 0, 1)[0]].mean())


@pytest.mark.parametrize("name", ["mixer", "transformer"])
def test_networks_tell_examples_apart_and_merged_ones_compute_the_same(name, key):
    build = getattr(models, name)
    network, merged = build(False, width=16, depth=2), build(True, width=16, depth=2)
    params, labels = jax.jit(network.init)(key), jnp.arange(5)
    images = np.random.default_rng(0).random((5, 28, 28), np.float32)

    @jax.jit
    def computed(params):
        logits = network.logits(params, images), merged.logits(params, images)
        losses = network.losses(params, images, labels), network.loss(params, images, labels)
        return *logits, network.logits(params, images[2:3])[0], *losses

    logits, by_merged, alone, losses, loss = computed(params)
    assert logits.shape == (5, 10)
    np.testing.assert_allclose(alone, logits[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_merged, logits, rtol=1e-4, atol=1e-5)
    assert losses.shape == (5,)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-6)
    assert pg.check(network.losses, params, images, labels, memory=False).ok
