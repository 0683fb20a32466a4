"""Online learners give what backpropagation through time gives, in every way they can be used."""

import io
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import prograde as pg
from prograde.online import DODGE, RTRL, UORO, Momentum, StreamError, TruncatedBackprop, learn
from prograde.testing import assert_unbiased

T = 12


def gru(params, state, x):
    """A gated cell in a dict, with a counter in its state."""
    h = state["h"]
    from_x, from_h = (
        jnp.split(x @ params["x"] + params["b"], 3, -1),
        jnp.split(h @ params["h"], 3, -1),
    )
    z, r = jax.nn.sigmoid(from_x[0] + from_h[0]), jax.nn.sigmoid(from_x[1] + from_h[1])
    h = (1 - z) * jnp.tanh(from_x[2] + r * from_h[2]) + z * h
    return {"h": h, "steps": state["steps"] + 1}, h @ params["out"]


def squared(output, target):
    return jnp.sum((output - target) ** 2, -1)  # one for each stream where there are several


def problem(key, batch=(), units=5, dtype=jnp.float32):
    """(params, state, inputs, targets) of a stream."""
    ks = jax.random.split(jax.random.clone(key), 6)
    normal = lambda k, *shape: jax.random.normal(k, shape, dtype) / shape[0] ** 0.5
    params = {
        "x": normal(ks[0], 3, 3 * units),
        "h": normal(ks[1], units, 3 * units),
        "b": normal(ks[2], 3 * units),
        "out": normal(ks[3], units, 2),
    }
    state = {"h": jnp.zeros((*batch, units), dtype), "steps": jnp.zeros((), jnp.int32)}
    return (
        params,
        state,
        jax.random.normal(ks[4], (T, *batch, 3), dtype),
        jax.random.normal(ks[5], (T, *batch, 2), dtype),
    )


def through_time(params, state, inputs, targets):
    """The sum of the losses, as a function that reverse mode unrolls."""
    step = lambda s, xy: (lambda s, output: (s, jnp.mean(squared(output, xy[1]))))(
        *gru(params, s, xy[0])
    )
    return jnp.sum(lax.scan(step, state, (inputs, targets))[1])


def sum_of_gradients(learner, key, params, state, inputs, targets):
    """The gradients of all steps at the same parameters, summed; and the last carry."""
    carry = learner.init(params, state, inputs[0], targets[0])

    def one(carry, now):
        carry, _, grads = learner.step(key, carry, *now)
        return carry, grads

    carry, grads = lax.scan(one, carry, (inputs, targets))
    return jax.tree.map(lambda g: jnp.sum(g, 0), grads), carry


def assert_close(a, b, rtol):
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one stream", "three streams"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_rtrl_equals_backprop_through_time(key, batch, chunk):
    """One stream goes by the Jacobian of the state, several by a tangent for each parameter."""
    with jax.enable_x64(True):
        params, state, inputs, targets = problem(key, batch, dtype=jnp.float64)
        found, carry = sum_of_gradients(
            RTRL(gru, squared, chunk=chunk), key, params, state, inputs, targets
        )
        assert_close(found, jax.grad(through_time)(params, state, inputs, targets), 1e-11)
        assert int(carry.state["steps"]) == int(carry.step) == T


def test_rtrl_carries_the_derivative_of_the_state(key):
    params, state, inputs, targets = problem(key)
    _, carry = sum_of_gradients(RTRL(gru, squared), key, params, state, inputs, targets)
    last = lambda params: lax.scan(lambda s, x: (gru(params, s, x)[0], None), state, inputs)[0]["h"]
    expected = jax.jacrev(last)(params)
    expected = jnp.concatenate([expected[k].reshape(5, -1) for k in sorted(params)], axis=1)
    np.testing.assert_allclose(carry.memory, expected.T, atol=1e-5)


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
    _, _, grads = learner.step(key, carry, inputs[0], targets[0])
    assert grads.activation is None


@pytest.mark.parametrize("window", [T, 5])
def test_dodge_along_the_whole_basis_equals_backprop_through_each_window(key, window):
    """With a window as long as the stream that is RTRL."""
    params, state, inputs, targets = problem(key)
    n = sum(w.size for w in jax.tree.leaves(params))
    learner = DODGE(gru, squared, window=window, directions=pg.Basis(), num_tangents=n)
    found, _ = sum_of_gradients(learner, key, params, state, inputs, targets)
    expected = jax.tree.map(jnp.zeros_like, params)
    for start in range(0, T, window):
        part = slice(start, start + window)
        expected = jax.tree.map(
            jnp.add, expected, jax.grad(through_time)(params, state, inputs[part], targets[part])
        )
        state = lax.scan(lambda s, x: (gru(params, s, x)[0], None), state, inputs[part])[0]
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize("distribution", [pg.Normal(), pg.LowRank(1)], ids=repr)
def test_dodge_is_the_forward_gradient_of_its_window(key, distribution):
    """The same directions through the unrolled window, as one forward run."""
    params, state, inputs, targets = problem(key, units=8)
    learner = DODGE(gru, squared, window=T, directions=distribution, num_tangents=3)
    first = jax.random.fold_in(key, 0)
    forward = pg.WeightPerturbation(distribution, num_tangents=3)
    expected = forward.estimate(through_time, first, None, params, state, inputs, targets).grads
    found, _ = sum_of_gradients(learner, key, params, state, inputs, targets)
    assert_close(found, expected, 1e-5)


def test_a_guess_by_truncated_backprop_is_the_gradient_of_the_past_window(key):
    params, state, inputs, targets = problem(key)
    learner = DODGE(gru, squared, window=T // 2, directions=TruncatedBackprop(), num_tangents=1)
    _, carry = sum_of_gradients(learner, key, params, state, inputs, targets)
    guess = jax.grad(through_time)(params, state, inputs[: T // 2], targets[: T // 2])
    assert_close(jax.tree.map(lambda v: v[0], carry.memory.directions), guess, 1e-5)


@pytest.mark.parametrize("length", [1e-5, 1.0, 1e5])
def test_a_projection_onto_a_guess_reaches_the_gradient_that_lies_in_its_span(key, length):
    """The directions are the true gradient of the coming window, of any length, and rubbish."""
    params, state, inputs, targets = problem(key)
    gradient = jax.grad(through_time)(params, state, inputs, targets)
    directions = lambda key, past: jax.tree.map(
        lambda g: jnp.stack([length * g, jnp.cos(jnp.arange(g.size)).reshape(g.shape)]), gradient
    )
    learner = DODGE(gru, squared, window=T, directions=directions, num_tangents=2)
    found, _ = sum_of_gradients(learner, key, params, state, inputs, targets)
    assert_close(found, gradient, 1e-4)


def test_momentum_is_the_running_mean_of_the_estimates(key):
    params, state, inputs, targets = problem(key)
    learner = DODGE(gru, squared, window=4, directions=Momentum(0.5), num_tangents=2)
    carry, mean = learner.init(params, state, inputs[0], targets[0]), None
    for start in range(0, T, 4):
        total = jax.tree.map(jnp.zeros_like, params)
        for t in range(start, start + 4):
            carry, _, grads = learner.step(key, carry, inputs[t], targets[t])
            total = jax.tree.map(lambda a, g: a + g / 4, total, grads)
        if start:
            assert_close(jax.tree.map(lambda v: v[0], carry.memory.directions), mean, 1e-5)
        mean = total if mean is None else jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, mean, total)


@dataclass(frozen=True)
class Online(pg.Estimator):
    """The sum of a learner's gradients over a stream estimates that of the sum of the losses."""

    learner: pg.online.OnlineLearner

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        grads, _ = sum_of_gradients(self.learner, key, params, *args)
        return pg.Estimate(jnp.zeros(()), None, grads, None, state)


@pytest.mark.parametrize(
    "learner",
    [
        UORO(gru, squared),
        UORO(gru, squared, num_products=4),
        DODGE(gru, squared, window=T, num_tangents=16),
    ],
    ids=["UORO", "UORO with 4 products", "DODGE"],
)
def test_unbiased(key, learner):
    """The projection on the gradient to 5 %, and each coordinate; error rates 1e-6 each."""
    params, state, inputs, targets = problem(key, units=2)
    arguments = (params, state, inputs[:5], targets[:5])
    assert_unbiased(Online(learner), through_time, jax.random.fold_in(key, 1), *arguments)


def influence_balancing(units=23, positive=10):
    """The task on which truncated backprop has the wrong sign (arXiv 1702.05043, section 5.1).

    s <- A s + theta (1, .., 1, -1, .., -1), with 1/2 on the diagonal of A and above. The loss is
    (s_1 - 1)^2 / 2. At rest
    s_1 = 2 (positive - negative) theta.
    """
    a = 0.5 * (jnp.eye(units) + jnp.eye(units, k=1))
    direction = jnp.where(jnp.arange(units) < positive, 1.0, -1.0)

    def cell(theta, s, _):
        s = a @ s + theta * direction
        return s, s[0]

    return cell, lambda output, _: (output - 1) ** 2 / 2, 2.0 * (2 * positive - units)


@pytest.mark.parametrize(("learner", "steps"), [(RTRL, 5000), (UORO, 40_000)], ids=["RTRL", "UORO"])
def test_influence_balancing_is_learned_where_truncated_backprop_has_the_wrong_sign(
    key, learner, steps
):
    cell, loss, gain = influence_balancing()
    stream = jnp.zeros((steps, 1))
    online, optimizer = learner(cell, loss), optax.sgd(1e-4 if learner is RTRL else 2e-5)
    theta = jnp.array(0.5)
    carry = online.init(theta, jnp.zeros(23))
    carry, _, losses = learn(online, optimizer, key, carry, optimizer.init(theta), stream, stream)
    assert float(jnp.mean(losses[-100:])) < 1e-2
    assert float(carry.params) == pytest.approx(1 / gain, abs=0.02)
    # at rest with theta = 0.5 the loss falls where theta does; ten steps back do not show it
    rest = lax.scan(lambda s, x: (cell(theta, s, x)[0], None), jnp.zeros(23), stream[:200])[0]
    truncated = jax.grad(
        lambda th: loss(lax.scan(lambda s, x: cell(th, s, x), rest, stream[:10])[1][-1], 0.0)
    )(theta)
    assert float(truncated) * (0.5 * gain - 1) * gain < 0


LEARNERS = [
    RTRL(gru, squared),
    UORO(gru, squared),
    DODGE(gru, squared, window=7, directions=pg.LowRank(1), num_tangents=2),
    DODGE(gru, squared, window=4, directions=TruncatedBackprop(), num_tangents=2),
    DODGE(gru, squared, window=4, directions=Momentum(), num_tangents=2),
]
NAMES = ["RTRL", "UORO", "DODGE", "DODGE with truncated backprop", "DODGE with momentum"]


@pytest.mark.parametrize("learner", LEARNERS, ids=NAMES)
def test_a_stream_resumed_from_a_file_is_the_stream_uninterrupted(key, learner):
    params, state, inputs, targets = problem(key)
    optimizer = optax.adam(0.01)
    begin = (learner.init(params, state, inputs[0], targets[0]), optimizer.init(params))
    whole = learn(learner, optimizer, key, *begin, inputs, targets)
    carry, opt_state, before = learn(learner, optimizer, key, *begin, inputs[:5], targets[:5])
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (carry, opt_state))
    file.seek(0)
    saved = eqx.tree_deserialise_leaves(file, begin)
    resumed = learn(learner, optimizer, key, *saved, inputs[5:], targets[5:])
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


@pytest.mark.parametrize("learner", LEARNERS, ids=NAMES)
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
    [*((learner, "input") for learner in LEARNERS), (LEARNERS[0], "target")],
    ids=[*NAMES, "RTRL, target"],
)
def test_a_stream_stops_before_what_is_not_finite(key, learner, where):
    params, state, inputs, targets = problem(key)
    optimizer = optax.sgd(0.05)
    begin = (learner.init(params, state, inputs[0], targets[0]), optimizer.init(params))
    before = learn(learner, optimizer, key, *begin, inputs[:6], targets[:6])
    spoil = lambda x: x.at[6, 1].set(jnp.nan)
    bad = (spoil(inputs), targets) if where == "input" else (inputs, spoil(targets))
    with pytest.raises(
        StreamError, match=rf"step 6 of the chunk, 6 of the stream: {where} is not finite"
    ) as caught:
        learn(learner, optimizer, key, *begin, *bad)
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


def test_a_cell_with_a_loop_of_unknown_length_is_learned_forward_and_refused_by_uoro(key):
    """s <- sqrt(s + a x^2) by Newton's method, which iterates until it has converged."""

    def cell(a, s, x):
        square = s + a * x**2 + 1.0
        root = lax.while_loop(
            lambda r: jnp.abs(r * r - square) > 1e-5, lambda r: (r + square / r) / 2, square
        )
        return root, root

    closed = lambda a, s, x: (lambda root: (root, root))(jnp.sqrt(s + a * x**2 + 1.0))
    loss = lambda output, target: (output - target) ** 2
    inputs = jax.random.normal(key, (T,))
    total = lambda a: jnp.sum(
        loss(lax.scan(lambda s, x: closed(a, s, x), jnp.array(1.0), inputs)[1], 2.0)
    )
    a = jnp.array(0.7)
    found, _ = sum_of_gradients(RTRL(cell, loss), key, a, jnp.array(1.0), inputs, jnp.full(T, 2.0))
    np.testing.assert_allclose(found, jax.grad(total)(a), rtol=1e-4)
    learner = UORO(cell, loss)
    with pytest.raises(ValueError, match="Use DODGE or RTRL, which are forward only"):
        learner.step(key, learner.init(a, jnp.array(1.0)), inputs[0], 2.0)


@pytest.mark.parametrize("learner", LEARNERS[:3], ids=NAMES[:3])
def test_bfloat16_cells_are_learned_in_bfloat16(key, learner):
    params, state, inputs, targets = problem(key, dtype=jnp.bfloat16)
    carry = learner.init(params, state)
    carry, _, grads = jax.jit(learner.step)(key, carry, inputs[0], targets[0])
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


def test_uoro_forgets_with_the_state(key):
    """After a reset no derivative and no noise goes back: the next gradient is exact."""

    def cell(params, state, x):
        following, output = gru(params, state, x)
        return following | {"h": jnp.where(x[0] > 100, 0.0, following["h"])}, output

    params, state, inputs, targets = problem(key)
    inputs = inputs.at[7, 0].set(1000.0)
    step = {}
    for learner in (UORO(cell, squared), RTRL(cell, squared)):
        carry = learner.init(params, state)
        for t in range(9):
            carry, _, grads = learner.step(key, carry, inputs[t], targets[t])
        step[type(learner)] = grads
    assert_close(step[UORO], step[RTRL], 1e-5)


def test_steps_with_one_key_draw_anew(key):
    """The same signs at every step would leave the cross terms of UORO in its mean."""
    params, state, inputs, targets = problem(key)
    learner = UORO(gru, squared)
    carry, _, _ = learner.step(key, learner.init(params, state), inputs[0], targets[0])
    again, _, _ = learner.step(key, carry, inputs[0], targets[0])
    assert not np.array_equal(jnp.sign(carry.memory[0]), jnp.sign(again.memory[0]))


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


def test_a_cell_without_input_is_driven_by_its_targets(key):
    learner, optimizer = RTRL(lambda a, s, _: (a * s, a * s), squared_error), optax.sgd(0.01)
    a, state = jnp.array(0.5), jnp.array(1.0)
    _, _, losses = learn(
        learner, optimizer, key, learner.init(a, state), optimizer.init(a), None, jnp.ones(20)
    )
    assert losses.shape == (20,)


def squared_error(output, target):
    return (output - target) ** 2


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("learner", LEARNERS, ids=NAMES)
def test_a_step_promotes_nothing(key, learner):
    params, state, inputs, targets = problem(key)
    carry = learner.init(params, state, inputs[0], targets[0])
    jax.eval_shape(learner.step, key, carry, inputs[0], targets[0])


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
