"""The sparse influence is the dense one: exact for every cell, coloured without a collision."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from streams import assert_close, squared

from prograde.lab.models.recurrent import first_state, gru, lru, min_gru, rg_lru, start
from prograde.online import RTRL, learn
from prograde.online._colouring import colour, take
from prograde.online._sparse_influence import SparseInfluence

T = 9


def through_time(cell, params, state, inputs, targets):
    def one(s, xy):
        s, output = cell(params, s, xy[0])
        return s, jnp.mean(squared(output, xy[1]))

    return jnp.sum(lax.scan(one, state, (inputs, targets))[1])


def check(cell, params, state, inputs, targets, colours=None, rtol=1e-10, **options):
    """The sum of the gradients equals backpropagation through time; returns the last memory."""
    learner = RTRL(cell, squared, **options)
    carry = learner.init(params, state, inputs[0], targets[0])
    assert isinstance(carry.memory, SparseInfluence)
    if colours is not None:
        assert learner.plan(params, state, inputs[0]).colours == colours

    @jax.jit
    def both(params, carry):
        def one(carry, xy):
            carry, _, grads = learner.step(jax.random.key(0), carry, *xy)
            return carry, grads

        carry, grads = lax.scan(one, carry, (inputs, targets))
        expected = jax.grad(lambda p: through_time(cell, p, state, inputs, targets))(params)
        return jax.tree.map(lambda g: jnp.sum(g, 0), grads), expected, carry

    found, expected, carry = both(params, carry)
    assert_close(found, expected, rtol)
    return carry


def problem(key, cell, batch=(), units=6, inputs=3):
    keys = jax.random.split(jax.random.clone(key), 3)
    params = start(cell, keys[0], inputs, units, 2)
    xs = jax.random.normal(keys[1], (T, *batch, inputs))
    return params, first_state(cell, units, batch), xs, jax.random.normal(keys[2], (T, *batch, 2))


CELLS = {
    "minGRU": (min_gru, (3, 3, 1)),
    "RG-LRU": (rg_lru, (3, 1, 3, 1, 3, 1)),
    "LRU": (lru, (1, 3, 3, 1)),
    "GRU": (gru, (18, 108, 54)),
}
QUICK = [("minGRU", (3,)), ("LRU", (3,)), ("RG-LRU", ()), ("GRU", ())]
SLOW = [("minGRU", ()), ("LRU", ()), ("RG-LRU", (3,)), ("GRU", (3,))]


@pytest.mark.parametrize(
    ("name", "batch"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in SLOW)]
)
def test_sparse_rtrl_equals_backprop_through_time(key, name, batch):
    cell, colours = CELLS[name]
    with jax.enable_x64(True):
        options = {"influence": "sparse"} if cell is gru else {}
        check(cell, *problem(key, cell, batch), colours=colours, **options)


def test_block_diagonal_cells_and_trees_with_counters_are_exact(key):
    """Blocks of three units; a step counter; a bias that only some units have; two leaves."""

    def cell(params, state, x):
        a = jnp.einsum("bij,bj->bi", params["blocks"], state["a"])
        a = jnp.tanh(a + (x @ params["into"]).reshape(2, 3))
        b = jax.nn.sigmoid(params["decay"]) * state["b"] + x[:2] + params["wide"][3:5]
        count = state["count"] + 1
        return {"a": a, "b": b, "count": count}, a.ravel()[:2] * params["readout"] + b / count

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.clone(key), 4)
        params = {
            "blocks": jax.random.normal(keys[0], (2, 3, 3)),
            "into": jax.random.normal(keys[1], (3, 6)),
            "decay": jnp.ones(2),
            "wide": jnp.ones(9),
            "readout": jnp.ones(2),
        }
        state = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2), "count": jnp.zeros((), jnp.int32)}
        xs, ys = jax.random.normal(keys[2], (T, 3)), jax.random.normal(keys[3], (T, 2))
        carry = check(cell, params, state, xs, ys, influence="sparse", colours=(9, 9, 1, 1))
        assert int(carry.state["count"]) == T


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_the_influence_has_the_dtype_of_the_state(key, dtype):
    params, state, xs, ys = jax.tree.map(lambda x: x.astype(dtype), problem(key, min_gru, (2,)))
    carry = check(min_gru, params, state, xs, ys, rtol=2e-6 if dtype == jnp.float32 else 0.1)
    assert {x.dtype for x in jax.tree.leaves(carry.memory.columns)} == {jnp.dtype(dtype)}


def random_cell(seed, units, inputs, links):
    """A random program: sparse linear maps of state and parameters, and nonlinearities."""
    rng = np.random.default_rng(seed)
    across = rng.normal(size=(units, units)) * (rng.random((units, units)) < links / units)
    picks = rng.integers(0, units, units)
    rows = rng.integers(0, 3 * units, (2, units))
    functions = [jnp.tanh, jax.nn.sigmoid, jnp.sin, lambda x: jax.nn.relu(x) * 0.5]
    f, g = (functions[i] for i in rng.integers(0, len(functions), 2))

    def cell(w, s, x):
        mixed = 0.5 * f(jnp.asarray(across) @ s + w["a"][rows[0]])
        gate = g(w["into"] @ x + w["a"][rows[1]])
        s = jnp.where(jnp.asarray(picks % 2 == 0), gate * s + mixed, mixed * w["b"])
        return s, jnp.stack([jnp.sum(s[picks] * w["b"]), jnp.sum(w["out"] * s)])

    w = {
        "a": rng.normal(size=3 * units),
        "b": rng.normal(size=units),
        "into": rng.normal(size=(units, inputs)),
        "out": rng.normal(size=units),
    }
    return cell, jax.tree.map(jnp.asarray, w), rng


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.integers(2, 6), st.integers(1, 3), st.floats(0, 2))
def test_random_cells_are_exact(seed, units, inputs, links):
    with jax.enable_x64(True):
        cell, w, rng = random_cell(seed, units, inputs, links)
        xs, ys = (jnp.asarray(rng.normal(size=(T, k))) for k in (inputs, 2))
        check(cell, w, jnp.zeros(units), xs, ys, influence="sparse", rtol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 9), st.floats(0, 1))
def test_columns_of_one_colour_never_meet(seed, rows, kinds, density):
    """Of two columns of one colour, neither hits what the other needs."""
    rng = np.random.default_rng(seed)
    hit = rng.random((rows, kinds)) < density
    needed = hit & (rng.random((rows, kinds)) < 0.7)
    kind = rng.integers(-1, kinds, 25)
    colours, count = colour(kind, *(sp.csc_matrix(x.astype(np.int32)) for x in (needed, hit)))
    assert np.all((colours >= 0) == (kind >= 0))
    assert count == max(colours, default=-1) + 1
    for p in range(25):
        for q in range(p):
            if colours[p] == colours[q] >= 0:
                assert not np.any(hit[:, kind[p]] & needed[:, kind[q]])
                assert not np.any(hit[:, kind[q]] & needed[:, kind[p]])
                assert kind[p] != kind[q] or not needed[:, kind[p]].any()


@pytest.mark.parametrize(
    "index",
    [
        np.arange(24).reshape(4, 6),
        np.arange(24).reshape(4, 6).T,
        np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
        3 + 6 * np.arange(3)[:, None] + np.arange(2),
        np.array([[5]]),
        np.array([3, 1, -1, 7]),
        np.array([4, 4, 4]),
    ],
    ids=str,
)
def test_what_is_taken_is_what_the_index_names(index):
    x = np.arange(100.0, 124.0)
    np.testing.assert_array_equal(
        take(jnp.asarray(x), index), np.where(index < 0, 0, x[np.maximum(index, 0)])
    )


def test_the_pattern_does_not_depend_on_values(key):
    """Zeros and ones in state, parameters and input; a straight-through rule; a mask as data."""

    @jax.custom_jvp
    def sign(x):
        return jnp.sign(x)

    sign.defjvp(lambda x, t: (jnp.sign(x[0]), t[0]))  # its program has no derivative, its rule does

    def cell(w, s, x):
        s = w["a"] * s * x[0] + sign(w["b"] * x[1]) + jnp.where(x[2] > 0, s, 0.0) * w["c"]
        return s, s[:2]

    w = {name: jnp.zeros(4) for name in "abc"}
    plan = RTRL(cell, squared, influence="sparse").plan(w, jnp.zeros(4), jnp.zeros(3))
    assert (plan.colours, plan.carried) == ((1, 1, 1), 12)
    with jax.enable_x64(True):
        w = {name: jax.random.normal(jax.random.clone(key), (4,)) for name in "abc"}
        xs = jax.random.normal(jax.random.fold_in(key, 1), (T, 3))
        check(cell, w, jnp.zeros(4), xs, jnp.ones((T, 2)))


def test_a_gather_by_the_input_may_read_any_row(key):
    """An embedding: which row is read depends on data, so every row counts."""

    def cell(w, s, x):
        s = jnp.tanh(w["decay"] * s + w["embedding"][x])
        return s, s[:2]

    with jax.enable_x64(True):
        w = {"decay": jnp.ones(4), "embedding": jax.random.normal(jax.random.clone(key), (5, 4))}
        tokens = jax.random.randint(jax.random.fold_in(key, 1), (T,), 0, 5)
        check(cell, w, jnp.zeros(4), tokens, jnp.ones((T, 2)), influence="sparse")


def test_a_stream_resumed_from_a_file_is_the_stream_uninterrupted(key):
    params, state, xs, ys = problem(key, min_gru)
    learner, optimizer = RTRL(min_gru, squared), optax.adam(0.01)
    begin = learner.init(params, state, xs[0], ys[0]), optimizer.init(params)
    whole = learn(learner, optimizer, key, *begin, xs, ys)
    part = learn(learner, optimizer, key, *begin, xs[:4], ys[:4])
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, part[:2])
    file.seek(0)
    saved = eqx.tree_deserialise_leaves(file, begin)
    resumed = learn(learner, optimizer, key, *saved, xs[4:], ys[4:])
    jax.tree.map(np.testing.assert_array_equal, resumed[:2], whole[:2])
    other = eqx.tree_at(lambda carry: carry.memory.code, saved[0], jnp.uint32(7))
    with pytest.raises(ValueError, match="saved with other colours"):
        learn(learner, optimizer, key, other, saved[1], xs[4:], ys[4:])
