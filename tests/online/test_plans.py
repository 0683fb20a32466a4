"""What will be carried is said before it is allocated, and what cannot be followed is refused."""

import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from streams import squared

from prograde.lab.models.recurrent import first_state, min_gru, start
from prograde.online import RTRL, OwnLayer, SnAp
from prograde.online._sparse_influence import _cached_layout

X = jnp.zeros(3)


def element_wise(w, s, x):
    s = w["decay"] * s + w["into"] @ x
    return s, s


W = {"decay": jnp.ones(8), "into": jnp.ones((8, 3))}


def test_a_plan_is_what_init_allocates_and_takes_shapes_alone(key):
    params, state = start(min_gru, key, 3, 8, 2), first_state(min_gru, 8, (4,))
    learner = RTRL(min_gru, squared)
    carry = learner.init(params, state, jnp.zeros((4, 3)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state))
    plan = learner.plan(*shapes, jax.ShapeDtypeStruct((4, 3), jnp.float32))
    columns = jax.tree.leaves(carry.memory.columns)
    assert (plan.influence, plan.reason) == ("sparse", "")
    assert plan.numbers == sum(x.size for x in columns) == 4 * 8 * 7
    assert plan.bytes == sum(x.nbytes for x in columns)
    assert plan.carried == 8 * 7
    assert plan.parameters == 8 * 7 + 8 * 2 + 2
    assert plan.multiply_adds < 40 * plan.numbers
    assert "3 + 3 + 1 colours for 56 parameters and a state of 32 numbers" in str(plan)


def test_a_large_element_wise_cell_is_planned_where_the_dense_influence_is_refused():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    learner = RTRL(element_wise, squared)
    w = {"decay": shape(2048), "into": shape(2048, 40)}
    plan = learner.plan(w, shape(2048), shape(40))
    assert plan.numbers == plan.parameters == 2048 * 41
    small = RTRL(element_wise, squared, max_bytes=1000)
    state = jnp.zeros(8)
    with pytest.raises(ValueError, match=r"RTRL keeps 32 numbers of a sparse influence\. DODGE"):
        RTRL(element_wise, squared, max_bytes=100).init(W, state, X)
    with pytest.raises(
        ValueError, match=r"keeps parameters x state numbers \(dense, as init was given no example"
    ):
        small.init(W, state)
    assert small.init(W, state, X).memory.code.dtype == jnp.uint32


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (
            lambda w, s, x: (jnp.fft.fft(w["decay"] * s).real,) * 2,
            r"asdex cannot read the cell \(NotImplementedError: .*'fft'",
        ),
        (
            lambda w, s, x: (lax.while_loop(lambda r: r[0] < 9, lambda r: r * w["decay"], s),) * 2,
            "one step of the cell has no reverse mode",
        ),
        (lambda w, s, x: (jnp.tanh(w["into"] @ w["into"].T @ s),) * 2, r"need 24 colours"),
    ],
    ids=["an unknown primitive", "a loop", "a dense influence"],
)
def test_a_cell_without_a_sparse_pattern_is_carried_densely_and_that_is_said(cell, reason):
    learner, state = RTRL(cell, squared), jnp.ones(8)
    plan = learner.plan(W, state, X)
    assert plan.influence == "dense"
    assert jax.tree.leaves(learner.init(W, state, X).memory)[0].shape == (32, 8)
    assert re.search(reason, plan.reason)
    if "colours" not in reason:
        with pytest.raises(ValueError, match=rf"keep=SnAp\(n=1\), but the pattern .*{reason}"):
            RTRL(cell, squared, keep=SnAp(1)).init(W, state, X)


def test_without_asdex_the_influence_is_dense_and_the_plan_says_what_to_install(key, monkeypatch):
    learner, state = RTRL(element_wise, squared), jnp.zeros(8)
    sparse = learner.init(W, state, X)
    monkeypatch.setitem(sys.modules, "asdex", None)
    _cached_layout.cache_clear()
    plan = learner.plan(W, state, X)
    assert "asdex is not installed: pip install 'prograde[sparse]'" in plan.reason
    dense = learner.init(W, state, X)
    step = lambda carry: learner.step(jax.random.clone(key), carry, X, jnp.zeros(8))
    assert step(dense)[0].memory.shape == (32, 8)
    with pytest.raises(ValueError, match="the carry is not one of this RTRL"):
        step(sparse)
    monkeypatch.undo()
    _cached_layout.cache_clear()
    assert step(dense)[0].memory.shape == (32, 8)  # a carry that began dense goes on dense


def test_other_choices_are_refused_by_name():
    with pytest.raises(TypeError, match="keep='own', but None, SnAp"):
        RTRL(element_wise, squared, keep="own")
    with pytest.raises(ValueError, match="influence='none', but it is one of 'auto'"):
        RTRL(element_wise, squared, influence="none")
    with pytest.raises(ValueError, match="leave one of the two out"):
        RTRL(element_wise, squared, keep=OwnLayer(), influence="dense")
    with pytest.raises(ValueError, match="n=0"):
        SnAp(0)
    nothing = RTRL(element_wise, squared, keep=lambda state, param: False)
    with pytest.raises(ValueError, match=r"keeps no influence .*\['decay'\]"):
        nothing.init(W, jnp.zeros(8), X)
    with pytest.raises(ValueError, match="input=None, but the cell needs one"):
        RTRL(element_wise, squared).plan(W, jnp.zeros(8))
