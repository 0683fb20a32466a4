"""A replayed run is the run, bit by bit; and no damage to a log is ever taken for a record."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prograde as pg
from prograde.replay import LogError, ReplayLog, Update, fingerprint, replay

ESTIMATORS = {
    "rank one": pg.WeightPerturbation(num_tangents=3),
    "dense": pg.WeightPerturbation(pg.Normal(), num_tangents=2, chunk=1),
    "groups": pg.WeightPerturbation(num_tangents=2, num_groups=2),
    "projection": pg.WeightPerturbation(num_tangents=4, combine="projection"),
    "difference": pg.CentralDifference(num_tangents=2, step=0.1),
    "1.5-spsa": pg.CentralDifference(num_tangents=2, step=0.1, curvature_power=0.5),
}
OPTIMIZERS = {"sgd": optax.sgd(1.0), "adam": optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0))}


def loss(params, x, y):
    hidden = jax.nn.relu(x @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2, axis=-1)


def start(key):
    k1, k2, k3 = jax.random.split(key, 3)
    params = {
        "in": jax.random.normal(k1, (12, 16)) / 4,
        "bias": jnp.zeros(16),
        "out": jax.random.normal(k2, (16, 3)) / 4,
        "steps": 3,
    }
    x = jax.random.normal(k3, (8, 12))
    return params, (x, jnp.sin(x[:, :3]))


def run(log, update, params, batch, steps, seed=7):
    derivatives_of = jax.jit(lambda key, params: update.estimator.derivatives(loss, key, params, *batch))
    state = update.init(params)
    for step in range(steps):
        value, _, derivatives = derivatives_of(update.key(seed, step), state.params)
        rate = 0.01 / (1 + step)
        log.append(step, seed, rate, value, derivatives)
        state = update(state, step, seed, rate, derivatives)
    return state


def same_bits(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


@pytest.mark.parametrize(("estimator", "optimizer"), [*((e, "adam") for e in ESTIMATORS), ("rank one", "sgd")])
def test_replay_is_the_run_bit_by_bit(estimator, optimizer, key, tmp_path):
    params, batch = start(key)
    update = Update(ESTIMATORS[estimator], OPTIMIZERS[optimizer])
    with ReplayLog.create(tmp_path / "run.log", params, update) as log:
        state = run(log, update, params, batch, 6)
    assert not same_bits(state.params, params)
    # another Update: nothing that was compiled for the run is used again
    again = replay(ReplayLog.open(tmp_path / "run.log"), Update(update.estimator, update.optimizer), params)
    assert same_bits(again, state)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_derivatives_is_the_estimate(estimator, key):
    params, batch = start(key)
    estimator = ESTIMATORS[estimator]
    whole = jax.jit(lambda: estimator.estimate(loss, key, None, params, *batch))()
    value, _, derivatives = jax.jit(lambda: estimator.derivatives(loss, key, params, *batch))()
    assert derivatives.shape == (estimator.num_tangents, estimator.num_groups, estimator.num_numbers)
    np.testing.assert_allclose(value, whole.value, rtol=1e-6)
    grads = jax.jit(lambda d: estimator.gradient(key, params, d))(derivatives)
    # the curvature of 1.5-SPSA is a difference of differences: its rounding is that of the loss, over the square of the step
    rtol = 1e-3 if estimator == ESTIMATORS["1.5-spsa"] else 1e-5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole.grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


def written(tmp_path, key, steps=4):
    params, batch = start(key)
    update = Update(ESTIMATORS["rank one"], optax.sgd(1.0))
    path = tmp_path / "run.log"
    with ReplayLog.create(path, params, update, {"data": "none"}) as log:
        run(log, update, params, batch, steps)
    return path, params, update, batch


def test_cut_at_every_byte_a_log_keeps_its_whole_records_and_goes_on(key, tmp_path):
    path, *_ = written(tmp_path, key)
    content, whole = path.read_bytes(), ReplayLog.open(path)
    size = whole.records.dtype.itemsize
    first = len(content) - 4 * size
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length < first:
            with pytest.raises(LogError, match="does not begin as a replay log"):
                ReplayLog.open(path)
            continue
        log = ReplayLog.open(path, append=True)
        kept = (length - first) // size
        assert len(log) == kept
        assert log.records.tobytes() == whole.records[:kept].tobytes()
        log.extend(whole.records[kept:])
        log.close()
        assert path.read_bytes() == content  # the torn part is gone, and the same log comes out


def test_no_flipped_bit_is_ever_taken_for_what_was_written(key, tmp_path):
    path, *_ = written(tmp_path, key)
    content, whole = path.read_bytes(), ReplayLog.open(path)
    for i in range(len(content)):
        altered = bytearray(content)
        altered[i] ^= 1 << (i % 8)
        path.write_bytes(altered)
        try:
            log = ReplayLog.open(path)
        except LogError:
            continue
        # only the last record may be taken for one that was being written
        assert len(log) == len(whole) - 1
        assert i >= len(content) - whole.records.dtype.itemsize
        assert log.records.tobytes() == whole.records[:-1].tobytes()


def test_records_that_are_swapped_or_left_out_are_found(key, tmp_path):
    path, *_ = written(tmp_path, key)
    content, size = path.read_bytes(), ReplayLog.open(path).records.dtype.itemsize
    head, records = content[: -4 * size], [content[len(content) - (4 - i) * size :][:size] for i in range(4)]
    for order in ([1, 0, 2, 3], [0, 2, 3], [0, 0, 1, 2, 3], [0, 1, 1, 3]):
        path.write_bytes(head + b"".join(records[i] for i in order))
        with pytest.raises(LogError, match=f"record of step {next(i for i, j in enumerate(order) if i != j)} of"):
            ReplayLog.open(path)


def test_a_continued_run_is_the_uninterrupted_one(key, tmp_path):
    params, batch = start(key)
    update = Update(ESTIMATORS["rank one"], optax.adam(1.0))
    with ReplayLog.create(tmp_path / "whole.log", params, update) as log:
        whole = run(log, update, params, batch, 6)
    with ReplayLog.create(tmp_path / "parts.log", params, update) as log:
        run(log, update, params, batch, 3)
    with ReplayLog.open(tmp_path / "parts.log", append=True) as log:
        state = replay(log, update, params)
        for step in range(len(log), 6):
            value, _, derivatives = update.estimator.derivatives(loss, update.key(7, step), state.params, *batch)
            log.append(step, 7, 0.01 / (1 + step), value, derivatives)
            state = update(state, step, 7, 0.01 / (1 + step), derivatives)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # the derivatives were not compiled here


def test_what_does_not_fit_is_refused_by_name(key, tmp_path):
    path, params, update, _ = written(tmp_path, key)
    with pytest.raises(LogError, match="exists"):
        ReplayLog.create(path, params, update)
    with pytest.raises(LogError, match="no replay log"):
        ReplayLog.open(tmp_path / "nothing.log")
    log = ReplayLog.open(path)
    assert log.header["config"] == {"data": "none"}
    with pytest.raises(LogError, match="opened for reading"):
        log.append(4, 7, 0.1, 2.5, jnp.ones((3, 1, 1)))
    with pytest.raises(LogError, match="fingerprint"):
        replay(log, update, params | {"bias": jnp.full(16, 1e-30)})
    with pytest.raises(LogError, match="is the log of WeightPerturbation"):
        replay(log, Update(ESTIMATORS["dense"], optax.sgd(1.0)), params)
    with pytest.raises(TypeError, match="a seed and a few numbers"):
        Update(pg.Backprop(), optax.sgd(1.0))  # pyright: ignore
    with ReplayLog.open(path, append=True) as log:
        with pytest.raises(LogError, match="step 4 is next, not 3"):
            log.append(3, 7, 0.1, 2.5, jnp.ones((3, 1, 1)))
        with pytest.raises(LogError, match="shape"):
            log.append(4, 7, 0.1, 2.5, jnp.ones((2, 1, 1)))


def test_the_key_of_a_step_is_that_of_its_seed():
    data = lambda key: jax.random.key_data(key).tolist()
    assert data(Update.key(7, 3)) == data(jax.random.fold_in(jax.random.key(7), 3))
    high, low = (int(word) for word in jax.random.key_data(jax.random.split(jax.random.key(1))[1]))
    assert data(Update.key(high << 32 | low, 3)) == data(jax.random.fold_in(jax.random.split(jax.random.key(1))[1], 3))
    with pytest.raises(ValueError, match="seed=-1"):
        Update.key(-1, 0)


def test_fingerprint_sees_every_bit_and_every_name():
    tree = {"a": jnp.zeros(3), "b": jnp.ones((2, 2), jnp.bfloat16), "c": "text"}
    others = [
        tree | {"a": jnp.zeros(3).at[1].set(1e-45)},
        {"a": tree["a"], "d": tree["b"]},
        tree | {"a": jnp.zeros((3, 1))},
    ]
    assert len({fingerprint(t) for t in [tree, *others]}) == 4
    assert fingerprint(tree) == fingerprint(dict(tree))
