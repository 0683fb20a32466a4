"""`prograde compare`: complete, resumed bit for bit, and its figures are what they say."""

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import prograde as pg
from prograde.lab import models, store
from prograde.lab.commands.report import report_of_directories
from prograde.lab.data import Dataset
from prograde.lab.display import Display
from prograde.lab.report import figures, markdown, page, terminal
from prograde.lab.studies.compare import estimators, plan, run
from prograde.lab.studies.compare.figures import _frontier
from prograde.lab.studies.compare.report import conclusion, report
from prograde.lab.studies.compare.summary import read
from prograde.lab.study import UsageError
from prograde.lab.training import schedules
from prograde.lab.training.search import TRIALS

ROOT = Path(__file__).parents[3]
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
        grads = jax.tree.map(lambda g: state * g, found.grads)
        return dataclasses.replace(found, grads=grads, state=state + 1)


def part(n, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, n).astype(np.int32)
    images = generator.random((n, 28, 28)) * 0.3 + labels[:, None, None] / 10
    return images.astype(np.float32), labels


DATA = Dataset("small", part(128, 0), part(20, 1), part(20, 2))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A model and data that train in no time, timed in two rounds."""
    with pytest.MonkeyPatch.context() as patch:
        model = estimators.Model(
            "logistic regression", lambda merged: models.logreg(), visit=1, estimates=8
        )
        patch.setitem(estimators.MODELS, "mlp", model)
        patch.setattr(run, "ROUNDS", 2)
        patch.setattr(run, "_LEARNING_STEPS", 2)
        patch.setattr("prograde.lab.data.load", lambda source, directory: DATA)
        yield


def silent():
    return Display(Console(file=io.StringIO()))


def study(**changes):
    options = {"model": "mlp", "estimators": NAMES, "steps": STEPS, "seeds": SEEDS}
    return plan.Compare(**options | changes)


def compare(chosen, out, resume=False, display=None):
    """Runs a comparison as the command does; returns its store."""
    (records,) = store.claim("compare", {out: chosen.configs()["."]}, resume)
    chosen.run({".": records}, display or silent())
    return records


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return compare(study(), tmp_path_factory.mktemp("compare") / "out")


def without_time(records):
    return {
        name: [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        for name in records.names("runs")
        if (lines := records.read_lines(name))
    }


def test_the_record_of_a_comparison_is_complete(finished):
    names = [f"{name}-sgd" for name in NAMES]
    costs = finished.read("costs")
    assert list(costs) == ["bare", *names]
    assert all(cost["seconds"]["n"] == 2 and cost["temp_bytes"] >= 0 for cost in costs.values())
    assert all(0 <= cost["busy"] <= 1 for cost in costs.values())
    assert finished.names("diagnosis") == [f"diagnosis/{name}" for name in sorted(NAMES)]
    trained = ["backprop-sgd", "weight-sgd"]  # the gradient of the checkpointed one is the same
    assert finished.names("search") == [f"search/{name}" for name in trained]
    for name in finished.names("search"):
        assert len(finished.read(name)["trials"]) == TRIALS
    runs = {name: finished.read_lines(name) for name in finished.names("runs")}
    assert sorted(runs) == [f"runs/{n}-seed{seed}" for n in trained for seed in range(SEEDS)]
    assert all(run[-1]["kind"] == "end" and run[-1]["step"] == STEPS for run in runs.values())
    assert not list((finished.directory / "states").glob("*"))
    for file in finished.directory.rglob("[!.]*.json"):
        json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{file}: {word}"))


def test_diagnoses_are_of_the_estimators(finished):
    found = {name: finished.read(f"diagnosis/{name}") for name in NAMES}
    for name in ("backprop", "checkpointed"):
        assert found[name]["relative_error"]["value"] < 1e-9
    weight = found["weight"]
    assert not weight["bias_detected"]
    assert weight["num_estimates"] == 8
    assert 0.2 < weight["variance"]["value"] / weight["num_parameters"] < 5
    assert len(weight["leaves"]) == 2


def test_the_page_and_the_tables_name_everything(finished, tmp_path):
    shown = report([finished])
    html = page.write(shown, tmp_path / "report.html").read_text()
    assert html.count("<svg") == 1
    outside = r"""(src|href)=["']?https?:|url\(["']?http|@import|<script"""
    assert not re.search(outside, html)  # needs no network
    console = Console(file=io.StringIO(), width=120)
    terminal.print_report(shown, console)
    printed = console.file.getvalue()
    for name in NAMES:
        assert name in printed
        assert f"<td>{name}</td>" in html
    words = ("bare forward pass", "rate bound", f"after {STEPS} steps", "Bias was seen in none")
    for said in words:
        assert said in printed
        assert said in html
    assert "Signal to noise, leaf by leaf" in html
    assert "params[&#39;out&#39;][&#39;w&#39;]" in html
    assert page.write(report([finished]), tmp_path / "again.html").read_text() == html


def test_equal_steps_and_equal_time_are_read_off_the_curves(finished):
    found = read(finished)
    by_name = {r.entry.estimator: r for r in found.results}
    assert found.equal_seconds == STEPS * min(r.seconds for r in found.results)
    assert by_name["checkpointed"].outcome.final_loss == by_name["backprop"].outcome.final_loss
    exact = [by_name["backprop"], by_name["checkpointed"]]
    for result in exact:
        if result.outcome.compared:  # its best loss came after the start
            fastest = min(r.seconds for r in exact)
            assert result.outcome.time_ratio == pytest.approx(result.seconds / fastest)
    for result in found.results:
        step = found.equal_seconds / result.seconds
        expected = []
        for each in result.runs:
            curve = {p["step"]: p["test_loss"] for p in each if p["kind"] == "point"}
            low = min(math.floor(step), STEPS - 1)
            expected.append((1 + low - step) * curve[low] + (step - low) * curve[low + 1])
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


def test_resumed_equals_uninterrupted(finished, tmp_path):
    """Stopped at every stage, and several times within each: the bits of one that was not."""
    out, stops = tmp_path / "parts", 0
    while True:
        try:
            # more advances than the stage of costs has, which is the one that starts anew
            parts = compare(study(), out, stops > 0, Stopping(20))
            break
        except Stop:
            stops += 1
    assert stops >= 2
    for name in (*finished.names("search"), *finished.names("diagnosis")):
        assert parts.read(name) == finished.read(name)
    assert without_time(parts) == without_time(finished)


def test_another_comparison_is_refused_and_nothing_changes(finished):
    out = finished.directory
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for other in (
        {"seeds": 3},
        {"steps": 5},
        {"estimators": ("backprop", "weight")},
        {"optimizers": ("adam",)},
        {"batch_size": 32},
        {"schedule": "cosine"},
    ):
        for resume in (False, True):
            with pytest.raises(store.RecordError, match="another configuration"):
                compare(study(**other), out, resume)
    with pytest.raises(store.RecordError, match="--resume"):
        compare(study(), out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files


def test_estimators_that_learn_and_both_optimizers(tmp_path, monkeypatch):
    monkeypatch.setitem(estimators.ESTIMATORS, "counting", Counting())
    changes = {"estimators": ("counting",), "optimizers": ("sgd", "adam"), "estimates": 30}
    changes |= {"rates": (0.1,)}
    records = compare(study(**changes, seeds=1, steps=None, minutes=1e-6), tmp_path)
    assert records.read("length")["steps"] == plan.POINTS  # no fewer, however few the minutes
    diagnosis = records.read("diagnosis/counting")
    assert diagnosis["projection"]["value"] == pytest.approx(3)  # after two steps of learning
    assert diagnosis["bias_detected"]
    found = read(records)
    assert [r.entry.name for r in found.results] == ["counting-sgd", "counting-adam"]
    assert [r.outcome.learning_rate for r in found.results] == [0.1, 0.1]  # one for all
    assert found.results[0].outcome.final_loss != found.results[1].outcome.final_loss
    assert "Bias was seen in counting" in conclusion(found)
    assert any("counting, adam" in row for row in report([records]).sections[0].content[2].rows)


def test_minutes_decide_the_steps():
    chosen = study(steps=None, minutes=10.0)
    seconds = {"backprop-sgd": 0.01, "weight-sgd": 0.02, "checkpointed-sgd": 5.0}
    network = models.logreg()
    steps = run._length(chosen, network, DATA, seconds, run.time.monotonic())["steps"]
    assert steps % plan.POINTS == 0
    assert 500 < steps * 0.03 * (TRIALS + SEEDS) <= 600


def test_rates_that_are_given_are_not_searched(tmp_path):
    records = compare(study(rates=(0.1, 0.2, 0.3), seeds=1), tmp_path)
    assert records.names("search") == []
    found = read(records)
    trained = [found.results[0], found.results[2]]  # the one between has the gradient of the first
    assert [r.outcome.learning_rate for r in trained] == [0.1, 0.3]
    assert records.config["rates"] == [0.1, 0.2, 0.3]
    assert "rates given, not searched" in report([records]).sections[0].made_on
    assert "edge of the search" not in conclusion(found)


def test_batch_schedule_and_evaluation_reach_the_runs(tmp_path):
    changes = {"estimators": ("backprop",), "seeds": 1, "schedule": "cosine", "eval_examples": 7}
    records = compare(study(batch_size=16, rates=(0.1,), **changes), tmp_path)
    config = records.config
    assert (config["batch_size"], config["eval_examples"]) == (16, 7)
    (lines,) = (records.read_lines(name) for name in records.names("runs"))
    for point in lines:
        if "test_accuracy" in point:  # a mean over 7
            assert point["test_accuracy"] * 7 == pytest.approx(round(point["test_accuracy"] * 7))
    (section,) = report([records]).sections
    assert "Batches of 16, rate eta_0 (1 + cos(pi t / T)) / 2" in section.made_on
    assert "end of their schedule" in section.content[0]
    with pytest.raises(UsageError, match="--batch-size 129: small has 128 examples"):
        study(batch_size=129, **changes).configs()


@pytest.mark.parametrize("spoiled", ["validation", "test"])
def test_the_test_part_judges_no_rate_and_no_other_part_is_trained_on(
    spoiled, finished, tmp_path, monkeypatch
):
    """A part of NaN in place of the validation or the test part."""
    images, labels = getattr(DATA, spoiled)
    data = dataclasses.replace(DATA, **{spoiled: (np.full_like(images, np.nan), labels)})
    monkeypatch.setattr("prograde.lab.data.load", lambda source, directory: data)
    records = compare(study(estimators=("backprop",), seeds=1), tmp_path)
    trials = records.read("search/backprop-sgd")["trials"]
    (lines,) = (records.read_lines(name) for name in records.names("runs"))
    if spoiled == "test":
        assert trials == finished.read("search/backprop-sgd")["trials"]
    else:
        assert all(trial["loss"] is None for trial in trials)
        assert lines[-1]["status"] == "completed"
        assert all(math.isfinite(p["batch_loss"]) for p in lines[2:-1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "vgg"}, "--model vgg.*mlp, cnn, mixer, transformer"),
        ({"estimators": ("weight", "magic")}, "--estimators magic.*backprop"),
        ({"optimizers": ()}, "at least one"),
        ({"estimators": ("weight", "weight")}, "each once"),
        ({"estimators": ("scaled-rows",), "model": "cnn"}, "layers of mlp only"),
        ({"estimators": ("local",)}, "local: mlp has no local losses.*local-mixer-s"),
        ({"optimizers": ("lion",)}, "--optimizers lion.*sgd, adam"),
        ({"steps": 5, "minutes": 1.0}, "only one of them"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"rates": (0.1, 0.0, 0.1)}, "--rates 0.1 0 0.1: more than 0"),
        ({"rates": (0.1, math.nan, 0.1)}, "--rates 0.1 nan 0.1: more than 0"),
        ({"rates": (0.1, 0.2)}, "--rates 0.1 0.2: one for all.*3 estimators"),
        ({"steps": None, "minutes": -1.0}, "--minutes -1"),
        ({"steps": None, "minutes": math.nan}, "--minutes nan"),
        ({"seeds": 0}, "--seeds 0"),
        ({"estimates": 7}, "--estimates 7: at least 8"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"schedule": "linear"}, "--schedule linear.*exp, cosine"),
        ({"eval_examples": 0}, "--eval-examples 0: at least 1"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_says_why(changes, words):
    with pytest.raises(UsageError, match=words):
        study(**changes).configs()


def test_names_of_estimators_are_complete():
    assert list(estimators.TITLES) == list(estimators.ESTIMATORS)
    assert study(estimators=()).names == estimators.DEFAULT
    everything = set(estimators.ESTIMATORS)
    assert set(study(estimators=("all",)).names) == everything - set(estimators.LOCAL)
    local = study(estimators=("all",), model="local-mixer-s")
    assert set(local.names) == everything
    assert set(plan.SCHEDULES) == set(schedules.SCHEDULES)
    assert plan.SCHEDULES["exp"] == f"rate eta_0 exp(-{schedules.DECAY:g} t)"


def test_scales_of_rows_follow_the_size_of_their_inputs():
    """rms^-1/2, where an input below a tenth of the layer's counts as a tenth of it."""
    ones = lambda *shape: {"w": jnp.ones(shape), "b": jnp.zeros(shape[-1])}
    params = {"hidden1": ones(2, 1), "hidden2": ones(1, 1), "out": ones(1, 2)}
    images = jnp.asarray([[3.0, 0.0], [3.0, 0.0]])
    scales = jax.jit(estimators.InputRMS())(params, images, jnp.zeros(2))
    mean = np.sqrt(4.5)
    np.testing.assert_allclose(
        scales["hidden1"]["w"], np.array([[3], [0.1 * mean]]) ** -0.5, rtol=1e-5
    )
    np.testing.assert_allclose(scales["out"]["w"], [[3**-0.5]], rtol=1e-5)
    with pytest.raises(ValueError, match="of mlp, but these are other"):
        estimators.InputRMS()({"other": ones(1, 1)}, images, jnp.zeros(2))


def test_a_frontier_is_what_nothing_beats_in_both(seed):
    x, loss = np.random.default_rng(seed).random((2, 60)).round(1)  # with ties
    kept = set(zip(*_frontier(x, loss), strict=True))
    points = set(zip(x, loss, strict=True))
    beaten = {
        (a, b) for a, b in points if any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
    }
    assert kept == points - beaten


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_page_says_what_the_records_do(drawn, monkeypatch):
    """Its words and tables, and the figures as they are drawn."""
    monkeypatch.chdir(ROOT)
    title = "MLP 784-1024-1024-10"  # that of the model which is shortened here
    model = dataclasses.replace(estimators.MODELS["mlp"], title=title)
    monkeypatch.setitem(estimators.MODELS, "mlp", model)
    if not drawn:
        folder = Path("docs/compare")
        monkeypatch.setattr(figures, "svg", lambda f: (folder / f"{f.name}.svg").read_text())
    assert markdown.differences(Path("docs/compare.md"), report_of_directories) == []
