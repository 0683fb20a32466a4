"""Fine-tuning from files to files: what is trained, what is refused, and that stopped, replayed and uninterrupted runs are the same."""

import csv
import dataclasses
import io
import json
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prograde.lab.finetune import ESTIMATORS, TRAIN, Plan, Tuning, calibration, figures_of
from prograde.lab.finetune_run import Job
from rich.console import Console

import prograde as pg
from prograde import lm
from prograde.lab import finetune_report, finetune_run, records, texts
from prograde.lab.data import DataError
from prograde.lab.display import Display

TINY = lm.Architecture(
    vocab_size=256, width=32, num_layers=3, num_heads=4, num_kv_heads=2, hidden=48
)
WORDS = {"no": "n", "yes": "y"}
ROWS = [
    ("it rains and rains", "no"),
    ("the sun is out", "yes"),
    ("mud", "no"),
    ("a blue sky all day long", "yes"),
] * 8
TOKENS = tuple(lm.byte_tokenizer().token_to_id(letter) for letter in "ny")


@pytest.fixture(scope="module")
def model():
    return lm.Decoder.create(jax.random.key(1), TINY)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    lm.save(path, model, lm.byte_tokenizer())
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "weather.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    return path


@pytest.fixture(scope="module")
def examples():
    return texts.examples(ROWS, WORDS, BYTES, "{text} =>", 24, first_token=True)


BYTES = lm.byte_tokenizer()


def copied(model):
    return jax.tree.map(jnp.array, model)


def plan_of(examples, **settings):
    return Plan(
        label_tokens=tuple(int(i) for i in examples.label_tokens), batch_size=8, steps=6, **settings
    )


def trained(plan, model, examples, steps=6):
    tuning = Tuning(plan, copied(model))
    data = tuning.prepare(examples)
    for step, rows in enumerate(tuning.order(len(examples), 0, steps)):
        batch = tuple(x[rows] for x in data)
        if tuning.update is not None:
            tuning.apply(step, tuning.derivatives(step, batch)[1])
        else:
            tuning.step(step, batch)
    return tuning, data


def quiet():
    return Display(Console(file=io.StringIO()))


PARTS = {
    "norm": {},
    "norms": {"layers": (1, 3)},
    "attention": {"layers": (1, 2)},
    "matrices": {"layers": (0, 2)},
    "all": {},
    "lora": {"layers": (1, 3)},
    "readout": {"layers": (2, 3)},
    "subspace": {"layers": (0, 3), "refresh": 2},
}


def test_every_choice_is_tested():
    assert PARTS.keys() == TRAIN.keys()


@pytest.mark.parametrize("train", PARTS)
def test_only_what_is_trained_changes(train, model, examples):
    tuning, _ = trained(
        plan_of(examples, train=train, rate=0.01, tangents=2, **PARTS[train]), model, examples
    )
    after = tuning.model
    assert np.isfinite(float(jnp.sum(after.norm)))
    changed = set()
    before = model.joined().segments[0]
    # products are merged, and segments joined, to compare them with the model as it was
    whole = after.segments
    first = 0
    for blocks in whole:
        for field in dataclasses.fields(blocks):
            value, old = getattr(blocks, field.name), getattr(before, field.name)
            if old is None:
                continue
            if isinstance(value, lm.LowRankUpdate):
                value = value.base + value.down @ value.up
            differs = np.asarray(
                jnp.any(
                    value != old[first : first + blocks.count], axis=tuple(range(1, value.ndim))
                )
            )
            changed |= {(field.name, first + int(i)) for i in np.flatnonzero(differs)}
        first += blocks.count
    changed |= {("last norm", 0)} if bool(jnp.any(after.norm != model.norm)) else set()
    changed |= {("embedding", 0)} if bool(jnp.any(after.embedding != model.embedding)) else set()
    matrices = ("query", "key", "value", "output", "gate", "up", "down")
    norms = ("attention_norm", "feed_norm")
    layers = range(*PARTS[train].get("layers", (0, 3)))
    wanted = {
        "norm": {("last norm", 0)},
        "norms": {("last norm", 0)} | {(n, i) for n in norms for i in layers},
        "attention": {(n, i) for n in matrices[:4] for i in layers},
        "matrices": {(n, i) for n in matrices for i in layers},
        "all": {("last norm", 0), ("embedding", 0)}
        | {(n, i) for n in matrices + norms for i in layers},
        "lora": {(n, i) for n in matrices for i in layers},
        "readout": {("last norm", 0)} | {(n, i) for n in ("output", "down") for i in layers},
        "subspace": {(n, i) for n in matrices for i in layers},
    }[train]
    assert changed == wanted


@pytest.mark.parametrize("train", ["norm", "norms", "readout", "lora"])
def test_states_before_the_trained_layers_change_nothing(train, model, examples):
    plan = plan_of(examples, train=train, **({"layers": (1, 3)} if train != "norm" else {}))
    tuning = Tuning(plan, model)
    data = tuning.prepare(examples)
    assert tuning.prefix
    found = tuning.logits(data)
    wanted = [
        model.logits(model(jnp.asarray(t[v])[None])[:, -1], np.asarray(TOKENS))[0]
        for t, v in zip(examples.tokens, examples.valid, strict=True)
    ]
    if train in ("lora", "readout"):  # their products are zero at first
        assert not any(bool(jnp.any(b.down.down @ b.down.up)) for b in tuning.model.segments[1:])
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=0, atol=2e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_agree_on_the_gradient_to_their_noise(estimator, model, examples):
    """With one number trained in each direction there is nothing left to chance: the projection on the gradient is right."""
    plan = plan_of(
        examples,
        train="norm",
        estimator=estimator,
        tangents=1 if "back" in estimator or "ch" in estimator else 64,
    )
    tuning = Tuning(plan, model)
    data = tuple(x[:8] for x in tuning.prepare(examples))
    fun = tuning._fun(tuning.frozen)
    grads = jax.grad(lambda p: jnp.mean(fun(p, *data)))(tuning.state.params).norm
    found = tuning.estimator.estimate(fun, jax.random.key(0), None, tuning.state.params, *data)
    cosine = (
        jnp.vdot(found.grads.norm, grads)
        / jnp.linalg.norm(found.grads.norm)
        / jnp.linalg.norm(grads)
    )
    # 64 tangents for 32 numbers: a random vector has a cosine above 0.7 with a probability of 1e-6
    assert cosine > (0.999 if estimator in ("backprop", "checkpointed") else 0.7)


def test_lozo_merges_and_redraws(model, examples):
    plan = plan_of(
        examples, train="subspace", layers=(0, 3), refresh=2, rate=0.1, rank=2, optimizer="momentum"
    )
    tuning, data = trained(plan, model, examples, steps=2)
    before, logits = jax.tree.map(np.array, tuning.model.segments[0].gate), tuning.logits(data)
    rows = next(iter(tuning.order(len(examples), 2, 1)))
    derivatives = jnp.zeros((1, 1, 1))
    tuning.apply(2, derivatives)
    after = tuning.model.segments[0].gate
    assert not jnp.any(after.down)
    assert bool(jnp.any(after.up != before.up))
    np.testing.assert_allclose(after.base, before.base + before.down @ before.up, atol=1e-6)
    np.testing.assert_allclose(tuning.logits(data), logits, atol=1e-5)
    assert len(rows) == 8


def test_readout_directions_are_those_in_which_labels_differ(model, examples):
    tuning = Tuning(plan_of(examples, train="readout", layers=(2, 3)), model)
    up = np.asarray(tuning.model.segments[-1].down.up[0])
    difference = np.asarray(model.embedding[TOKENS[1]] - model.embedding[TOKENS[0]])
    assert up.shape == (1, 32)
    assert abs(float(up[0] @ difference) / np.linalg.norm(difference)) == pytest.approx(1, abs=1e-5)


def test_next_token_loss_is_that_of_all_logits(model):
    tokens = np.random.default_rng(0).integers(0, 256, (3, 9)).astype(np.int32)
    tuning = Tuning(Plan(train="norms", batch_size=3), model)
    data = tuning.prepare(texts.Windows(tokens, ()))
    figures = tuning.evaluate(data)
    logits = model.logits(model(jnp.asarray(tokens[:, :-1])))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
    assert figures["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(float((logits.argmax(-1) == tokens[:, 1:]).mean()))


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    margin, labels = rng.integers(0, 5, 40).astype(float), rng.integers(0, 2, 40)
    pairs = margin[labels == 1][:, None] - margin[labels == 0][None]
    wanted = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert figures_of(np.stack([0 * margin, margin], 1), labels)["auc"] == pytest.approx(wanted)


def test_calibration_finds_the_least_loss_and_leaves_the_auc():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    logits = np.stack([np.zeros(400), labels + rng.normal(size=400) + 3.0], 1).astype(np.float32)
    offsets = calibration(logits, labels)
    at = lambda delta: figures_of(logits + np.asarray(offsets) + [0, delta], labels)
    assert at(0)["loss"] < min(at(0.05)["loss"], at(-0.05)["loss"])
    assert at(0)["auc"] == figures_of(logits, labels)["auc"]
    assert sum(offsets) == pytest.approx(0, abs=1e-5)


def job_of(directory, table, **settings):
    given = {
        "template": "{text} =>",
        "labels": WORDS,
        "first_token": True,
        "held_out": 8,
        "max_length": 24,
    }
    given |= {"keep_last": True}
    return Job(str(directory), table, **(given | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "norm", "tangents": 4},
        {"train": "subspace", "refresh": 2},
        {"train": "norm", "estimator": "backprop"},
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(settings, directory, table, tmp_path, monkeypatch):
    plan = Plan(batch_size=8, steps=12, rate=0.01, **settings)
    finetune_run.run(job_of(directory, table), plan, tmp_path / "whole", False, quiet())
    monkeypatch.setattr(finetune_run, "POINTS", 4)
    stop_at = [7]
    real = Tuning.apply if settings.get("estimator") != "backprop" else Tuning.step

    def stopping(self, step, *rest, **named):
        if step == stop_at[0]:
            raise KeyboardInterrupt
        return real(self, step, *rest, **named)

    monkeypatch.setattr(Tuning, real.__name__, stopping)
    with pytest.raises(KeyboardInterrupt):
        finetune_run.run(job_of(directory, table), plan, tmp_path / "stopped", False, quiet())
    stop_at[0] = -1
    with pytest.raises(records.RecordError, match="--resume"):
        finetune_run.run(job_of(directory, table), plan, tmp_path / "stopped", False, quiet())
    finetune_run.run(job_of(directory, table), plan, tmp_path / "stopped", True, quiet())
    last = [
        records.read_lines(tmp_path / name / finetune_run.CURVE)[-1]
        for name in ("whole", "stopped")
    ]
    assert last[0]["loss"] == last[1]["loss"]
    if settings.get("estimator") != "backprop":
        logs = [
            pg.replay.ReplayLog.open(tmp_path / name / finetune_run.LOG)
            for name in ("whole", "stopped")
        ]
        assert logs[0].digest(12) == logs[1].digest(12)
    again = records.read_json(tmp_path / "whole" / finetune_run.SUMMARY)
    assert again["before"] != again["after"]


@pytest.mark.parametrize("train", ["norm", "matrices", "lora", "subspace"])
def test_replay_makes_the_same_bits_without_the_data(train, directory, table, tmp_path):
    plan = Plan(train=train, batch_size=8, steps=9, rate=0.01, refresh=4)
    kept = {}
    finetune_run.run(job_of(directory, table), plan, tmp_path / "run", False, quiet())
    log = tmp_path / "run" / finetune_run.LOG
    finetune_run.replay(str(directory), log, tmp_path / "out", None, quiet())
    model, _ = lm.load(directory)
    after, _ = lm.load(tmp_path / "out")
    assert pg.replay.fingerprint(after) != pg.replay.fingerprint(model)
    summary = records.read_json(tmp_path / "run" / finetune_run.SUMMARY)
    # the replayed weights answer as the run's last ones did
    job = job_of(directory, table)
    tokenizer = lm.byte_tokenizer()
    held_out = finetune_run.read(job, 0, tokenizer).held_out
    fresh = Tuning(
        Plan(train="norm", label_tokens=TOKENS, offsets=tuple(summary["label_offsets"])), after
    )
    found = fresh.evaluate(fresh.prepare(held_out))
    assert found["loss"] == pytest.approx(summary["final"]["loss"], rel=1e-5)
    # and the same log gives the same bits
    finetune_run.replay(str(directory), log, tmp_path / "again.safetensors", None, quiet())
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    finetune_run.replay(str(directory), log, tmp_path / "none", 0, quiet())
    kept = lm.load(tmp_path / "none")[0]
    np.testing.assert_array_equal(kept.segments[0].gate, model.segments[0].gate)


def test_what_is_kept_is_the_least_validation_loss(directory, table, tmp_path, monkeypatch):
    """A rate that is too large makes it worse after a while; what comes out, and what a replay gives, is from before."""
    job = job_of(directory, table, keep_last=False)
    plan = Plan(train="norm", batch_size=8, steps=200, rate=0.3, decay=False)
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    finetune_run.run(job, plan, run, False, quiet())
    summary, curve = (
        records.read_json(run / finetune_run.SUMMARY),
        records.read_lines(run / finetune_run.CURVE),
    )
    losses = [point["validation_loss"] for point in curve]
    assert summary["final"] == curve[int(np.argmin(losses))]
    assert len(curve) - 1 - int(np.argmin(losses)) == 6  # and it ended there
    finetune_run.replay(str(directory), run, tmp_path / "out", None, quiet())
    after, tokenizer = lm.load(tmp_path / "out")
    fresh = Tuning(
        Plan(train="norm", label_tokens=TOKENS, offsets=tuple(summary["label_offsets"])), after
    )
    found = fresh.evaluate(fresh.prepare(finetune_run.read(job, 0, tokenizer).held_out))
    assert found["loss"] == pytest.approx(summary["final"]["loss"], rel=1e-5)

    real, stop_at = Tuning.apply, curve[-1]["step"] - 3

    def stopping(self, step, *rest):
        if step == stop_at:
            raise KeyboardInterrupt
        return real(self, step, *rest)

    monkeypatch.setattr(Tuning, "apply", stopping)
    with pytest.raises(KeyboardInterrupt):
        finetune_run.run(job, plan, stopped, False, quiet())
    monkeypatch.setattr(Tuning, "apply", real)
    finetune_run.run(job, plan, stopped, True, quiet())
    again = records.read_json(stopped / finetune_run.SUMMARY)
    assert again["after"] == summary["after"]
    assert again["final"]["step"] == summary["final"]["step"]
    finetune_run.run(job, plan, stopped, True, quiet())  # of a run that ended nothing changes
    assert records.read_json(stopped / finetune_run.SUMMARY)["after"] == summary["after"]


def test_replay_refuses_what_does_not_fit(directory, table, tmp_path):
    finetune_run.run(
        job_of(directory, table),
        Plan(train="norm", batch_size=8, steps=3),
        tmp_path / "run",
        False,
        quiet(),
    )
    log = tmp_path / "run" / finetune_run.LOG
    other = tmp_path / "other"
    lm.save(other, lm.Decoder.create(jax.random.key(2), TINY), lm.byte_tokenizer())
    with pytest.raises(pg.replay.LogError, match="fingerprint"):
        finetune_run.replay(str(other), log, tmp_path / "out", None, quiet())
    with pytest.raises(pg.replay.LogError, match="holds 3"):
        finetune_run.replay(str(directory), log, tmp_path / "out", 4, quiet())
    with pytest.raises(pg.replay.LogError, match="exists"):
        finetune_run.replay(str(directory), log, other, None, quiet())
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "altered.log").write_bytes(content)
    with pytest.raises(pg.replay.LogError):
        finetune_run.replay(
            str(directory), tmp_path / "altered.log", tmp_path / "out", None, quiet()
        )
    assert not (tmp_path / "out").exists()


def test_a_version_that_may_draw_otherwise_is_refused(directory, table, tmp_path, monkeypatch):
    finetune_run.run(
        job_of(directory, table),
        Plan(train="norm", batch_size=8, steps=3),
        tmp_path / "run",
        False,
        quiet(),
    )
    monkeypatch.setattr(pg, "__version__", "99.0")
    with pytest.raises(pg.replay.LogError, match=r"99\.0"):
        finetune_run.replay(
            str(directory), tmp_path / "run" / finetune_run.LOG, tmp_path / "out", None, quiet()
        )


def test_the_log_of_a_fine_tune_is_small(directory, table, tmp_path):
    plan = Plan(train="norm", batch_size=8, steps=1000)
    finetune_run.run(job_of(directory, table), plan, tmp_path / "run", False, quiet())
    assert (tmp_path / "run" / finetune_run.LOG).stat().st_size <= 10_240


def test_too_little_memory_is_said_before_anything_is_run(directory, table, tmp_path):
    job = job_of(directory, table, memory_limit=0.001)
    with pytest.raises(finetune_run.MemoryLimitError, match="--batch-size"):
        finetune_run.run(
            job, Plan(train="norm", batch_size=8, steps=3), tmp_path / "run", False, quiet()
        )
    assert not (tmp_path / "run" / finetune_run.LOG).exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_its_records(directory, table, tmp_path):
    plan = Plan(train="norm", optimizer="sgd", batch_size=8, steps=40, rate=3e38, decay=False)
    with pytest.raises(finetune_run.DivergedError, match="--rate"):
        finetune_run.run(job_of(directory, table), plan, tmp_path / "run", False, quiet())
    assert records.read_lines(tmp_path / "run" / finetune_run.CURVE)[0]["step"] == 0


def test_plain_text_is_learned(directory, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("abcdefghij" * 80)
    job = Job(str(directory), path, max_length=10, held_out=4, calibrate=False)
    plan = Plan(train="all", estimator="backprop", batch_size=8, steps=60, rate=0.01)
    finetune_run.run(job, plan, tmp_path / "run", False, quiet())
    curve = records.read_lines(tmp_path / "run" / finetune_run.CURVE)
    assert curve[-1]["loss"] < curve[0]["loss"] / 2
    again, _ = lm.load(finetune_run.exported(tmp_path / "run"))
    assert again.architecture.num_layers == 3
    page = finetune_report.build(tmp_path / "run").read_text()
    assert "perplexity" in page


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("text,label\n", {}, "no examples"),
        ("text,label\na,no\nb,no\n", {}, "Two labels"),
        ("text,label\na,no\nb,maybe\n", {}, "'maybe'"),
        ("words,label\na,no\nb,yes\n", {}, "'words'"),
        (
            "text,label\n" + "a,no\nb,yes\n" * 8,
            {"labels": {"no": "never", "yes": "y"}, "first_token": False},
            "--first-token",
        ),
        ("text,label\n" + "a,no\nb,yes\n" * 8, {"labels": {"no": "n", "yes": "no"}}, "same token"),
        ("text,label\n" + "a,no\nb,yes\n" * 8, {"template": "no place"}, "{text}"),
        ("text,label\n" + "a,no\nb,yes\n" * 8, {"max_length": 3}, "--max-length"),
    ],
)
def test_bad_tables_are_refused(content, settings, message, directory, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    job = job_of(directory, path, **settings)
    with pytest.raises(DataError, match=message.replace("{", r"\{")):
        finetune_run.read(job, 0, lm.byte_tokenizer())


def test_long_texts_are_cut_and_counted(directory, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [
        {"text": "x" * 50 if i < 3 else "short", "label": ("no", "yes")[i % 2]} for i in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    job = job_of(directory, path, held_out=2)
    data = finetune_run.read(job, 0, lm.byte_tokenizer())
    assert sum(int(note.split(": ")[1].split(" of ")[0]) for note in data.notes) == 3
    assert data.train.tokens.shape[1] <= 24
    assert (data.train.tokens[:, -3:] == lm.byte_tokenizer().encode(" =>").ids).sum() in range(
        0, 3 * 6 + 1
    )


def test_plans_say_what_is_wrong(model, examples):
    for settings, message in (
        ({"train": "nothing"}, "norm"),
        ({"groups": 3, "batch_size": 8}, "divide"),
        ({"rate": -1.0}, "positive"),
        ({"tangents": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Plan(**settings)
    with pytest.raises(ValueError, match="layers"):
        Tuning(plan_of(examples, train="norms", layers=(2, 9)), model)
    with pytest.raises(ValueError, match="readout"):
        Tuning(Plan(train="readout"), model)


@pytest.mark.parametrize("train", ["norm", "lora", "readout"])
def test_quantized_matrices_stay_quantized(train, examples):
    gguf = pytest.importorskip("gguf")
    model = lm.Decoder.create(jax.random.key(3), dataclasses.replace(TINY, width=32, hidden=64))

    def quantized(stack):
        data = [gguf.quantize(np.asarray(w.T), gguf.GGMLQuantizationType.Q8_0) for w in stack]
        return lm.Quantized.from_gguf(np.stack(data), "Q8_0")

    names = ("query", "key", "value", "output", "gate", "up", "down")
    blocks = model.segments[0]
    blocks = eqx.tree_at(
        lambda b: [getattr(b, n) for n in names],
        blocks,
        [quantized(getattr(blocks, n)) for n in names],
    )
    model = eqx.tree_at(lambda m: m.segments[0], model, blocks)
    tuning, data = trained(plan_of(examples, train=train, rate=0.01), model, examples)
    assert np.isfinite(tuning.evaluate(data)["loss"])
    kept = [x for x in jax.tree.leaves(tuning.model) if x.dtype == jnp.uint8]
    assert sum(x.size for x in kept) == sum(
        x.size for x in jax.tree.leaves(blocks) if x.dtype == jnp.uint8
    )
    for refused in ("matrices", "subspace"):
        with pytest.raises(ValueError, match="quantized"):
            Tuning(plan_of(examples, train=refused), model)


def command(*words, **settings):
    return subprocess.run(
        [sys.executable, "-m", "prograde.lab.cli", *map(str, words)],
        capture_output=True,
        text=True,
        **settings,
    )


def test_the_command_from_files_to_files(directory, table, tmp_path):
    options = [
        "--template",
        "{text} =>",
        "--labels",
        "no=n",
        "yes=y",
        "--first-token",
        "--held-out",
        8,
        "--max-length",
        24,
    ]
    out = tmp_path / "run"
    done = command(
        "finetune",
        "--model",
        directory,
        "--data",
        table,
        *options,
        "--steps",
        30,
        "--out",
        out,
        "--batch-size",
        8,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "Zero-shot",
        "label bias repaired",
        "Held-out examples",
        "Report:",
        "prograde replay",
    ):
        assert words in done.stdout
    assert "<svg" in (out / "report.html").read_text()
    shown = command("inspect", out)
    assert "30 steps" in shown.stdout
    done = command("replay", directory, out, "-o", tmp_path / "tuned.safetensors")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tuned.safetensors").exists()
    done = command(
        "finetune",
        "--model",
        directory,
        "--data",
        table,
        *options,
        "--train",
        "readout",
        "--layers",
        "last-9",
    )
    assert done.returncode == 2
    assert "layers" in done.stderr
    done = command("finetune", "--model", tmp_path / "none", "--data", table)
    assert done.returncode == 2
    assert "does not exist" in done.stderr


def test_ctrl_c_keeps_the_run_and_says_how_to_go_on(directory, table, tmp_path):
    out = tmp_path / "run"
    words = [
        "--template",
        "{text} =>",
        "--labels",
        "no=n",
        "yes=y",
        "--held-out",
        "8",
        "--max-length",
        "24",
        "--batch-size",
        "8",
    ]
    words = [
        "finetune",
        "--model",
        str(directory),
        "--data",
        str(table),
        *words,
        "--steps",
        "100000",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "prograde.lab.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / finetune_run.LOG).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    log = pg.replay.ReplayLog.open(out / finetune_run.LOG)
    assert len(log) > 0
