"""Learning from a stream in chunks: resumed, stopped, at constant memory, in any dtype."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import (
    LEARNERS,
    NAMES,
    OPTIMIZER,
    T,
    assert_close,
    gru,
    problem,
    squared,
    squared_error,
)

from prograde.online import RTRL, StreamError, learn

# one DODGE stands for the others, which run in the long suite
LONG = [pytest.param(learner, marks=pytest.mark.long) for learner in LEARNERS]


@pytest.mark.parametrize("learner", [*LEARNERS[:4], LONG[4]], ids=NAMES)
def test_a_stream_resumed_from_a_file_is_the_stream_uninterrupted(key, learner):
    params, state, inputs, targets = problem(key)
    begin = (learner.init(params, state, inputs[0], targets[0]), OPTIMIZER.init(params))
    whole = learn(learner, OPTIMIZER, key, *begin, inputs, targets)
    carry, opt_state, before = learn(learner, OPTIMIZER, key, *begin, inputs[:6], targets[:6])
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (carry, opt_state))
    file.seek(0)
    saved = eqx.tree_deserialise_leaves(file, begin)
    resumed = learn(learner, OPTIMIZER, key, *saved, inputs[6:], targets[6:])
    jax.tree.map(np.testing.assert_array_equal, resumed[:2], whole[:2])
    np.testing.assert_array_equal(jnp.concatenate([before, resumed[2]]), whole[2])
    assert not np.array_equal(whole[0].params["h"], params["h"])


@pytest.mark.parametrize("learner", LEARNERS[1:4:2], ids=NAMES[1:4:2])
def test_learning_is_steps_of_learner_and_optimizer(key, learner):
    params, state, inputs, targets = problem(key)
    optimizer = optax.sgd(0.05)
    carry, opt_state = learner.init(params, state, inputs[0], targets[0]), optimizer.init(params)
    after, _, losses = learn(learner, optimizer, key, carry, opt_state, inputs, targets)
    step = jax.jit(learner.step)
    for t in range(T):
        carry, loss, grads = step(key, carry, inputs[t], targets[t])
        updates, opt_state = optimizer.update(grads, opt_state, carry.params)
        carry = carry.with_params(optax.apply_updates(carry.params, updates))
        np.testing.assert_allclose(loss, losses[t], rtol=1e-4)
    assert_close(carry.params, after.params, 1e-4)


@pytest.mark.parametrize("learner", [*LEARNERS[:2], LONG[2], LEARNERS[3], LONG[4]], ids=NAMES)
def test_memory_does_not_grow_with_the_length_of_the_stream(key, learner):
    """XLA's figure, without the stream itself and the losses."""
    params, state, inputs, targets = problem(key)
    optimizer = optax.sgd(0.1)

    def temporaries(length):
        stretch = lambda x: jnp.zeros((length, *x.shape[1:]), x.dtype)
        arguments = (learner.init(params, state, inputs[0], targets[0]), optimizer.init(params))
        chunk = lambda carry, opt_state, i, t: learn(
            learner, optimizer, key, carry, opt_state, i, t
        )
        program = jax.jit(chunk).lower(*arguments, stretch(inputs), stretch(targets)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(10_000) <= temporaries(10) + 64


@pytest.mark.parametrize(
    ("learner", "where"),
    [
        (LEARNERS[0], "input"),
        *(pytest.param(learner, "input", marks=pytest.mark.long) for learner in LEARNERS[1:3]),
        (LEARNERS[3], "input"),
        pytest.param(LEARNERS[4], "input", marks=pytest.mark.long),
        (LEARNERS[0], "target"),
    ],
    ids=[*NAMES, "RTRL, target"],
)
def test_a_stream_stops_before_what_is_not_finite(key, learner, where):
    params, state, inputs, targets = problem(key)
    begin = (learner.init(params, state, inputs[0], targets[0]), OPTIMIZER.init(params))
    before = learn(learner, OPTIMIZER, key, *begin, inputs[:6], targets[:6])
    spoil = lambda x: x.at[6, 1].set(jnp.nan)
    bad = (spoil(inputs), targets) if where == "input" else (inputs, spoil(targets))
    with pytest.raises(
        StreamError, match=rf"step 6 of the chunk, 6 of the stream: {where} is not finite"
    ) as caught:
        learn(learner, OPTIMIZER, key, *begin, *bad)
    jax.tree.map(np.testing.assert_array_equal, caught.value.carry, before[0])
    np.testing.assert_array_equal(caught.value.losses, before[2])
    assert caught.value.index == 6


def test_a_rate_that_is_too_high_is_told_from_bad_input(key):
    params, state, inputs, targets = problem(key)
    learner, optimizer = RTRL(gru, squared), optax.sgd(1e38)
    begin = (learner.init(params, state), optimizer.init(params))
    with pytest.raises(
        StreamError, match=r"what the step makes of finite input .* A lower learning rate may help"
    ):
        learn(learner, optimizer, key, *begin, 1e3 * inputs, 1e10 * targets)


def test_an_equinox_cell_is_learned_as_it_is(key):
    """Leaves that are not arrays stay where they are, and get no gradient."""

    class Model(eqx.Module):
        cell: eqx.nn.GRUCell
        activation: object

    model = Model(eqx.nn.GRUCell(3, 4, key=jax.random.clone(key)), jnp.tanh)
    learner = RTRL(lambda m, s, x: (m.cell(x, s), m.activation(s)), squared)
    inputs, targets = jax.random.normal(jax.random.clone(key), (T, 3)), jnp.ones((T, 4))
    optimizer = optax.sgd(0.1)
    carry = learner.init(model, jnp.zeros(4))
    carry, _, losses = learn(
        learner,
        optimizer,
        key,
        carry,
        optimizer.init(eqx.filter(model, eqx.is_inexact_array)),
        inputs,
        targets,
    )
    assert carry.params.activation is jnp.tanh
    assert losses[-1] < losses[1]
    _, _, grads = eqx.filter_eval_shape(learner.step, key, carry, inputs[0], targets[0])
    assert grads.activation is None


def test_a_cell_without_input_is_driven_by_its_targets(key):
    learner, optimizer = RTRL(lambda a, s, _: (a * s, a * s), squared_error), optax.sgd(0.01)
    a, state = jnp.array(0.5), jnp.array(1.0)
    _, _, losses = learn(
        learner, optimizer, key, learner.init(a, state), optimizer.init(a), None, jnp.ones(20)
    )
    assert losses.shape == (20,)


@pytest.mark.parametrize("learner", LEARNERS[:3], ids=NAMES[:3])
def test_bfloat16_cells_are_learned_in_bfloat16(key, learner):
    params, state, inputs, targets = problem(key, dtype=jnp.bfloat16)
    carry = learner.init(params, state)
    carry, _, grads = jax.jit(learner.step)(key, carry, inputs[0], targets[0])
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


def test_parameters_keep_their_dtype_under_an_optimizer_that_widens(key):
    params, state, inputs, targets = problem(key, dtype=jnp.bfloat16)
    learner, optimizer = RTRL(gru, squared), optax.adam(0.01, mu_dtype=jnp.float32)
    carry, _, _ = learn(
        learner,
        optimizer,
        key,
        learner.init(params, state),
        optimizer.init(params),
        inputs,
        targets,
    )
    assert {w.dtype for w in jax.tree.leaves(carry.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("learner", LEARNERS, ids=NAMES)
def test_a_step_promotes_nothing(key, learner):
    params, state, inputs, targets = problem(key)
    carry = learner.init(params, state, inputs[0], targets[0])
    jax.eval_shape(learner.step, key, carry, inputs[0], targets[0])
