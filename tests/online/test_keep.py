"""What is kept of the influence is what the rule says, and nothing that was dropped leaks in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from streams import assert_close, squared

from prograde.lab.models.recurrent import first_state, gru, min_gru, rg_lru, start
from prograde.online import RTRL, OwnLayer, SnAp, learn

T = 7


def masked_rtrl(cell, mask, params, state, xs, ys):
    """J <- mask (A J + B), with dense matrices; the sum of the gradients."""
    flat_w, tree_w = ravel_pytree(params)
    flat_s, tree_s = ravel_pytree(state)

    def of(w, s, x, y):
        s, output = cell(tree_w(w), tree_s(s), x)
        return jnp.mean(squared(output, y)), ravel_pytree(s)[0]

    def step(carry, xy):
        s, influence = carry
        slopes, matrices = jax.jacrev(of, (0, 1))(flat_w, s, *xy)
        grads = slopes[1] @ influence + slopes[0]
        return (of(flat_w, s, *xy)[1], mask * (matrices[1] @ influence + matrices[0])), grads

    begin = flat_s, jnp.zeros((flat_s.size, flat_w.size))
    return tree_w(jnp.sum(lax.scan(step, begin, (xs, ys))[1], 0))


def found(learner, params, state, xs, ys):
    def one(carry, xy):
        carry, _, grads = learner.step(jax.random.key(0), carry, *xy)
        return carry, grads

    grads = lax.scan(one, learner.init(params, state, xs[0], ys[0]), (xs, ys))[1]
    return jax.tree.map(lambda g: jnp.sum(g, 0), grads)


def pattern_after(cell, params, state, x, n):
    """B + A B + ... to n terms, at a random point."""
    flat_w, tree_w = ravel_pytree(params)
    flat_s, tree_s = ravel_pytree(state)
    point = jax.random.normal(jax.random.key(3), flat_s.shape)
    of = lambda w, s: ravel_pytree(cell(tree_w(w), tree_s(s), x)[0])[0]
    b, a = jax.jit(jax.jacfwd(of, (0, 1)))(flat_w, point)
    reach = np.asarray(b) != 0
    for _ in range(n - 1):
        reach = reach | ((np.abs(a) > 0).astype(float) @ reach > 0)
    return reach


def streams(key, batch=(), inputs=3):
    shape = (T, *batch)
    return (
        jax.random.normal(jax.random.fold_in(key, 1), (*shape, inputs)),
        jax.random.normal(jax.random.fold_in(key, 2), (*shape, 2)),
    )


def sparse_rnn(w, s, x):
    """Each unit hears itself and its left neighbour."""
    s = jnp.tanh(w["h"][:, 0] * s + w["h"][:, 1] * jnp.roll(s, 1) + w["x"] @ x)
    return s, s[:2] * w["out"]


def two_layers(cell):
    def stacked(params, state, x):
        low, between = cell(params["low"], state["low"], x)
        high, output = cell(params["high"], state["high"], between)
        return {"low": low, "high": high}, output

    return stacked


@pytest.mark.parametrize(
    ("cell", "n", "batch"),
    [
        ("gru", 1, (2,)),
        ("rnn", 2, ()),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [("gru", 1, ()), ("gru", 2, ()), ("rnn", 1, ())]
        ),
    ],
    ids=str,
)
def test_snap_keeps_what_arises_within_n_steps(key, cell, n, batch):
    with jax.enable_x64(True):
        xs, ys = streams(key, batch)
        if cell == "gru":
            cell, params, state = (
                gru,
                start(gru, jax.random.clone(key), 3, 4, 2),
                first_state(gru, 4, batch),
            )
        else:
            normal = jax.random.normal(jax.random.clone(key), (6, 9))
            cell, state = sparse_rnn, jnp.zeros(6)
            params = {"h": normal[:, :2], "x": normal[:, 6:], "out": jnp.ones(2)}
        mask = pattern_after(cell, params, state, xs[0], n)
        expected = jax.jit(lambda p: masked_rtrl(cell, mask, p, state, xs, ys))(params)
        learner = RTRL(cell, squared, keep=SnAp(n))
        assert_close(jax.jit(lambda p: found(learner, p, state, xs, ys))(params), expected, 1e-10)
        all_kept = np.array_equal(mask, pattern_after(cell, params, state, xs[0], 9))
        assert all_kept == (cell is gru and n == 2)
        assert ("biased" in learner.plan(params, state, xs[0]).reason) == (not all_kept)
        assert RTRL(cell, squared, keep=SnAp(20)).plan(params, state, xs[0]).reason == ""


@pytest.mark.parametrize(
    "inner",
    [min_gru, *(pytest.param(cell, marks=pytest.mark.long) for cell in (rg_lru, gru))],
    ids=lambda cell: cell.__name__,
)
def test_own_layer_drops_what_crosses_layers_and_nothing_else(key, inner):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.clone(key))
        params = {"low": start(inner, keys[0], 3, 4, 4), "high": start(inner, keys[1], 4, 5, 2)}
        state = {"low": first_state(inner, 4), "high": first_state(inner, 5)}
        cell, (xs, ys) = two_layers(inner), streams(key)
        of_state = ravel_pytree({k: jnp.full_like(s, k == "low") for k, s in state.items()})[0]
        by_name = lambda state, param: state.split("'")[1] == param.split("'")[1]
        # the readout of the low layer first reaches the state of the high one
        first = lambda path: path[0].key == "low" and path[1].key not in ("out", "bias")
        for keep, is_low in ((by_name, lambda path: path[0].key == "low"), (OwnLayer(), first)):
            flags = lambda path, w, is_low=is_low: jnp.full_like(w, is_low(path))
            of_params = ravel_pytree(jax.tree_util.tree_map_with_path(flags, params))[0]
            mask = of_state[:, None] == of_params[None]
            expected = jax.jit(lambda p, m=mask: masked_rtrl(cell, m, p, state, xs, ys))(params)
            learner = RTRL(cell, squared, keep=keep)
            grads = jax.jit(lambda p, learner=learner: found(learner, p, state, xs, ys))(params)
            assert_close(grads, expected, 1e-10)
            plan = learner.plan(params, state, xs[0])
            assert "biased" in plan.reason


@pytest.mark.long
def test_layers_of_long_memories_learn_by_their_own_traces_without_diverging(key):
    """Four layers with half-lives of 1 to 500, on a stream of letters where each follows another.

    A kept trace decays as its unit does, so it stays bounded by that unit's memory.
    """
    layers, units, letters, steps = 4, 32, 16, 4000
    sizes = [(letters, units), *[(units, units)] * (layers - 2), (units, letters)]
    params = {
        str(i): start(min_gru, jax.random.fold_in(key, i), inputs, units, outputs, 500.0)
        for i, (inputs, outputs) in enumerate(sizes)
    }
    state = {str(i): first_state(min_gru, units) for i in range(layers)}

    def cell(params, state, x):
        after = {}
        for i in map(str, range(layers)):
            after[i], x = min_gru(params[i], state[i], x)
        return after, x

    loss = lambda output, target: -jax.nn.log_softmax(output)[target]
    follows = jax.random.permutation(jax.random.fold_in(key, 8), letters)
    noise = jax.random.randint(jax.random.fold_in(key, 9), (steps + 1,), 0, letters)
    stream = lax.scan(
        lambda s, n: (lambda s: (s, s))(jnp.where(n < 2, n, follows[s])), jnp.int32(0), noise
    )[1]
    learner, optimizer = RTRL(cell, loss, keep=OwnLayer()), optax.adam(1e-3)
    xs = jax.nn.one_hot(stream[:-1], letters)
    carry = learner.init(params, state, xs[0], stream[1])
    opt_state = optimizer.init(params)
    carry, _, losses = learn(learner, optimizer, key, carry, opt_state, xs, stream[1:])
    assert bool(jnp.all(jnp.isfinite(losses)))
    assert losses[-500:].mean() < 0.6 * losses[:100].mean()
    largest = max(float(jnp.abs(j).max()) for j in jax.tree.leaves(carry.memory.columns))
    assert largest < 2000
