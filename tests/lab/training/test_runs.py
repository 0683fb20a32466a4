"""Runs resume bit for bit, and each part of the data reaches only the steps it is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg
from prograde.lab import models, store
from prograde.lab.data import Dataset
from prograde.lab.training import search as searching
from prograde.lab.training.evaluation import evaluate, figures_of, judge
from prograde.lab.training.logged import LoggedTrainer
from prograde.lab.training.runs import Run, train
from prograde.lab.training.search import search
from prograde.lab.training.trainer import Trainer

NETWORK = models.logreg()
LOW_RANK = pg.WeightPerturbation(pg.LowRank(rank=1))
STEPS, POINTS = 6, 3


def part(n, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, n).astype(np.int32)
    return generator.random((n, 28, 28), np.float32), labels


@pytest.fixture(scope="module")
def data():
    return Dataset("small", part(128, 0), part(20, 1), part(20, 2))


def trainer_of(data, estimator=LOW_RANK, **options):
    return Trainer(NETWORK.init, NETWORK.loss, estimator, data.train, **options)


def shared_trainer(data):
    mesh = jax.make_mesh((2,), ("workers",), devices=jax.devices()[:2])
    return LoggedTrainer(NETWORK.init, NETWORK.loss, LOW_RANK, data.train, mesh), mesh


RUN = Run("low-rank", "paper", 1e-2, 3, STEPS)


def complete(trainer, run, directory, data, mesh=None, on_point=lambda run, point: None):
    figures = figures_of(NETWORK, data, 20)
    return train(trainer, run, store.Store(directory), POINTS, figures, on_point, mesh)


def without_time(record):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in record]


class Stop(Exception):
    pass


def stop(run, point):
    raise Stop


@dataclasses.dataclass(frozen=True)
class Counting(pg.Estimator):
    """The gradient times a state that grows by one from step to step."""

    def init(self, fun, params, *args, has_aux=False):
        return jnp.ones(())

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = pg.Backprop().estimate(fun, key, None, params, *args, has_aux=has_aux)
        grads = jax.tree.map(lambda g: state * g, found.grads)
        return dataclasses.replace(found, grads=grads, state=state + 1)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (LOW_RANK, {}),
        (LOW_RANK, {"in_scan": False}),
        (Counting(), {"optimizer": "adam", "schedule": "cosine"}),
    ],
)
def test_resumed_equals_uninterrupted(estimator, options, data, tmp_path):
    """Interrupted at every point of its curve, a run ends with the bits of one never stopped."""
    trainer = trainer_of(data, estimator, **options)
    whole = complete(trainer, RUN, tmp_path / "whole", data)
    assert [line["step"] for line in whole[1:-1]] == [0, 2, 4, 6]
    assert whole[-1]["status"] == "completed"
    for _ in range(POINTS):
        with pytest.raises(Stop):
            complete(trainer, RUN, tmp_path / "parts", data, on_point=stop)
    parts = complete(trainer, RUN, tmp_path / "parts", data, on_point=stop)  # finished: just reads
    assert without_time(parts) == without_time(whole)
    assert not list((tmp_path / "parts" / "states").glob("*"))
    assert store.Store(tmp_path / "parts").read_lines(f"runs/{RUN.name}") == parts
    another = dataclasses.replace(RUN, learning_rate=1.0)
    with pytest.raises(store.RecordError, match="the record of another run"):
        complete(trainer, another, tmp_path / "parts", data)


def test_a_record_ahead_of_its_state_is_cut_back(data, tmp_path, monkeypatch):
    """Killed between the two files of a point, the record has a point more than the state."""
    trainer, saved, save = trainer_of(data), [], store.save_state

    def save_once(path, state):
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(path, state)

    monkeypatch.setattr(store, "save_state", save_once)
    with pytest.raises(KeyboardInterrupt):
        complete(trainer, RUN, tmp_path / "cut", data)
    assert store.Store(tmp_path / "cut").read_lines(f"runs/{RUN.name}")[-1]["step"] == 4
    cut = complete(trainer, RUN, tmp_path / "cut", data)
    assert without_time(cut) == without_time(complete(trainer, RUN, tmp_path / "whole", data))


def test_a_shared_run_goes_on_from_its_log_and_is_the_run_of_one_worker(data, tmp_path):
    """Interrupted at every point, and once more with the end of the log torn off: the same bits.

    By one worker alone: the same up to rounding.
    """
    trainer, mesh = shared_trainer(data)
    whole = complete(trainer, RUN, tmp_path / "whole", data, mesh)
    log = tmp_path / "parts" / "logs" / f"{RUN.name}.log"
    for steps in (2, 4, 6):  # the points before are reached again, from the log

        def stop_at(run, point, steps=steps):
            if point["step"] == steps:
                raise Stop

        with pytest.raises(Stop):
            complete(trainer, RUN, tmp_path / "parts", data, mesh, stop_at)
        assert len(pg.replay.ReplayLog.open(log)) == steps
    parts = complete(trainer, RUN, tmp_path / "parts", data, mesh)
    assert without_time(parts) == without_time(whole)
    assert log.read_bytes() == (tmp_path / "whole" / "logs" / log.name).read_bytes()

    record = tmp_path / "parts" / "runs" / f"{RUN.name}.jsonl"
    record.unlink()
    log.write_bytes(log.read_bytes()[:-50])
    torn = complete(trainer, RUN, tmp_path / "parts", data, mesh)
    assert without_time(torn) == without_time(whole)

    curve = lambda lines: [line["test_loss"] for line in lines if line["kind"] == "point"]
    alone = complete(trainer_of(data), RUN, tmp_path / "alone", data)
    np.testing.assert_allclose(curve(whole), curve(alone), rtol=1e-4)

    record.unlink()
    another = dataclasses.replace(RUN, learning_rate=0.1)
    with pytest.raises(store.RecordError, match="the log of another run"):
        complete(trainer, another, tmp_path / "parts", data, mesh)


# why a run diverged


def surface(fun, start):
    return Trainer(lambda key: jnp.asarray(start), fun, pg.Backprop(), traced=True)


def diverged(fun, start, rate, directory, steps=8):
    run = Run("backprop", "paper", rate, 0, steps)
    figures = lambda params: {"test_loss": float(fun(params))}
    nothing = lambda run, point: None
    return train(surface(fun, start), run, store.Store(directory), 2, figures, nothing)[-1]


def test_a_loss_that_overflows_is_told_from_a_gradient_that_does(tmp_path):
    """Both are finite before; the step that fails is counted by hand."""
    # w grows by a factor of -1e10 a step: 1e0, 1e10, 1e20, whose square is beyond float32
    overflow = diverged(lambda w: jnp.sum(w**2), [1.0], 0.5e10, tmp_path / "value")
    assert (overflow["status"], overflow["step"], overflow["cause"]) == ("diverged", 2, "value")
    # w: 2, 1, 0.0001, -0.9997, where the root is that of 0 and its derivative infinite
    root = lambda w: jnp.sum(w + 0 * jnp.sqrt(jnp.maximum(w, 0)))
    gradient = diverged(root, [2.0], 1.0, tmp_path / "gradient")
    assert (gradient["status"], gradient["cause"]) == ("diverged", "gradient")
    assert gradient["step"] == 4
    place = f"test_runs.py:{root.__code__.co_firstlineno}:"
    assert gradient["culprit"].startswith(f"sqrt at {place}")
    assert gradient["culprit"].endswith("whose tangent is not finite")
    assert overflow["culprit"].endswith("whose value is not finite")


def test_the_first_loss_that_is_not_finite_is_the_step_recorded(tmp_path):
    fun, rate = models.ROSENBROCK.fun, 1.0
    end = diverged(fun, models.ROSENBROCK.start, rate, tmp_path, steps=100)
    point, step = jnp.asarray(models.ROSENBROCK.start), 0
    while bool(jnp.isfinite(fun(point))):
        point, step = point - np.exp(-1e-4 * step) * rate * jax.grad(fun)(point), step + 1
    assert (end["status"], end["step"]) == ("diverged", step)


def test_parameters_that_the_last_step_ruined_count_as_divergence(data, tmp_path):
    """The losses of all steps are finite, what they leave behind is not."""
    run = Run("backprop", "paper", 1e38, 0, 1)
    record = complete(trainer_of(data, pg.Backprop()), run, tmp_path, data)
    assert (record[-1]["status"], record[-1]["step"]) == ("diverged", 1)
    assert [line["kind"] for line in record] == ["run", "point", "end"]


def test_a_shared_run_that_diverged_says_why_too(data, tmp_path):
    trainer, mesh = shared_trainer(data)
    run = dataclasses.replace(RUN, learning_rate=1e38)
    record = complete(trainer, run, tmp_path, data, mesh)
    assert record[-1]["status"] == "diverged"
    assert record[-1]["cause"] in ("value", "gradient")
    assert not (tmp_path / "states").exists()


# which rows reach which step


def loss_of(params, part):
    """The mean loss on a part, by NumPy."""
    x = part[0].reshape(len(part[1]), -1).astype(np.float64)
    z = x @ np.asarray(params["out"]["w"], np.float64) + np.asarray(params["out"]["b"])
    return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), part[1]])


def spoiled(data, name):
    """The data with one part that nothing survives which sees it."""
    images, labels = getattr(data, name)
    return dataclasses.replace(data, **{name: (np.full_like(images, np.nan), labels)})


def test_figures_are_those_of_the_part_they_name(data):
    params = NETWORK.init(jax.random.key(0))
    figures = figures_of(NETWORK, data, 10_000)(params)
    assert figures["test_loss"] == pytest.approx(loss_of(params, data.test), rel=1e-5)
    assert figures["train_loss"] == pytest.approx(loss_of(params, data.train), rel=1e-5)
    held_back = judge(NETWORK, data, 10_000)(params)
    assert held_back == pytest.approx(loss_of(params, data.validation), rel=1e-5)
    some = loss_of(params, tuple(x[:7] for x in data.test))
    assert evaluate(NETWORK, params, data.test, 7)[0] == pytest.approx(some, rel=1e-5)
    logits = NETWORK.logits(params, data.test[0])
    hits = np.mean(np.argmax(logits, 1) == data.test[1])
    assert figures["test_accuracy"] == pytest.approx(hits)


@pytest.mark.parametrize("make", [trainer_of, lambda data: shared_trainer(data)[0]])
def test_runs_train_on_the_training_part_alone(make, data, tmp_path):
    """Neither validation nor test rows reach a step: spoiled ones change nothing."""
    batch_losses = {}
    for name in ("validation", "test", "train"):
        trainer = make(spoiled(data, name))
        record = complete(trainer, RUN, tmp_path / name, data)
        batch_losses[name] = [line.get("batch_loss") for line in record if line["kind"] == "point"]
    assert batch_losses["validation"] == batch_losses["test"]
    assert len(batch_losses["test"]) == POINTS + 1
    assert batch_losses["train"] == [None]  # it diverged


def trials_of(data, directory):
    records = store.Store(directory)
    loss = judge(NETWORK, data, 10_000)
    search(trainer_of(data), "x", 8, records, loss, lambda *trial: None)
    return records.read("search/x")["trials"]


def test_the_search_goes_by_the_validation_part_and_never_sees_the_test_part(
    data, tmp_path, monkeypatch
):
    clean = trials_of(data, tmp_path / "clean")
    assert trials_of(spoiled(data, "test"), tmp_path / "test") == clean
    blind = trials_of(spoiled(data, "validation"), tmp_path / "validation")
    assert all(trial["loss"] is None for trial in blind)
    monkeypatch.setattr(searching, "GRID", (1e-30,) * 6)  # nothing is learned
    monkeypatch.setattr(searching, "TRIALS", 6)
    params = trainer_of(data).start(1_000_000)[0]
    for trial in trials_of(data, tmp_path / "still"):
        assert trial["loss"] == pytest.approx(loss_of(params, data.validation), rel=1e-5)


def test_seeds_of_the_search_are_not_those_of_runs(data, monkeypatch, tmp_path):
    trainer, seeds = trainer_of(data), []
    start = trainer.start
    monkeypatch.setattr(trainer, "start", lambda seed: seeds.append(seed) or start(seed))
    search(trainer, "x", 8, store.Store(tmp_path), lambda p: 0.0, lambda *t: None, seeds=2)
    assert set(seeds) == {1_000_000, 1_000_001}


# the search, on a bowl whose best rate is known


def bowl_search(estimator, directory, judge=None, trials=None, **options):
    """The loss (w - 1)^2 from 0: at a rate r, w after n steps is 1 - (1 - 2 r)^n."""
    fun = lambda w: jnp.sum((w - 1) ** 2)
    trainer = Trainer(lambda key: jnp.zeros(1), fun, estimator)
    note = lambda name, number, trial: None if trials is None else trials.append(trial)
    judge = judge or (lambda params: float(fun(params)))
    return search(trainer, "bowl", 8, store.Store(directory), judge, note, **options)


def test_search_tries_a_grid_and_half_a_decade_around_its_best(tmp_path):
    trials = []
    best = bowl_search(pg.Backprop(), tmp_path, trials=trials)
    rates = [trial["learning_rate"] for trial in trials]
    assert rates[:6] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0]
    assert rates[6:] == pytest.approx([0.1 * 10**-0.5, 0.1 * 10**0.5])
    assert best == pytest.approx(0.1 * 10**0.5)  # 1 - 2 r is the least in size
    record = store.Store(tmp_path).read("search/bowl")
    assert (record["trials"], record["best"], record["steps"]) == (trials, best, 8)
    again = []
    assert bowl_search(pg.Backprop(), tmp_path, trials=again) == best
    assert not again
    store.Store(tmp_path).write("search/bowl", record | {"trials": trials[:5]})
    assert bowl_search(pg.Backprop(), tmp_path, trials=again) == best
    assert again == trials[5:]  # what was tried is not tried again


@pytest.mark.parametrize(("last", "expected"), [(1, [8]), (4, [5, 6, 7, 8]), (8, range(1, 9))])
def test_a_trial_is_judged_by_the_mean_of_its_last_parts(last, expected, tmp_path):
    """The judge counts the steps, of which each of eight parts has one."""
    rate, trials = 1e-2, []
    left = lambda params: abs(1 - float(params[0])) + 1e-30  # (1 - 2 rate)^steps at this rate
    count = lambda params: round(np.log(left(params)) / np.log(1 - 2 * rate))
    bowl_search(pg.Backprop(), tmp_path, judge=count, trials=trials, last=last)
    (at,) = (trial for trial in trials if trial["learning_rate"] == rate)
    assert at["loss"] == pytest.approx(np.mean(list(expected)), abs=0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_trial_whose_loss_is_not_finite_loses(bad, tmp_path):
    """Also where it comes first, and where it is NaN, which compares as neither more nor less."""
    losses = iter([bad, bad, 2.0, 1.0, bad, 3.0, bad, 0.5])
    best = bowl_search(pg.Backprop(), tmp_path / "some", judge=lambda p: next(losses))
    assert best == pytest.approx(1e-2 * 10**0.5)
    one_of_two = iter([1.0, bad] * 8)
    trials = []
    judge = lambda p: next(one_of_two)
    assert bowl_search(pg.Backprop(), tmp_path / "x", judge=judge, seeds=2, trials=trials) == 1e-5
    assert all(trial["loss"] is None for trial in trials)  # one seed that diverges loses the trial
