"""Runs from files to files: stopped, replayed and uninterrupted runs are the same.

Which rows reach which step, which parameters are kept, and what is said before and after.
"""

import dataclasses
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from rich.console import Console

import prograde as pg
from prograde import lm
from prograde.lab.commands.report import report_of
from prograde.lab.data import DataError
from prograde.lab.display import Display
from prograde.lab.report import page, terminal
from prograde.lab.store import RecordError, Store, claim
from prograde.lab.studies.finetune import examples, search, steps
from prograde.lab.studies.finetune import run as running
from prograde.lab.studies.finetune.plan import Data, Finetune, Model, Plan
from prograde.lab.studies.finetune.replaying import replay
from prograde.lab.studies.finetune.tuning import Tuning
from prograde.lab.study import UsageError

GOOD = "text,label\n" + "".join(f"a{i},no\nb{i},yes\n" for i in range(8))
long = pytest.mark.long
TOKENS = tuple(lm.byte_tokenizer().token_to_id(letter) for letter in "ny")


def stop_at(monkeypatch, step, method="apply"):
    """Presses Ctrl-C before a step."""
    real = getattr(Tuning, method)

    def stopping(self, now, *rest, **named):
        if now == step:
            raise KeyboardInterrupt
        return real(self, now, *rest, **named)

    monkeypatch.setattr(Tuning, method, stopping)


def without_times(points):
    return [{k: v for k, v in p.items() if k not in ("seconds", "rss")} for p in points]


FINISHED = {"train": "norm", "tangents": 4, "steps": 12}


@pytest.fixture(scope="module")
def finished(study_of, run, tmp_path_factory):
    """A run of twelve steps that was never stopped, with two further seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "POINTS", 4)
        return run(study_of(FINISHED, repeats=2), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def log(finished):
    return finished.path("replay.log")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (FINISHED, {"repeats": 2}),
        pytest.param(FINISHED, {"keep_last": False}, marks=long),
        pytest.param({"train": "subspace", "refresh": 2}, {}, marks=long),
        pytest.param({"train": "norm", "estimator": "backprop"}, {"keep_last": False}, marks=long),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    settings, options, finished, study_of, run, directory, display, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "POINTS", 4)
    study = study_of({"steps": 12, **settings}, **options)
    whole = finished if "repeats" in options else run(study, tmp_path / "whole")
    backward = settings.get("estimator") == "backprop"
    with monkeypatch.context() as patch:
        stop_at(patch, 8, "step" if backward else "apply")
        with pytest.raises(KeyboardInterrupt):
            run(study, tmp_path / "stopped")
    with pytest.raises(RecordError, match="--resume"):
        run(study, tmp_path / "stopped")
    if not backward:  # a replay of less than all must be asked for
        with pytest.raises(UsageError, match=r"of 12 planned steps.* --partial"):
            replay(str(directory), tmp_path / "stopped", tmp_path / "no", None, display)
    stopped = run(study, tmp_path / "stopped", resume=True)
    found, wanted = (without_times(s.read_lines("curve")) for s in (stopped, whole))
    assert found == wanted
    assert [point["step"] for point in found] == [0, 3, 6, 9, 12]
    if not backward:
        logs = [pg.replay.ReplayLog.open(s.path("replay.log")) for s in (whole, stopped)]
        assert logs[0].digest(12) == logs[1].digest(12)
    assert whole.read("summary")["before"] != whole.read("summary")["after"]
    again = run(study, tmp_path / "stopped", resume=True)  # nothing is left to do
    assert again.read_lines("curve") == stopped.read_lines("curve")


@pytest.mark.parametrize(
    "train",
    ["norm", *(pytest.param(t, marks=long) for t in ("matrices", "lora", "subspace"))],
)
def test_replay_makes_the_same_bits_without_the_data(
    train, finished, study_of, run, directory, display, tmp_path
):
    study = study_of({"train": train, "steps": 9, "refresh": 4})
    store = finished if train == "norm" else run(study, tmp_path / "run")
    log, summary = store.path("replay.log"), store.read("summary")
    replay(str(directory), log, tmp_path / "out", None, display)
    model, _ = lm.load(directory)
    after, tokenizer = lm.load(tmp_path / "out")
    assert pg.replay.fingerprint(after) != pg.replay.fingerprint(model)
    # the replayed weights answer as the run's last ones did
    offsets = tuple(summary["label_offsets"])
    plan = Plan(train="norm", batch_size=8, label_tokens=TOKENS, offsets=offsets)
    fresh = Tuning(plan, after)
    held_out = examples.read(study.resolved().data, 0, tokenizer).held_out
    found = fresh.evaluate(fresh.prepare(held_out))
    assert found["loss"] == pytest.approx(summary["final"]["loss"], rel=1e-5)
    # the same log gives the same bits
    replay(str(directory), log, tmp_path / "again.safetensors", None, display)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == weights
    replay(str(directory), log, tmp_path / "again.gguf", None, display)
    found = pg.kit.float_leaves(lm.load(tmp_path / "again.gguf")[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        found,
        pg.kit.float_leaves(after),
    )
    replay(str(directory), log, tmp_path / "none", 0, display)
    kept = lm.load(tmp_path / "none")[0]
    np.testing.assert_array_equal(kept.segments[0].gate, model.segments[0].gate)


def rows_of(data):
    return {x.tobytes() for x in np.asarray(data[0])}


@pytest.fixture(scope="module")
def searched(study_of, run, tmp_path_factory):
    """A run whose rate is searched, and what its steps and points saw: (study, store, seen)."""
    seen = {"steps": set(), "evaluated": []}
    derivatives, evaluate = Tuning.derivatives, Tuning.evaluate

    def watched(self, step, batch):
        seen["steps"] |= rows_of(batch)
        return derivatives(self, step, batch)

    def watched_evaluate(self, data):
        seen["evaluated"].append(frozenset(rows_of(data)))
        return evaluate(self, data)

    plan = {"train": "norm", "steps": 8, "rate": None}
    study = study_of(plan, keep_last=False, rates="search", repeats=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuning, "derivatives", watched)
        patch.setattr(Tuning, "evaluate", watched_evaluate)
        store = run(study, tmp_path_factory.mktemp("searched") / "run")
    return study, store, seen


def test_validation_and_held_out_rows_reach_no_step(searched):
    """Steps, trials and repeats see training rows; points see held-out and validation rows."""
    study, store, seen = searched
    plan = dataclasses.replace(study.resolved().plan, label_tokens=TOKENS)
    model, tokenizer = lm.load(study.model.model)
    tuning = Tuning(plan, model)
    data = examples.read(study.resolved().data, 0, tokenizer)
    parts = steps.Parts.split(tuning.prepare(data.train), tuning.prepare(data.held_out), 4)
    assert store.read("summary")["examples"] == {"training": 20, "validation": 4, "held_out": 8}
    train, validation, held_out = map(rows_of, (parts.train, parts.validation, parts.held_out))
    assert (len(train), len(validation), len(held_out)) == (20, 4, 8)
    assert len(train | validation | held_out) == 32
    assert seen["steps"] == train  # all of them, and nothing else
    assert set(seen["evaluated"]) == {frozenset(validation), frozenset(held_out)}
    point = store.read_lines("curve")[0]
    tuning.calibrate(tuple(store.read("summary")["label_offsets"]))
    for figure, part in (("loss", parts.held_out), ("validation_loss", parts.validation)):
        assert point[figure] == pytest.approx(tuning.evaluate(part)["loss"], rel=1e-5)
    # the search looks at the validation part alone: before its first point only zero-shot figures
    # are taken on held-out rows
    trials = len(search.FACTORS) * 5 * 2
    assert seen["evaluated"][: 1 + trials].count(frozenset(held_out)) == 1


def test_texts_in_both_tables_are_not_trained_on(rows, study_of, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows[:6]))
    study = study_of({"train": "norm", "steps": 2}, {"held_out_data": other, "held_out": None})
    split = examples.read(study.resolved().data, 0, lm.byte_tokenizer())
    assert (len(split.train), len(split.held_out)) == (26, 6)
    assert not rows_of([split.train.tokens]) & rows_of([split.held_out.tokens])


POINTS = [9.0, 5.0, 4.0, 6.0, 7.0, 4.0, 8.0, 9.0, 8.0, 7.0, 6.0]


@pytest.mark.parametrize(("patience", "ends"), [(1, 3), (2, 4), (3, 5), (5, 7), (6, 8), (99, None)])
def test_a_run_ends_when_patience_has_run_out(patience, ends, monkeypatch):
    """The best point is the third; as many points without a better one end the run."""
    monkeypatch.setattr(steps, "PATIENCE", patience)
    task = steps.Steps(None, steps.Parts((), (np.zeros(1),), ()))
    points = [{"step": i, "validation_loss": loss} for i, loss in enumerate(POINTS)]
    over = [task.over(points[: i + 1]) for i in range(len(points))]
    assert (over.index(True) if True in over else None) == ends
    assert task.kept(points) is points[2]
    points[4]["validation_loss"] = float("nan")  # is never the best
    assert task.kept(points) is points[2]
    assert steps.Steps(None, steps.Parts((), None, ())).kept(points) is points[-1]
    assert not steps.Steps(None, steps.Parts((), None, ())).over(points)


def test_patience_is_six_of_twenty_points():
    assert (steps.PATIENCE, steps.POINTS) == (6, 20)


def test_what_is_kept_is_the_least_validation_loss(
    study_of, run, directory, display, tmp_path, monkeypatch
):
    """A rate that is too large makes it worse; what is kept, and replayed, is from before."""
    plan = {"train": "norm", "tangents": 1, "steps": 200, "rate": 0.3, "constant_rate": True}
    study = study_of(plan, keep_last=False)
    store = run(study, tmp_path / "run")
    summary, curve = store.read("summary"), store.read_lines("curve")
    losses = [point["validation_loss"] for point in curve]
    best = int(np.argmin(losses))
    assert summary["final"] == curve[best]
    assert best < len(curve) - 1
    replay(str(directory), tmp_path / "run", tmp_path / "out", None, display)
    after, tokenizer = lm.load(tmp_path / "out")
    offsets = tuple(summary["label_offsets"])
    fresh = Tuning(Plan(train="norm", batch_size=8, label_tokens=TOKENS, offsets=offsets), after)
    held_out = examples.read(study.resolved().data, 0, tokenizer).held_out
    found = fresh.evaluate(fresh.prepare(held_out))
    assert found["loss"] == pytest.approx(summary["final"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([3.0, 2.0, 1.0, 4.0], 0.03),
        ([float("nan"), 3.0, None, 2.9], 0.09),
        ([3.0, float("nan"), None, 3.1], 0.01 / 3),
        ([1.0, 1.0, 1.0, 1.0], 0.01 / 3),
        ([None] * 4, 0.01 / 30),
    ],
)
def test_the_rate_of_least_validation_loss_is_taken(losses, wanted):
    rates = [0.01 / 3, 0.01, 0.03, 0.09]
    trials = [{"rate": r, "loss": x} for r, x in zip(rates, losses, strict=True)]
    assert search.best_rate(trials, 0.03) == pytest.approx(wanted)


def test_a_search_is_recorded_and_continued(searched, run, tmp_path, monkeypatch):
    study, store, _ = searched
    found = store.read("rates")
    rates = [trial["rate"] for trial in found["trials"]]
    assert rates == [0.00333, 0.01, 0.03, 0.09]
    assert found["steps"] == 8
    assert found["seed"] == 1_000_000
    assert store.read("summary")["rate"] == search.best_rate(found["trials"], 0.03)
    header = pg.replay.ReplayLog.open(store.path("replay.log")).header
    assert header["config"]["plan"]["rate"] == store.read("summary")["rate"]
    # stopped after two trials, it goes on to the same record
    begun = {"n": 0}
    real = search.begin_again

    def stopping(*arguments):
        begun["n"] += 1
        if begun["n"] == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search, "begin_again", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(study, tmp_path / "stopped")
    assert len(Store(tmp_path / "stopped").read("rates")["trials"]) == 2
    assert run(study, tmp_path / "stopped", resume=True).read("rates") == found


@pytest.mark.parametrize(
    ("rates", "validated", "wanted"),
    [
        (None, True, 0.07),
        (None, False, 0.03),
        ("default", True, 0.03),
        ("search", True, 0.07),
        ("search", False, "--rates search"),
    ],
)
def test_a_rate_is_given_or_searched_or_the_default(
    rates, validated, wanted, study_of, display, tmp_path, monkeypatch
):
    monkeypatch.setattr(search, "search", lambda *_: 0.07)
    plan = {"train": "norm", "steps": 2, "rate": None}
    study = study_of(plan, rates=rates, keep_last=not validated)
    parts = steps.Parts((), (np.zeros(1),) if validated else None, ())
    rate_of = lambda plan: running._with_rate(
        study, plan, None, (), parts, 0.01, Store(tmp_path), display
    )
    if wanted == "--rates search":
        with pytest.raises(UsageError, match="--rates search needs a validation part"):
            rate_of(study.plan)
    else:
        assert rate_of(study.plan).rate == wanted
    assert rate_of(dataclasses.replace(study.plan, rate=0.1)).rate == 0.1
    with pytest.raises(UsageError, match="--rates search"):
        study_of({"train": "norm", "steps": 2, "rate": 0.1}, rates="search").configs()


def test_further_seeds_have_the_same_split_and_start(finished):
    repeats = finished.read("repeats")
    assert [run["seed"] for run in repeats] == [1, 2]
    final = finished.read("summary")["final"]
    assert len({final["loss"], *(run["loss"] for run in repeats)}) == 3
    text = said(report_of([finished]))
    assert "The seed is 0." in text
    values = [final["loss"], *(run["loss"] for run in repeats)]
    assert f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" in text
    assert "standard error of the accuracy" in text


def said(report):
    """What a terminal shows of a report."""
    console = Console(file=io.StringIO(), width=200)
    terminal.print_report(report, console)
    return console.file.getvalue()


def test_examples_that_changed_are_shown_first(study_of, run, tmp_path):
    plan = {"train": "norm", "estimator": "backprop", "steps": 12, "rate": 0.1}
    store = run(study_of(plan, {"held_out": 16}), tmp_path / "run")
    summary = store.read("summary")
    changed = [
        np.argmax(a) != np.argmax(b)
        for a, b in zip(summary["before"], summary["after"], strict=True)
    ]
    assert len(changed) == 8
    counts = summary["changed"]
    assert counts["examples"] == 16
    assert 0 < counts["all"] == counts["to_right"] + counts["to_wrong"]
    assert changed == [True] * min(8, counts["all"]) + [False] * max(0, 8 - counts["all"])
    assert f"{counts['all']} of 16 answers changed" in said(report_of([store]))


def test_data_is_never_markup(rows, directory, run, tmp_path):
    """Brackets and control characters in texts, labels and paths are shown as they are."""
    path = tmp_path / "we[red]ather\x1b[31m.csv"
    evil = [(f"[/b]{text} \x1b[31m\x1b]0;x\x07", f"[{label}]") for text, label in rows]
    path.write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in evil))
    data = Data(data=path, labels=("[no]=n", "[yes]=y"), held_out=8, max_length=60)
    study = Finetune(
        Model(str(directory)), data, Plan(train="norm", batch_size=8, steps=2, rate=0.1),
        keep_last=True, repeats=0,
    )  # fmt: skip
    store = run(study, tmp_path / "run")
    text = said(report_of([store]))
    assert not {"\x1b", "\x07"} & set(text)
    assert all(shown in text for shown in ("[/b]", "[no]", "\\x1b[31m"))
    html = page.write(report_of([store]), tmp_path / "report.html").read_text()
    assert "[/b]" in html
    console = Console(file=io.StringIO(), force_terminal=False)
    broken = tmp_path / "broken.csv"
    broken.write_text("text,label\n" + "".join(f"{t},[/b]\x1b[31m\n" for t, _ in evil))
    with pytest.raises(DataError) as error:
        dataclasses.replace(study, data=dataclasses.replace(data, data=broken)).configs()
    terminal.say(console, str(error.value))
    assert "\x1b" not in console.file.getvalue()


def test_replay_refuses_what_does_not_fit(log, directory, display, tmp_path):
    other = tmp_path / "other"
    architecture = lm.load(directory)[0].architecture
    lm.save(other, lm.Decoder.create(jax.random.key(2), architecture), lm.byte_tokenizer())
    altered = tmp_path / "altered.log"
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    out = tmp_path / "out"
    for base, path, where, count, message in (
        (other, log, out, None, "fingerprint"),
        (directory, log, out, 13, "holds 12"),
        (directory, log, other, None, "exists"),
        (directory, log, tmp_path / "tuned.pt", None, "safetensors"),
        (directory, altered, out, None, "altered"),
        (tmp_path / "none", log, out, None, "does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            replay(str(base), path, where, count, display)
        assert where.exists() == (where == other)


def test_a_replay_of_less_than_all_must_be_asked_for(log, directory, display, tmp_path):
    """A torn log, and the whole one."""
    whole = pg.replay.ReplayLog.open(log)
    assert (len(whole), whole.planned, whole.finished) == (12, 12, True)
    assert 12 in whole.fingerprints
    torn = tmp_path / "torn.log"
    torn.write_bytes(log.read_bytes()[:-90])
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="add --partial"):
        replay(str(directory), torn, out, None, display)
    assert not out.exists()
    held = len(pg.replay.ReplayLog.open(torn, partial=True))
    replay(str(directory), torn, out, None, display, partial=True)
    replay(str(directory), log, tmp_path / "first", held, display)
    assert weights(out) == weights(tmp_path / "first")


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def test_a_replay_with_another_update_is_noticed(log, directory, display, tmp_path, monkeypatch):
    """The optimizer of the run is not that of the replay: the fingerprints differ."""
    from prograde.lab.studies.finetune import tuning

    monkeypatch.setitem(tuning.OPTIMIZERS, "adam", tuning.OPTIMIZERS["sgd"])
    with pytest.raises(UsageError, match="--no-verify"):
        replay(str(directory), log, tmp_path / "out", None, display)
    assert not (tmp_path / "out").exists()
    other = tmp_path / "other"
    replay(str(directory), log, other, None, display, verify=False)
    assert other.exists()


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_inspect_says_what_is_lost(damage, finished, tmp_path):
    """5 bytes cut off, or a bit turned in the last block: exit status 1, and how many are whole."""
    from prograde.lab.commands.inspect import Inspect

    log = shutil.copytree(finished.directory, tmp_path / "run") / "replay.log"
    shown = lambda: Console(file=io.StringIO(), width=200)
    console, errors = shown(), shown()
    assert Inspect(tmp_path / "run")(console, errors, ()) == 0
    assert "12 steps of 12 planned; the run was over" in console.file.getvalue()
    content = bytearray(log.read_bytes())
    if damage == "cut":
        content = content[:-5]
    else:
        content[-30] ^= 1
    log.write_bytes(content)
    console, errors = shown(), shown()
    assert Inspect(log)(console, errors, ()) == 1
    assert "of 12 planned" in console.file.getvalue()
    assert str(log) in errors.file.getvalue()


def test_a_version_that_may_draw_otherwise_is_refused(
    log, directory, display, tmp_path, monkeypatch
):
    monkeypatch.setattr(pg, "__version__", "99.0")
    with pytest.raises(UsageError, match=r"99\.0"):
        replay(str(directory), log, tmp_path / "out", None, display)


def test_the_log_is_as_large_as_it_was_said(study_of, run, tmp_path):
    study = study_of({"train": "norm", "steps": 50, "tangents": 48})
    console = Console(file=io.StringIO(), width=300)
    configs = study.configs()
    claim("finetune", {tmp_path / "run": configs["."]}, False)
    study.run({".": Store(tmp_path / "run")}, Display(console))
    told = re.search(r"The log takes about ([\d.]+)\s(\w+)\.", console.file.getvalue())
    size = (tmp_path / "run" / "replay.log").stat().st_size
    assert float(told[1]) * {"kB": 1e3, "MB": 1e6, "B": 1}[told[2]] == 50 * (8 + 4 * 48)
    assert size == pytest.approx(50 * (8 + 4 * 48), abs=4_000)  # the header, digests, fingerprints
    assert "computed once, in about" in console.file.getvalue()


def test_too_little_memory_is_said_before_anything_is_run(study_of, run, tmp_path):
    with pytest.raises(running.MemoryLimitError, match="--batch-size"):
        run(study_of({"train": "norm", "steps": 3}, memory_limit=0.001), tmp_path / "run")
    assert not (tmp_path / "run" / "replay.log").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_its_records(study_of, run, tmp_path):
    plan = {"train": "norm", "optimizer": "sgd", "steps": 40, "rate": 3e38, "constant_rate": True}
    with pytest.raises(running.DivergedError, match="--rate"):
        run(study_of(plan), tmp_path / "run")
    assert Store(tmp_path / "run").read_lines("curve")[0]["step"] == 0


def test_a_model_without_a_finite_loss_is_refused(study_of, run, model, tmp_path):
    """The figures of a model whose weights overflow are not trained on, and not called learning."""
    broken = tmp_path / "broken"
    weights = model.norm.at[0].set(float("inf"))
    lm.save(broken, dataclasses.replace(model, norm=weights), lm.byte_tokenizer())
    study = dataclasses.replace(study_of({"train": "norm", "steps": 3}), model=Model(str(broken)))
    with pytest.raises(UsageError, match="before any step is nan"):
        run(study, tmp_path / "run")


def test_plain_text_is_learned(directory, run, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("abcdefghij" * 80)
    data = Data(data=path, max_length=10, held_out=4)
    plan = Plan(train="all", estimator="backprop", batch_size=8, steps=60, rate=0.01)
    store = run(Finetune(Model(str(directory)), data, plan), tmp_path / "run")
    curve = store.read_lines("curve")
    assert curve[-1]["loss"] < curve[0]["loss"] / 2
    assert lm.load(store.path("model"))[0].architecture.num_layers == 3
    assert "perplexity" in said(report_of([store]))


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("text,label\na,no\nb,no\n", {}, "Two labels"),
        (GOOD + "c,maybe\n", {}, "'maybe'"),
        (GOOD, {"labels": ("no=never", "yes=y")}, "5 tokens"),
        (GOOD, {"labels": ("no=n", "yes=n")}, "same token"),
        ("text,label\na,no\na,no\nb,yes\n", {}, "all 1 training examples have the label"),
        (GOOD, {"template": "no place"}, r"\{text\}"),
        (GOOD, {"held_out": 0}, "--held-out 0"),
        (GOOD, {"labels": ("no", "yes=y")}, "LABEL="),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) < 40 else "given",
)
def test_bad_data_are_refused_before_anything_is_claimed(
    content, settings, message, study_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(lm, "load", None)  # the model is not read
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises((DataError, UsageError), match=message):
        study_of({"train": "norm", "steps": 3}, {"data": path, **settings}).configs()


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ({"groups": 3}, {}, "--groups 3 does not divide"),
        ({"rate": -1.0}, {}, "--rate -1: a positive"),
        ({"rate": float("nan")}, {}, "--rate nan"),
        ({"minutes": 0.0}, {}, "--minutes 0"),
        ({"tangents": 0}, {}, "--tangents 0: at least 1"),
        ({"seed": -1}, {}, "--seed -1"),
        ({"layers": "12"}, {}, "FIRST-LAST"),
        ({"groups": 2, "estimator": "mezo"}, {}, "only weight has groups"),
        ({"train": "all", "rate": None}, {"rates": "search"}, "--rates search needs"),
        ({"train": "all"}, {"repeats": 2}, "--repeats 2 needs"),
        ({}, {"memory_limit": 0.0}, "--memory-limit 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(plan, options, message, study_of):
    with pytest.raises((UsageError, ValueError), match=message):
        study_of(plan, **options).configs()


def test_missing_files_are_noticed_first(study_of, tmp_path):
    study = study_of({"train": "norm"})
    for changed, message in (
        (dataclasses.replace(study, model=Model(str(tmp_path / "no"))), "no does not exist"),
        (dataclasses.replace(study, data=Data(data=tmp_path / "a.csv")), "a.csv does not exist"),
        (dataclasses.replace(study, data=Data(data=tmp_path)), "is no file"),
        (Finetune(), "needs a model and examples"),
    ):
        with pytest.raises((DataError, UsageError), match=message):
            changed.configs()


def test_what_is_fetched_is_said_first(study_of, monkeypatch, display):
    """The first run with smollm2 says what it fetches, and how much."""
    study = dataclasses.replace(study_of({"train": "norm"}), model=Model("smollm2"))

    def missing(fetch=True):
        assert "93 MB" in display.console.file.getvalue() or not fetch
        raise lm.ModelError("not there")

    monkeypatch.setattr(lm, "smollm2", missing)
    study.configs()
    with pytest.raises(UsageError, match="not there"):
        running._read_examples(study, display)
    assert "SmolLM2-135M-Instruct" in display.console.file.getvalue()


def test_layers_that_are_not_there_are_refused(model, plan_of):
    with pytest.raises(ValueError, match="0 to 2"):
        Tuning(plan_of(train="norms", layers="2-8"), model)
    with pytest.raises(ValueError, match="readout"):
        Tuning(Plan(train="readout"), model)
    with pytest.raises(ValueError, match="all layers"):
        Tuning(plan_of(train="all", layers="1-2"), model)


def command(*words, **settings):
    return subprocess.run(
        [sys.executable, "-m", "prograde.lab.cli", *map(str, words)],
        capture_output=True,
        text=True,
        **settings,
    )


OPTIONS = ["--template", "{text} =>", "--labels", "no=n", "yes=y", "--held-out", "8"]
OPTIONS += ["--max-length", "24", "--batch-size", "8"]


@long
def test_the_command_from_files_to_files(directory, table, tmp_path):
    out = tmp_path / "run"
    given = ["finetune", "--model", directory, "--data", table, *OPTIONS]
    done = command(*given, "--steps", 30, "--out", out)
    assert done.returncode == 0, done.stderr
    for words in (
        "Zero-shot",
        "label bias repaired",
        "Held-out examples",
        "Report:",
        "rates tried",
    ):
        assert words in done.stdout
    assert "<svg" in (out / "report.html").read_text()
    assert "of 30 planned" in command("inspect", out).stdout
    again = re.search(r"prograde (replay [^\n]*)", done.stdout)[1]
    done = command(*shlex.split(again))  # the command that the report names
    assert done.returncode == 0, done.stderr
    assert lm.load(f"{out}-tuned")[0].architecture.num_layers == 3
    done = command(*given, "--train", "readout", "--layers", "last-9")
    assert done.returncode == 2
    assert "--layers last-9" in done.stderr
    done = command("finetune", "--model", tmp_path / "none", "--data", table)
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    done = command("finetune", "--from", out)
    assert done.returncode == 0, done.stderr
    assert "Held-out figures" in done.stdout


@long
def test_ctrl_c_keeps_the_run_and_says_how_to_go_on(directory, table, tmp_path):
    out = tmp_path / "run"
    words = ["finetune", "--model", directory, "--data", table, *OPTIONS]
    words += ["--steps", 100_000, "--rate", 0.01, "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "prograde.lab.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (out / "replay.log").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in errors
    assert len(pg.replay.ReplayLog.open(out / "replay.log")) > 0
    assert "--template '{text} =>' --labels no=n yes=y" in errors
    assert json.loads((out / "manifest.json").read_text())["study"] == "finetune"
