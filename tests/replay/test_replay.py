"""A replayed run is the run, bit by bit; another estimator, optimizer or start is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import combinations
from golden_runs import GOLDEN, RUNS, flat, loss, numbers, start

import prograde as pg
from prograde.replay import LogError, ReplayLog, Update, replay

ESTIMATORS = {
    "rank one": pg.WeightPerturbation(num_tangents=3),
    "dense": pg.WeightPerturbation(pg.Normal(), num_tangents=2, chunk=1),
    "groups": pg.WeightPerturbation(num_tangents=2, num_groups=2),
    "projection": pg.WeightPerturbation(num_tangents=4, combine="projection"),
    "difference": pg.CentralDifference(num_tangents=2, step=0.1),
    "1.5-spsa": pg.CentralDifference(num_tangents=2, step=0.1, curvature_power=0.5),
}
X = jnp.asarray(numbers(8, 6, stream=3))
BATCH = X, jnp.sin(X[:, :3])
PARAMS = start("rank one")


@functools.cache
def derivatives_of(estimator):
    return jax.jit(lambda key, params: estimator.derivatives(loss, key, params, *BATCH))


def run(log, update, state, until, seed=7):
    """Steps from wherever the log ends."""
    for step in range(len(log), until):
        key = update.key(seed, step)
        value, _, derivatives = derivatives_of(update.estimator)(key, state.params)
        rate = 0.01 / (1 + step)
        log.append(step, seed, rate, value, derivatives)
        state = update(state, step, seed, rate, derivatives)
    return state


def same_bits(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


QUICK = {"rank-one-sgd", "normal-by-chunks", "groups", "projection", "difference-with-curvature"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in RUNS]
)
def test_logs_of_earlier_versions_are_replayed_to_the_same_parameters(name):
    """To 2e-7: another compiler or processor rounds the sums of a step in another order."""
    log = ReplayLog.open(GOLDEN / f"{name}.log")
    assert (log.fingerprints, log.planned, log.header["config"]) == ({}, None, {"run": name})
    assert log.records["seed"].tolist() == [2**40 + 7] * 5
    found = flat(replay(log, Update(*RUNS[name]), start(name)).params)
    with np.load(GOLDEN / "ends.npz") as ends:
        np.testing.assert_allclose(found, ends[name], rtol=0, atol=2e-7)
        assert np.abs(ends[name] - flat(start(name))).max() > 1e-3


def test_a_log_of_an_earlier_version_is_continued(tmp_path):
    (tmp_path / "run.log").write_bytes((GOLDEN / "rank-one-sgd.log").read_bytes())
    before = ReplayLog.open(tmp_path / "run.log")
    update = Update(*RUNS["rank-one-sgd"])
    with ReplayLog.open(tmp_path / "run.log", append=True) as log:
        state = run(log, update, replay(log, update, PARAMS), 7)
    found = ReplayLog.open(tmp_path / "run.log")
    assert found.records[:5].tobytes() == before.records.tobytes()
    assert same_bits(replay(found, update, PARAMS).params, state.params)


@pytest.mark.parametrize("estimator", ["rank one", "1.5-spsa"])
def test_replay_is_the_run_bit_by_bit(estimator, tmp_path):
    update = Update(ESTIMATORS[estimator], optax.adam(1.0))
    with ReplayLog.create(tmp_path / "run.log", PARAMS, update, steps=6) as log:
        log.record_parameters(PARAMS)
        state = run(log, update, update.init(PARAMS), 4)
        log.record_parameters(state.params)
        state = run(log, update, state, 6)
        log.finish(state.params)
    assert not same_bits(state.params, PARAMS)
    # another Update: nothing that was compiled for the run is used again
    log, again = ReplayLog.open(log.path), Update(update.estimator, update.optimizer)
    assert sorted(log.fingerprints) == [0, 4, 6]
    assert same_bits(replay(log, again, PARAMS), state)


@combinations(lambda estimator: estimator not in ("dense", "difference"), estimator=ESTIMATORS)
def test_gradient_of_derivatives_is_the_estimate(estimator, key):
    estimator = ESTIMATORS[estimator]

    @jax.jit
    def both(key):
        value, _, derivatives = estimator.derivatives(loss, key, PARAMS, *BATCH)
        grads = estimator.gradient(key, PARAMS, derivatives)
        return (
            value,
            derivatives,
            grads,
            estimator.estimate(loss, key, None, PARAMS, *BATCH),
        )

    with jax.debug_key_reuse(False):  # derivatives and gradient draw the same tangents
        value, derivatives, grads, whole = both(key)
    assert derivatives.shape == (
        estimator.num_tangents,
        estimator.num_groups,
        estimator.num_numbers,
    )
    np.testing.assert_allclose(value, whole.value, rtol=1e-6)
    # the curvature of 1.5-SPSA is a difference of differences: the rounding of the loss over the
    # square of the step
    rtol = 1e-3 if estimator == ESTIMATORS["1.5-spsa"] else 1e-5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole.grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


def test_a_continued_run_is_the_uninterrupted_one(tmp_path):
    update = Update(ESTIMATORS["rank one"], optax.adam(1.0))
    with ReplayLog.create(tmp_path / "whole.log", PARAMS, update) as log:
        whole = run(log, update, update.init(PARAMS), 6)
    with ReplayLog.create(tmp_path / "parts.log", PARAMS, update) as log:
        run(log, update, update.init(PARAMS), 3)
    with ReplayLog.open(tmp_path / "parts.log", append=True) as log:
        parts = run(log, update, replay(log, update, PARAMS), 6)
        digest = log.digest(6)
    assert same_bits(parts, whole)
    assert digest == ReplayLog.open(tmp_path / "whole.log").digest(6)


def clipped(most):
    return optax.chain(optax.clip_by_global_norm(most), optax.sgd(1.0))


@pytest.mark.parametrize(
    ("ours", "other", "message"),
    [
        (optax.sgd(1.0), optax.adam(1.0), r"optimizer keeps \(EmptyState.*ScaleByAdamState"),
        (optax.sgd(1.0), optax.sgd(0.5), "other settings"),
        (optax.adam(1.0), optax.adam(1.0, b1=0.8), "other settings"),
        (optax.adam(1.0), optax.adam(1.0, eps_root=1e-9), "other settings"),
        (optax.sgd(1.0), optax.sgd(1.0, momentum=0.9), "TraceState"),
        (optax.sgd(1.0, 0.9), optax.sgd(1.0, 0.9, nesterov=True), "other settings"),
        (clipped(1.0), clipped(2.0), "other settings"),
        (optax.adamw(1.0), optax.adamw(1.0, weight_decay=0.1), "other settings"),
    ],
    ids=["kind", "rate", "decay", "eps", "momentum", "nesterov", "clipping", "weight decay"],
)
def test_another_optimizer_is_refused(ours, other, message, tmp_path):
    estimator = ESTIMATORS["rank one"]
    ReplayLog.create(tmp_path / "run.log", PARAMS, Update(estimator, ours)).close()
    log = ReplayLog.open(tmp_path / "run.log")
    with pytest.raises(LogError, match=message):
        replay(log, Update(estimator, other), PARAMS)
    replay(log, Update(estimator, ours), PARAMS)


def test_an_optimizer_is_described_the_same_when_it_is_made_again():
    from prograde.replay._update import described

    make = lambda: optax.chain(optax.add_decayed_weights(0.01), optax.adam(1.0))
    assert described(make(), PARAMS) == described(make(), PARAMS)
    text = described(make(), PARAMS)["state"]
    assert "mu='params', nu='params'" in text
    # a constant of the program that its text does not show
    table = lambda values: optax.stateless(lambda g, _: jax.tree.map(lambda x: x * values[0], g))
    one, other = (described(table(jnp.arange(3.0) + x), PARAMS) for x in (1, 2))
    assert one != other
    many = lambda count: described(
        optax.chain(*[optax.trace(0.5)] * 20, *[optax.ema(0.5)] * count), PARAMS
    )
    assert len(many(1)["state"]) < 500  # a header of a few hundred bytes, whatever the optimizer
    assert many(1)["state"] != many(2)["state"]


def test_an_optimizer_is_compared_by_its_program_only_on_the_versions_of_the_run(tmp_path):
    """The jaxpr of another version may differ though the updates do not; the state is compared."""
    from prograde.replay._format import header_bytes

    update, other = (Update(ESTIMATORS["rank one"], optax.adam(1.0, b)) for b in (0.9, 0.8))
    ReplayLog.create(tmp_path / "run.log", PARAMS, update).close()
    header = ReplayLog.open(tmp_path / "run.log").header
    header["versions"]["jax"] = "0.0.1"
    (tmp_path / "old.log").write_bytes(header_bytes(header))
    log = ReplayLog.open(tmp_path / "old.log")
    replay(log, other, PARAMS)
    with pytest.raises(LogError, match="optimizer keeps"):
        replay(log, Update(ESTIMATORS["rank one"], optax.sgd(1.0)), PARAMS)


def test_parameters_that_are_not_those_of_the_run_are_found(tmp_path):
    """Here because the log of one run was given the steps of another."""
    update, path = Update(ESTIMATORS["rank one"], optax.sgd(1.0)), tmp_path / "run.log"
    with ReplayLog.create(path, PARAMS, update) as log:
        state = run(log, update, update.init(PARAMS), 2)
        log.record_parameters(state.params)
        state = update(state, 2, 7, 0.01, np.ones((3, 1, 1), np.float32))
        log.append(2, 7, 0.02, 1.0, np.ones((3, 1, 1), np.float32))  # another rate than was used
        log.finish(state.params)
    log = ReplayLog.open(path)
    with pytest.raises(LogError, match=r"after 3 steps .* last alike after 2 steps.*verify=False"):
        replay(log, update, PARAMS)
    replay(log, update, PARAMS, steps=2)
    replay(log, update, PARAMS, verify=False)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    update = Update(ESTIMATORS["rank one"], optax.sgd(1.0))
    ReplayLog.create(tmp_path / "run.log", PARAMS, update).close()
    log = ReplayLog.open(tmp_path / "run.log")
    with pytest.raises(LogError, match=r"starts from parameters with the fingerprint"):
        replay(log, update, PARAMS | {"bias": PARAMS["bias"].at[0].add(1e-7)})
    with pytest.raises(LogError, match="is the log of WeightPerturbation"):
        replay(log, Update(ESTIMATORS["dense"], optax.sgd(1.0)), PARAMS)
    with pytest.raises(TypeError, match="an Update is needed"):
        replay(log, update.estimator, PARAMS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="an Update is needed"):
        ReplayLog.create(tmp_path / "other.log", PARAMS, update.estimator)  # pyright: ignore
    with pytest.raises(TypeError, match=r"such as ReplayLog.open\(path\)"):
        replay(str(log.path), update, PARAMS)  # pyright: ignore[reportArgumentType]


ONES = np.ones((3, 1, 1), np.float32)


def test_an_update_refuses_what_the_log_could_not_hold():
    update = Update(ESTIMATORS["rank one"], optax.sgd(1.0))
    state = update.init(PARAMS)
    for numbers_of_step, error, message in (
        ((0, -1, 0.1, ONES), ValueError, "seed=-1"),
        ((0, 7, 1e300, ONES), ValueError, r"rate=1e\+300"),
        ((2**32, 7, 0.1, ONES), ValueError, "step=4294967296"),
        ((0, 7, 0.1, ONES + 0j), TypeError, "complex64"),
        ((0, 7, 0.1, ONES[0]), ValueError, r"shape \(1, 1\), but \(3, 1, 1\)"),
        ((0, 7, 0.1, ONES[:1]), ValueError, r"shape \(1, 1, 1\), but \(3, 1, 1\)"),
    ):
        with pytest.raises(error, match=message):
            update(state, *numbers_of_step)
    for optimizer in (None, "adam", optax.sgd):
        with pytest.raises(TypeError, match=r"init and update is needed, such as optax.sgd\(1.0\)"):
            Update(update.estimator, optimizer)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="a seed and a few numbers"):
        Update(pg.Backprop(), optax.sgd(1.0))  # pyright: ignore[reportArgumentType]


def test_an_update_is_rate_times_the_optimizer_of_the_gradient_of_the_key():
    """The twin, in the open: one step of momentum after another."""
    estimator = ESTIMATORS["rank one"]
    update, gradient = Update(estimator, optax.trace(0.5)), jax.jit(estimator.gradient)
    state = update.init(PARAMS)
    wanted = {k: v for k, v in PARAMS.items() if k != "steps"}
    mean = jax.tree.map(jnp.zeros_like, wanted)
    for step, rate in enumerate((0.1, 0.03)):
        derivatives = jnp.asarray(numbers(3, 1, 1, stream=step))
        state = update(state, step, 5, rate, derivatives)
        key = jax.random.fold_in(jax.random.key(5), step)
        grads = gradient(key, wanted, derivatives)
        mean = jax.tree.map(lambda m, g: 0.5 * m + g, mean, grads)
        wanted = jax.tree.map(lambda w, m, rate=rate: w + rate * m, wanted, mean)
    assert state.params["steps"] == 3
    for name, value in wanted.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-5, atol=1e-6)


def test_the_key_of_a_step_is_that_of_its_seed():
    data = lambda key: jax.random.key_data(key).tolist()
    assert data(Update.key(7, 3)) == data(jax.random.fold_in(jax.random.key(7), 3))
    high, low = (int(word) for word in jax.random.key_data(jax.random.split(jax.random.key(1))[1]))
    assert data(Update.key(high << 32 | low, 3)) == data(
        jax.random.fold_in(jax.random.split(jax.random.key(1))[1], 3)
    )
    assert data(Update.key(np.int64(7), np.int64(3))) == data(Update.key(7, 3))
    for seed in (-1, 2**64, 0.5, None, True):
        with pytest.raises(ValueError, match=f"seed={seed}"):
            Update.key(seed, 0)  # pyright: ignore[reportArgumentType]
