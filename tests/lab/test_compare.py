"""`prograde compare`: a tiny comparison is complete, resumes bit for bit, refuses what differs, and its figures are what they say."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import prograde as pg
from prograde.lab import compare, compare_report, compare_summary, models, records, train
from prograde.lab.data import DataError, Dataset
from prograde.lab.display import Display
from prograde.lab.experiments import Budget, Experiment, Reported

NAMES = ("backprop", "checkpointed", "weight")
SEEDS, STEPS = 2, 4


@dataclasses.dataclass(frozen=True)
class Counting(pg.Estimator):
    """The gradient times a state that grows by one from step to step."""

    def init(self, fun, params, *args, has_aux=False):
        assert jax.eval_shape(fun, params, *args).shape == (64,)  # a loss per example
        return jnp.ones(())

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = pg.Backprop().estimate(fun, key, None, params, *args, has_aux=has_aux)
        return dataclasses.replace(
            found, grads=jax.tree.map(lambda g: state * g, found.grads), state=state + 1
        )


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A model that trains in no time, timed in two rounds."""
    with pytest.MonkeyPatch.context() as patch:
        model = compare.Model(
            "logistic regression", lambda merged: models.logreg(), visit=1, estimates=8
        )
        patch.setitem(compare.MODELS, "mlp", model)
        patch.setattr(compare, "ROUNDS", 2)
        patch.setattr(compare, "_LEARNING_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def small_data(seed):
    generator = np.random.default_rng(seed)

    def part(n):
        labels = generator.integers(0, 10, n).astype(np.int32)
        return (generator.random((n, 28, 28)) * 0.3 + labels[:, None, None] / 10).astype(
            np.float32
        ), labels

    return Dataset("small", part(128), part(20), part(20))


def silent():
    return Display(Console(file=io.StringIO()))


def plan(**changes):
    return compare.Plan(
        **{"model": "mlp", "estimators": NAMES, "steps": STEPS, "seeds": SEEDS} | changes
    )


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    compare.run(plan(), small_data, out, False, silent())
    return out


def without_time(path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in records.read_lines(path)]


def test_the_record_of_a_comparison_is_complete(finished):
    names = [f"{name}-sgd" for name in NAMES]
    costs = records.read_json(finished / "costs.json")
    assert list(costs) == ["bare", *names]
    assert all(cost["seconds"]["n"] == 2 and cost["temp_bytes"] >= 0 for cost in costs.values())
    assert sorted(p.stem for p in (finished / "diagnosis").iterdir()) == sorted(NAMES)
    trained = ["backprop-sgd", "weight-sgd"]  # the gradient of the checkpointed one is the same
    assert sorted(p.stem for p in (finished / "search").iterdir()) == trained
    for name in trained:
        assert (
            len(records.read_json(finished / "search" / f"{name}.json")["trials"]) == compare.TRIALS
        )
    runs = {p.stem: records.read_lines(p) for p in (finished / "runs").iterdir()}
    assert sorted(runs) == sorted(f"{name}-seed{seed}" for name in trained for seed in range(SEEDS))
    assert all(run[-1]["kind"] == "end" and run[-1]["step"] == STEPS for run in runs.values())
    assert not list((finished / "states").glob("*"))
    for file in finished.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{file}: {word}"))


def test_diagnoses_are_of_the_estimators(finished):
    found = {name: records.read_json(finished / "diagnosis" / f"{name}.json") for name in NAMES}
    for name in ("backprop", "checkpointed"):
        assert found[name]["relative_error"]["value"] < 1e-9
    weight = found["weight"]
    assert not weight["bias_detected"]
    assert weight["num_estimates"] == 8
    assert 0.2 < weight["variance"]["value"] / weight["num_parameters"] < 5
    assert len(weight["leaves"]) == len(
        jax.tree.leaves(compare.MODELS["mlp"].build(False).init(jax.random.key(0)))
    )


def test_the_page_and_the_tables_name_everything(finished, capsys):
    page = compare_report.build(finished).read_text()
    assert page.count("<svg") == 1
    assert not re.search(
        r"""(src|href)=["']?https?:|url\(["']?http|@import|<script""", page
    )  # needs no network
    compare_report.print_tables(compare_report.read(finished), Console(width=120))
    printed = capsys.readouterr().out
    for name in NAMES:
        assert name in printed
        assert f"<td>{name}</td>" in page
    for words in (
        "bare forward pass",
        "rate bound",
        f"after {STEPS} steps",
        "Bias was seen in none",
    ):
        assert words in printed
        assert words in page
    assert "params[&#x27;out&#x27;][&#x27;w&#x27;]" in page
    assert compare_report.build(finished).read_text() == page


def test_equal_steps_and_equal_time_are_read_off_the_curves(finished):
    found = compare_summary.read(finished)
    by_name = {r.entry.estimator: r for r in found.results}
    assert found.equal_seconds == STEPS * min(r.seconds for r in found.results)
    assert by_name["checkpointed"].outcome.final_loss == by_name["backprop"].outcome.final_loss
    exact = [by_name["backprop"], by_name["checkpointed"]]
    for result in exact:
        if result.outcome.compared:  # its best loss came after the start
            assert result.outcome.time_ratio == pytest.approx(
                result.seconds / min(r.seconds for r in exact)
            )
    for result in found.results:
        step = found.equal_seconds / result.seconds
        expected = []
        for run in result.runs:
            curve = {p["step"]: p["test_loss"] for p in run if p["kind"] == "point"}
            low, part = min(math.floor(step), STEPS - 1), step - min(math.floor(step), STEPS - 1)
            expected.append((1 - part) * curve[low] + part * curve[low + 1])
        assert result.at_equal_time.mean == pytest.approx(np.mean(expected))
        assert result.at_equal_time.n == SEEDS


class Stop(Exception):
    pass


class Stopping(Display):
    """Raises at every so many advances."""

    def __init__(self, every):
        super().__init__(silent().console)
        self.left = every

    def advance(self, amount, facts):
        self.left -= 1
        if self.left == 0:
            raise Stop


def test_resumed_equals_uninterrupted(finished, small_data, tmp_path):
    """Stopped at every stage, and several times within each, a comparison ends with the bits of one that was not."""
    out, stops = tmp_path / "parts", 0
    while True:
        try:
            # more advances than the stage of costs has, which is the one that starts anew
            compare.run(plan(), small_data, out, stops > 0, Stopping(11))
            break
        except Stop:
            stops += 1
    assert stops >= 3
    for folder in ("search", "diagnosis"):
        for path in (finished / folder).iterdir():
            assert (out / folder / path.name).read_bytes() == path.read_bytes()
    assert {p.name: without_time(p) for p in (out / "runs").iterdir()} == {
        p.name: without_time(p) for p in (finished / "runs").iterdir()
    }


def test_another_comparison_is_refused_and_nothing_changes(finished, small_data):
    files = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    for other in (
        {"seeds": 3},
        {"steps": 5},
        {"estimators": ("backprop", "weight")},
        {"optimizers": ("adam",)},
        {"batch_size": 32},
        {"schedule": "cosine"},
    ):
        for resume in (False, True):
            with pytest.raises(records.RecordError, match="another configuration"):
                compare.run(plan(**other), small_data, finished, resume, silent())
    with pytest.raises(records.RecordError, match="--resume"):
        compare.run(plan(), small_data, finished, False, silent())
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == files


def test_estimators_that_learn_and_both_optimizers(small_data, tmp_path, monkeypatch):
    monkeypatch.setitem(compare.ESTIMATORS, "counting", Counting())
    chosen = plan(
        estimators=("counting",),
        optimizers=("sgd", "adam"),
        seeds=1,
        estimates=30,
        steps=None,
        minutes=1e-6,
    )
    compare.run(chosen, small_data, tmp_path, False, silent())
    assert (
        records.read_json(tmp_path / "length.json")["steps"] == compare.POINTS
    )  # no fewer, however few the minutes
    diagnosis = records.read_json(tmp_path / "diagnosis" / "counting.json")
    assert diagnosis["projection"]["value"] == pytest.approx(3)  # after two steps of learning
    assert diagnosis["bias_detected"]
    found = compare_report.read(tmp_path)
    assert [r.entry.name for r in found.results] == ["counting-sgd", "counting-adam"]
    assert found.results[0].outcome.final_loss != found.results[1].outcome.final_loss
    assert "Bias was seen in counting" in compare_report.conclusion(found)
    assert "counting, adam" in compare_report.build(tmp_path).read_text()


def test_the_state_of_an_estimator_goes_from_step_to_step_and_into_checkpoints(
    small_data, tmp_path
):
    network = models.logreg()
    experiment = Experiment(
        "tiny", "", lambda _: network, (), Reported(), Budget(), Budget(), in_scan=False
    )
    trainer = train.Trainer(experiment, Counting(), small_data, losses="each")
    carry, _, _ = trainer.steps(trainer.start(0), 0.0, 0, trainer.rows(0, 0, 3))
    assert float(carry[3]) == 4
    budget, run = (
        Budget(steps=4, points=4, eval_examples=20),
        train.Run("counting", "sgd", 0.01, 0, 4),
    )
    whole = train.train(trainer, run, budget, tmp_path / "whole", lambda run, point: None)

    def stop(run, point):
        raise Stop

    for _ in range(3):
        with pytest.raises(Stop):
            train.train(trainer, run, budget, tmp_path / "parts", stop)
    parts = train.train(trainer, run, budget, tmp_path / "parts", lambda run, point: None)
    assert [p.get("test_loss") for p in parts] == [p.get("test_loss") for p in whole]


def test_minutes_decide_the_steps_once(small_data, tmp_path):
    chosen = plan(steps=None, minutes=10.0, seeds=2)
    network = compare.MODELS["mlp"].build(False)
    experiment = Experiment(
        "tiny", "", lambda _: network, (), Reported(), Budget(), Budget(), in_scan=False
    )
    trainers = {"backprop-sgd": train.Trainer(experiment, pg.Backprop(), small_data, losses="each")}
    seconds = {"backprop-sgd": 0.01, "weight-sgd": 0.02, "checkpointed-sgd": 5.0}
    steps = compare._steps(chosen, trainers, seconds, compare.time.monotonic(), tmp_path)
    work = steps * 0.03 * (compare.TRIALS + 2)
    assert steps % compare.POINTS == 0
    assert 500 < work <= 600
    assert compare._steps(chosen, trainers, {name: 1.0 for name in seconds}, 0.0, tmp_path) == steps


@dataclasses.dataclass(frozen=True)
class Ones(pg.Estimator):
    """Says that every derivative is 1, so that a step is the rate."""

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        found = pg.Backprop().estimate(fun, key, None, params, *args, has_aux=has_aux)
        return dataclasses.replace(found, grads=jax.tree.map(jnp.ones_like, found.grads))


@pytest.mark.parametrize(
    ("schedule", "total"), [("exp", sum(math.exp(-1e-4 * t) for t in range(4))), ("cosine", 2.5)]
)
def test_rates_follow_the_schedule_and_batches_have_the_size_asked_for(small_data, schedule, total):
    network = models.logreg()
    experiment = Experiment(
        "tiny", "", lambda _: network, (), Reported(), Budget(), Budget(), in_scan=False
    )
    trainer = train.Trainer(
        experiment, Ones(), small_data, losses="each", batch_size=48, schedule=schedule
    )
    trainer.length = 4
    rows = trainer.rows(0, 0, 4)
    assert rows.shape == (4, 48)
    assert len(set(rows[:2].ravel())) == 96  # two batches an epoch, no example twice
    start = trainer.start(0)
    before = np.asarray(start[0]["out"]["b"])
    carry, _, _ = trainer.steps(start, 0.1, 0, rows)
    np.testing.assert_allclose(before - carry[0]["out"]["b"], 0.1 * total, rtol=1e-5)


@pytest.mark.parametrize(
    ("rates", "expected"), [((0.1,), (0.1, 0.1)), ((0.1, 0.2, 0.3), (0.1, 0.3))]
)
def test_rates_that_are_given_are_not_searched(rates, expected, small_data, tmp_path):
    compare.run(plan(rates=rates, seeds=1), small_data, tmp_path, False, silent())
    assert not (tmp_path / "search").exists()
    found = compare_report.read(tmp_path)
    trained = [found.results[0], found.results[2]]  # the one between has the gradient of the first
    assert tuple(r.outcome.learning_rate for r in trained) == expected
    assert found.manifest["config"]["rates"] == list(rates)
    assert "rates given, not searched" in compare_report.build(tmp_path).read_text()
    assert "edge of the search" not in compare_report.conclusion(found)


def test_batch_schedule_and_evaluation_reach_the_runs(small_data, tmp_path):
    changes = {"estimators": ("backprop",), "seeds": 1, "schedule": "cosine", "eval_examples": 7}
    chosen = plan(batch_size=16, **changes)
    compare.run(chosen, small_data, tmp_path, False, silent())
    config = records.read_json(tmp_path / "manifest.json")["config"]
    assert (config["batch_size"], config["eval_examples"]) == (16, 7)
    assert "cos(pi t / T)" in config["schedule"]
    (run,) = (records.read_lines(path) for path in (tmp_path / "runs").iterdir())
    assert all(
        p["test_accuracy"] * 7 == pytest.approx(round(p["test_accuracy"] * 7))
        for p in run
        if "test_accuracy" in p
    )
    assert "Batches of 16, rate eta_0 (1 + cos" in compare_report.made_on(
        compare_report.read(tmp_path)
    )
    assert "end of their schedule" in compare_report.conclusion(compare_report.read(tmp_path))
    with pytest.raises(DataError, match="--batch-size 129: small has 128 examples"):
        compare.run(plan(batch_size=129, **changes), small_data, tmp_path / "none", False, silent())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "vgg"}, "--model vgg.*mlp, cnn, mixer, transformer"),
        ({"estimators": ("weight", "magic")}, "--estimators magic.*backprop"),
        ({"estimators": ()}, "at least one"),
        ({"estimators": ("weight", "weight")}, "each once"),
        ({"estimators": ("scaled-rows",), "model": "cnn"}, "layers of mlp only"),
        ({"optimizers": ("lion",)}, "--optimizers lion.*sgd, adam"),
        ({"steps": 5, "minutes": 1.0}, "one of them"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"rates": (0.1, 0.0, 0.1)}, "--rates 0.1 0 0.1: more than 0"),
        ({"rates": (0.1, 0.2)}, "--rates 0.1 0.2: one for all.*3 estimators"),
        ({"steps": None, "minutes": -1.0}, "--minutes -1"),
        ({"seeds": 0}, "--seeds 0"),
        ({"estimates": 7}, "--estimates 7: at least 8"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"schedule": "linear"}, "--schedule linear.*exp, cosine"),
        ({"eval_examples": 0}, "--eval-examples 0: at least 1"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_says_why(changes, words):
    with pytest.raises(ValueError, match=words):
        plan(**changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "vgg"], "Valid names: mlp, cnn, mixer, transformer"),
        (["--from", "nowhere"], "no records here"),
        (["--from", "nowhere", "--seeds", "4"], "takes no other option"),
        (["--resume"], "--resume needs --out"),
    ],
)
def test_a_bad_command_exits_with_2(arguments, words, tmp_path):
    command = [sys.executable, "-m", "prograde.lab.cli", "compare", *arguments]
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mixer", "transformer"])
def test_networks_tell_examples_apart_and_merged_ones_compute_the_same(name, key):
    build = getattr(models, name)
    network, merged = build(False, width=16, depth=2), build(True, width=16, depth=2)
    key_params, key_images = jax.random.split(key)
    params = network.init(key_params)
    images, labels = jax.random.uniform(key_images, (5, 28, 28)), jnp.arange(5)
    logits = network.logits(params, images)
    assert logits.shape == (5, 10)
    np.testing.assert_allclose(
        network.logits(params, images[2:3])[0], logits[2], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(merged.logits(params, images), logits, rtol=1e-4, atol=1e-5)
    losses = network.losses(params, images, labels)
    assert losses.shape == (5,)
    np.testing.assert_allclose(network.loss(params, images, labels), losses.mean(), rtol=1e-6)
    assert pg.check(network.losses, params, images, labels, memory=False).ok


def test_a_frontier_is_what_nothing_beats_in_both(seed):
    x, loss = np.random.default_rng(seed).random((2, 60)).round(1)  # with ties
    kept = set(zip(*compare_report._frontier(x, loss), strict=True))
    points = set(zip(x, loss, strict=True))
    beaten = {
        (a, b) for a, b in points if any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
    }
    assert kept == points - beaten


@pytest.mark.parametrize(
    "record",
    [
        "compare-mlp-mnist",
        "compare-scaled-mlp-mnist",
        "compare-local-mixer-s",
        "compare-local-mixer-m",
        "compare-local-mixer-m-30",
    ],
)
def test_the_page_in_the_docs_says_what_the_record_does(record):
    root = Path(__file__).parents[2]
    comparison = compare_summary.read(root / "records" / record)
    page = (root / "docs" / "compare.md").read_text()
    assert compare_report.conclusion(comparison) in page
    for table, columns in zip(
        compare_report.tables(comparison)[::2], [(2, 3), (1, 2, 4)], strict=True
    ):
        for row in table.rows[-len(comparison.results) :]:
            for column in columns:
                assert row[column] in page
