"""Cells, carries and arguments that cannot be learned with are refused by name."""

import jax
import jax.numpy as jnp
import optax
import pytest
from streams import gru, problem, squared

import prograde as pg
from prograde.online import DODGE, RTRL, UORO, Momentum, learn


def bad_cell(change):
    def cell(params, state, x):
        state, output = gru(params, state, x)
        return change(state), output

    return cell


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"h": s["h"].astype(jnp.bfloat16)},
            r"\['h'\] was float32\[5\] and is bfloat16\[5\]",
        ),
        (
            lambda s: s | {"h": jnp.append(s["h"], 0.0)},
            r"\['h'\] was float32\[5\] and is float32\[6\]",
        ),
        (lambda s: s | {"more": s["h"]}, "its structure was"),
    ],
    ids=["dtype", "shape", "structure"],
)
def test_a_cell_that_changes_its_state_is_refused(key, change, message):
    params, state, inputs, targets = problem(key)
    learner = RTRL(bad_cell(change), squared)
    carry = learner.init(params, state)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(learner.step, key, carry, inputs[0], targets[0])


def test_bad_input_is_refused_by_name(key):
    params, state, inputs, targets = problem(key)
    one = (inputs[0], targets[0])
    first_step = lambda cell, loss, key: RTRL(cell, loss).step(
        key, RTRL(cell, loss).init(params, state), *one
    )
    with pytest.raises(
        TypeError, match=r"the cell returned dict, but a pair \(state, output\) is needed"
    ):
        first_step(lambda p, s, x: gru(p, s, x)[0], squared, key)
    with pytest.raises(ValueError, match=r"the loss has shape \(2, 1\)"):
        first_step(gru, lambda output, target: (output - target)[:, None], key)
    with pytest.raises(TypeError, match="a typed PRNG key is needed"):
        first_step(gru, squared, jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match="no floating-point array"):
        RTRL(gru, squared).init({"n": jnp.arange(3)}, state)
    with pytest.raises(ValueError, match="window=0"):
        DODGE(gru, squared, window=0)
    with pytest.raises(TypeError, match="a distribution of tangents is needed"):
        DODGE(gru, squared, window=4, directions="normal")
    with pytest.raises(ValueError, match="init\\(params, state, input, target\\)"):
        DODGE(gru, squared, window=4, directions=Momentum()).init(params, state)
    wrong = DODGE(gru, squared, window=4, directions=lambda key, past: past.grads, num_tangents=3)
    with pytest.raises(
        ValueError, match=r"num_tangents=3: .*\['b'\] was float32\[3, 15\] and is float32\[15\]"
    ):
        wrong.init(params, state, *one)
    with pytest.raises(ValueError, match="its structure was"):
        DODGE(gru, squared, window=4, directions=lambda key, past: past.grads["b"]).init(
            params, state, *one
        )
    with pytest.raises(TypeError, match="learners work on real states"):
        RTRL(gru, squared).init(params, {"h": jnp.zeros(5, jnp.complex64)})
    with pytest.raises(ValueError, match="state has no floating-point numbers"):
        UORO(gru, squared).init(params, {"steps": jnp.zeros(3, jnp.int32)})
    guessing = DODGE(gru, squared, window=4, directions=Momentum())
    carry = guessing.init(params, state, jnp.zeros(3, jnp.int32), targets[0])
    with pytest.raises(
        ValueError, match=r"examples that init was given: .*int32\[3\] and is float32\[3\]"
    ):
        guessing.step(key, carry, *one)
    carry = RTRL(gru, squared).init(params, state)
    with pytest.raises(ValueError, match="have no steps"):
        learn(
            RTRL(gru, squared),
            optax.sgd(0.1),
            key,
            carry,
            optax.EmptyState(),
            inputs[:0],
            targets[:0],
        )
    with pytest.raises(ValueError, match="params differ from those of the carry"):
        carry.with_params(params | {"b": params["b"][:3]})
    with pytest.raises(ValueError, match="one leading axis, that of the steps"):
        learn(
            RTRL(gru, squared), optax.sgd(0.1), key, carry, optax.EmptyState(), inputs, targets[1:]
        )


def test_what_is_no_function_is_refused_by_name(key):
    params, state, _, _ = problem(key)
    for arguments, message in (((None, squared), "cell=None"), ((gru, 0.5), r"loss=0\.5")):
        with pytest.raises(TypeError, match=f"{message}, but a function is needed"):
            RTRL(*arguments).init(params, state)


def test_a_memory_that_is_too_large_is_refused_before_it_is_allocated():
    """2.4 million parameters and 4,096 states: 39 GB for RTRL, 10 MB for one product of UORO."""
    cell = lambda w, s, x: (jnp.tanh(w[0] * s), s)
    params, state = jnp.zeros((600, 4000)), jnp.zeros(4096)
    with pytest.raises(
        ValueError,
        match=r"of RTRL for 2,400,000 parameters and a state of 4,096 numbers takes 39\.3 GB, and "
        r"max_bytes=8589934592 allows 8\.6\. .*DODGE with K tangents, or UORO with K products",
    ):
        RTRL(cell, squared).init(params, state)
    with pytest.raises(ValueError, match=r"of UORO .* takes 14\.4 GB.*lower it"):
        UORO(cell, squared, num_products=1500).init(params, state)
    with pytest.raises(ValueError, match=r"of DODGE .* takes 14\.4 GB.*lower num_tangents"):
        DODGE(cell, squared, 5, pg.Normal(), num_tangents=1500).init(params, state)
    small = dict(max_bytes=40_000)
    RTRL(cell, squared, **small).init(jnp.zeros((5, 20)), jnp.zeros(100))
    with pytest.raises(ValueError, match=r"takes 0\.0 GB, and max_bytes=39999"):
        RTRL(cell, squared, max_bytes=39_999).init(jnp.zeros((5, 20)), jnp.zeros(100))
    with pytest.raises(ValueError, match="max_bytes=0"):
        RTRL(cell, squared, max_bytes=0).init(params, state)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(UORO, RTRL), (RTRL, UORO), (RTRL, "DODGE"), ("DODGE", UORO), ("window", "DODGE")],
    ids=str,
)
def test_a_carry_of_another_learner_is_refused(key, theirs, ours):
    params, state, inputs, targets = problem(key)
    make = {
        RTRL: RTRL(gru, squared),
        UORO: UORO(gru, squared),
        "DODGE": DODGE(gru, squared, window=7, num_tangents=2),
        "window": DODGE(gru, squared, window=7, directions=Momentum(), num_tangents=2),
    }
    carry = make[theirs].init(params, state, inputs[0], targets[0])
    optimizer = optax.sgd(0.1)
    message = rf"the carry is not one of this {type(make[ours]).__name__}: of its memory, its str"
    with pytest.raises(ValueError, match=message):
        make[ours].step(key, carry, inputs[0], targets[0])
    with pytest.raises(ValueError, match=message):
        learn(make[ours], optimizer, key, carry, optimizer.init(params), inputs, targets)


def test_other_arguments_of_learning_are_refused_by_name(key):
    params, state, inputs, targets = problem(key)
    learner, optimizer = RTRL(gru, squared), optax.adam(0.1)
    carry, opt_state = learner.init(params, state), optimizer.init(params)
    more = DODGE(gru, squared, window=4, num_tangents=3).init(params, state)
    with pytest.raises(ValueError, match=r"DODGE: of its memory, .*float32\[2, .*float32\[3, "):
        DODGE(gru, squared, window=4, num_tangents=2).step(key, more, inputs[0], targets[0])
    with pytest.raises(TypeError, match="carry is dict, but what init or the last step gave"):
        learner.step(key, params, inputs[0], targets[0])  # pyright: ignore
    call = lambda **changes: learn(
        **{
            "learner": learner,
            "optimizer": optimizer,
            "key": key,
            "carry": carry,
            "opt_state": opt_state,
            "inputs": inputs,
            "targets": targets,
            **changes,
        }
    )
    with pytest.raises(TypeError, match=r"an online learner is needed, such as RTRL\(cell, loss"):
        call(learner=gru)
    with pytest.raises(TypeError, match=r"such as optax.sgd\(0.1\)"):
        call(optimizer=0.1)
    with pytest.raises(TypeError, match="carry is tuple"):
        call(carry=(params, state))
    with pytest.raises(ValueError, match="opt_state is not that of the optimizer"):
        call(opt_state=optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match=r"opt_state is not .*float32\[15\] and is float32\[3\]"):
        call(opt_state=optimizer.init(params | {"b": params["b"][:3]}))
