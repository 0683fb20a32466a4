"""A replayed run is the run, bit by bit; and no damage to a log is ever taken for a record."""

import itertools

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
OPTIMIZERS = {
    "sgd": optax.sgd(1.0),
    "adam": optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0)),
}


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
    derivatives_of = jax.jit(
        lambda key, params: update.estimator.derivatives(loss, key, params, *batch)
    )
    state = update.init(params)
    for step in range(steps):
        value, _, derivatives = derivatives_of(update.key(seed, step), state.params)
        rate = 0.01 / (1 + step)
        log.append(step, seed, rate, value, derivatives)
        state = update(state, step, seed, rate, derivatives)
    return state


def same_bits(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


@pytest.mark.parametrize(
    ("estimator", "optimizer"), [*((e, "adam") for e in ESTIMATORS), ("rank one", "sgd")]
)
def test_replay_is_the_run_bit_by_bit(estimator, optimizer, key, tmp_path):
    params, batch = start(key)
    update = Update(ESTIMATORS[estimator], OPTIMIZERS[optimizer])
    with ReplayLog.create(tmp_path / "run.log", params, update) as log:
        state = run(log, update, params, batch, 6)
    assert not same_bits(state.params, params)
    # another Update: nothing that was compiled for the run is used again
    again = replay(
        ReplayLog.open(tmp_path / "run.log"), Update(update.estimator, update.optimizer), params
    )
    assert same_bits(again, state)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_derivatives_is_the_estimate(estimator, key):
    params, batch = start(key)
    estimator = ESTIMATORS[estimator]
    whole = jax.jit(lambda: estimator.estimate(loss, key, None, params, *batch))()
    value, _, derivatives = jax.jit(lambda: estimator.derivatives(loss, key, params, *batch))()
    assert derivatives.shape == (
        estimator.num_tangents,
        estimator.num_groups,
        estimator.num_numbers,
    )
    np.testing.assert_allclose(value, whole.value, rtol=1e-6)
    grads = jax.jit(lambda d: estimator.gradient(key, params, d))(derivatives)
    # the curvature of 1.5-SPSA is a difference of differences: its rounding is that of the loss, over the square of the step
    rtol = 1e-3 if estimator == ESTIMATORS["1.5-spsa"] else 1e-5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole.grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


BASE = {"bias": jnp.zeros(16)}
SGD = {n: Update(pg.WeightPerturbation(num_tangents=n), optax.sgd(1.0)) for n in (1, 3)}


def steps(count, rates="constant", seeds="constant", num_tangents=3):
    """Arguments of `append`, with any bits for floats: among them are NaNs, infinities and numbers that are not normal."""
    bits = np.random.default_rng(0).integers(0, 2**32, (count, 1 + num_tangents), np.uint32)
    bits[:2, 0] = 0x7F800001, 0x00000001  # a signaling NaN, and the smallest number
    floats = bits.view(np.float32)
    rate = {
        "constant": lambda i: 0.01,
        "steps": lambda i: 0.1 ** (1 + i // 3),
        "schedule": lambda i: 0.01 / (1 + i),
    }
    seed = {
        "constant": lambda i: 2**64 - 1,
        "steps": lambda i: 7 + i // 4,
        "each": lambda i: 2**40 * i,
    }
    return [
        (i, seed[seeds](i), rate[rates](i), floats[i, 0], floats[i, 1:].reshape(num_tangents, 1, 1))
        for i in range(count)
    ]


def written(path, entries, blocks, num_tangents=3):
    """Writes blocks of so many steps each: where the header and each of the blocks end in the file."""
    assert sum(blocks) == len(entries)
    entries = iter(entries)
    with ReplayLog.create(path, BASE, SGD[num_tangents], {"data": "none"}) as log:
        ends = [path.stat().st_size]
        for count in blocks:
            for _ in range(count):
                log.append(*next(entries))
            log.flush()
            ends.append(path.stat().st_size)
    return ends


@pytest.mark.parametrize("seeds", ["constant", "steps", "each"])
@pytest.mark.parametrize("rates", ["constant", "steps", "schedule"])
def test_what_is_read_is_what_was_appended_bit_by_bit(rates, seeds, tmp_path):
    entries = steps(120, rates, seeds)
    with ReplayLog.create(tmp_path / "run.log", BASE, SGD[3]) as log:
        for entry in entries:
            log.append(*entry)
    found = ReplayLog.open(tmp_path / "run.log")
    assert found.records.tobytes() == log.records.tobytes()
    for i, (step, seed, rate, value, derivatives) in enumerate(entries):
        record = found.records[i]
        assert (record["step"], record["seed"]) == (step, seed)
        floats = np.asarray(
            [record["rate"], record["value"], *record["derivatives"].ravel()], np.float32
        )
        assert (
            floats.tobytes()
            == np.asarray([rate, value, *derivatives.ravel()], np.float32).tobytes()
        )


def test_a_rate_that_changes_its_sign_only_is_not_the_same(tmp_path):
    entries = [
        (step, 7, rate, 1.0, np.ones((3, 1, 1), np.float32))
        for step, rate in enumerate([0.0, -0.0, 0.0])
    ]
    written(tmp_path / "run.log", entries, (3,))
    assert np.signbit(ReplayLog.open(tmp_path / "run.log").records["rate"]).tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("rates", "size", "bound"), [("constant", 8_800, 10_000), ("schedule", 12_720, 14_000)]
)
def test_a_thousand_steps_of_one_derivative_take_what_is_said(rates, size, bound, tmp_path):
    with ReplayLog.create(
        tmp_path / "run.log", BASE, SGD[1], {"run": "low-rank-paper-seed0"}
    ) as log:
        header = log.path.stat().st_size
        for entry in steps(1000, rates, num_tangents=1):
            log.append(*entry)
    assert log.path.stat().st_size - header == size  # the figures in the documentation
    assert log.path.stat().st_size <= bound


def test_digests_and_records_do_not_depend_on_the_blocks(tmp_path):
    entries = steps(10, "steps", "steps")
    for name, blocks in {"one": (10,), "few": (3, 6, 1), "each": (1,) * 10}.items():
        written(tmp_path / name, entries, blocks)
    one, few, each = (ReplayLog.open(tmp_path / name) for name in ("one", "few", "each"))
    assert len({log.path.stat().st_size for log in (one, few, each)}) == 3
    assert one.records.tobytes() == few.records.tobytes() == each.records.tobytes()
    assert len({one.digest(i) for i in range(11)}) == 11
    for i in range(11):
        assert one.digest(i) == few.digest(i) == each.digest(i)
    # a worker that was behind takes the rest from another
    written(tmp_path / "behind", entries[:4], (4,))
    with ReplayLog.open(tmp_path / "behind", append=True) as behind:
        behind.extend(few.records[4:])
        assert behind.digest(10) == few.digest(10)
    assert ReplayLog.open(tmp_path / "behind").records.tobytes() == one.records.tobytes()


def test_each_digest_is_of_all_a_record_holds(tmp_path):
    entries = steps(3)
    written(tmp_path / "run.log", entries, (3,))
    digests = {ReplayLog.open(tmp_path / "run.log").digest(3)}
    step, seed, rate, value, derivatives = entries[1]
    others = [
        (step, seed - 1, rate, value, derivatives),
        (step, seed, -rate, value, derivatives),
        (step, seed, rate, -value, derivatives),
        (step, seed, rate, value, -derivatives),
    ]
    for i, other in enumerate(others):
        written(tmp_path / f"{i}.log", [entries[0], other, entries[2]], (3,))
        digests.add(ReplayLog.open(tmp_path / f"{i}.log").digest(3))
    assert len(digests) == 5


BLOCKS = (3, 1, 2, 4)
KINDS = pytest.mark.parametrize(
    ("rates", "seeds"), [("constant", "constant"), ("schedule", "each")]
)


@KINDS
def test_cut_at_every_byte_a_log_keeps_its_whole_blocks_and_goes_on(rates, seeds, tmp_path):
    path, entries = tmp_path / "run.log", steps(10, rates, seeds)
    ends = written(path, entries, BLOCKS)
    content, whole = path.read_bytes(), ReplayLog.open(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length < ends[0]:
            with pytest.raises(LogError, match="does not begin as a replay log"):
                ReplayLog.open(path)
            continue
        blocks = sum(end <= length for end in ends[1:])
        kept = sum(BLOCKS[:blocks])
        assert ReplayLog.open(path).records.tobytes() == whole.records[:kept].tobytes()
        assert path.stat().st_size == length  # read only: left as it is
        log = ReplayLog.open(path, append=True)
        assert len(log) == kept
        assert path.read_bytes() == content[: ends[blocks]]  # the torn part is gone
        if length == len(content) - 1 or length % 7 == 0:  # waiting for the disk takes a while
            log.extend(whole.records[kept:])
            assert ReplayLog.open(path).records.tobytes() == whole.records.tobytes()
        log.close()


@KINDS
def test_no_flipped_bit_is_ever_taken_for_what_was_written(rates, seeds, tmp_path):
    path = tmp_path / "run.log"
    ends = written(path, steps(10, rates, seeds), BLOCKS)
    content, whole = path.read_bytes(), ReplayLog.open(path)
    head = ends[-2] + 20  # of the last block: says where it ends, and so that it is the last
    for i, bits in itertools.product(range(len(content)), (0x01, 0x10, 0x80, 0xFF)):
        altered = bytearray(content)
        altered[i] ^= bits
        path.write_bytes(altered)
        if i >= head:  # as if it had not been written to its end
            assert ReplayLog.open(path).records.tobytes() == whole.records[: -BLOCKS[-1]].tobytes()
            continue
        with pytest.raises(LogError) as error:
            ReplayLog.open(path)
        if i < ends[0]:
            continue
        # the message says which steps, and how to keep those before
        block = sum(end <= i for end in ends[1:])
        first, last = sum(BLOCKS[:block]), sum(BLOCKS[: block + 1]) - 1
        until = "and following" if i < ends[block] + 20 else f"to {last}"
        assert f"block of steps {first} {until} was altered" in str(error.value)
        assert f"The first {first} steps are whole" in str(error.value)
        assert f"its first {ends[block]} bytes" in str(error.value)
    path.write_bytes(content[: ends[2]])
    assert ReplayLog.open(path).records.tobytes() == whole.records[: sum(BLOCKS[:2])].tobytes()


def test_blocks_that_are_swapped_or_left_out_are_found(tmp_path):
    path = tmp_path / "run.log"
    ends = written(path, steps(8), (2, 2, 2, 2))
    content = path.read_bytes()
    blocks = [content[a:b] for a, b in itertools.pairwise(ends)]
    for order in ([1, 0, 2, 3], [0, 2, 3], [0, 0, 1, 2, 3], [0, 1, 1, 3], [0, 1, 3]):
        path.write_bytes(content[: ends[0]] + b"".join(blocks[i] for i in order))
        first = 2 * next(i for i, j in enumerate(order) if i != j)
        with pytest.raises(LogError, match=f"block of steps {first} and following"):
            ReplayLog.open(path)


def test_a_block_of_another_run_is_found(tmp_path):
    ends = written(tmp_path / "run.log", steps(4), (2, 2))
    written(tmp_path / "other.log", steps(4, "steps", "each"), (2, 2))
    content, other = (tmp_path / "run.log").read_bytes(), (tmp_path / "other.log").read_bytes()
    (tmp_path / "run.log").write_bytes(content[: ends[1]] + other[-(len(content) - ends[1]) :])
    with pytest.raises(LogError, match="block of steps 2 and following"):
        ReplayLog.open(tmp_path / "run.log")


def test_a_log_of_another_format_is_refused_by_its_number(tmp_path):
    path = tmp_path / "run.log"
    written(path, steps(4), (4,))
    path.write_bytes(path.read_bytes().replace(b"replay log 2\n", b"replay log 1\n"))
    for append in (False, True):
        with pytest.raises(
            LogError,
            match="is a replay log of format 1, and this version of prograde knows only format 2",
        ):
            ReplayLog.open(path, append)


def test_a_loss_that_failed_leaves_the_log_whole(tmp_path):
    class Failed:
        def __array__(self, *_, **__):
            raise RuntimeError("a worker is gone")

    entries = steps(4)
    log = ReplayLog.create(tmp_path / "run.log", BASE, SGD[3], {"data": "none"})
    for entry in entries[:2]:
        log.append(*entry)
    log.append(2, 7, 0.1, Failed(), entries[2][-1])  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a worker is gone"):
            log.flush()
    log._waiting.pop()
    for entry in entries[2:]:
        log.append(*entry)
    log.close()
    written(tmp_path / "undisturbed.log", entries, (4,))
    assert ReplayLog.open(log.path).digest(4) == ReplayLog.open(
        tmp_path / "undisturbed.log"
    ).digest(4)


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
            value, _, derivatives = update.estimator.derivatives(
                loss, update.key(7, step), state.params, *batch
            )
            log.append(step, 7, 0.01 / (1 + step), value, derivatives)
            state = update(state, step, 7, 0.01 / (1 + step), derivatives)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-6
        )  # the derivatives were not compiled here


def test_what_does_not_fit_is_refused_by_name(key, tmp_path):
    params, batch = start(key)
    update, path = SGD[3], tmp_path / "run.log"
    with ReplayLog.create(path, params, update, {"data": "none"}) as log:
        run(log, update, params, batch, 4)
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
    assert data(Update.key(high << 32 | low, 3)) == data(
        jax.random.fold_in(jax.random.split(jax.random.key(1))[1], 3)
    )
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
