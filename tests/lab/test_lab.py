"""The lab: every experiment runs, what is interrupted continues bit for bit, and what goes wrong is contained."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from rich.console import Console

import prograde as pg
from prograde.lab import costs, experiments, records, report, reproduce, summary, train
from prograde.lab.data import Dataset
from prograde.lab.display import Display

TINY = experiments.Budget(
    steps=2, points=2, seeds=1, eval_examples=20, timing_rounds=1, depths=(1, 4)
)
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def small_data(seed):
    """A data set that trains in no time."""
    generator = np.random.default_rng(seed)

    def part(n):
        return generator.random((n, 28, 28), np.float32), generator.integers(0, 10, n).astype(
            np.int32
        )

    return Dataset("small", part(256), part(20), part(20))


@pytest.fixture
def tiny(monkeypatch):
    """All experiments at a budget of two steps, the memory figures without their processes."""
    shortened = {
        name: dataclasses.replace(experiment, quick=TINY)
        for name, experiment in experiments.EXPERIMENTS.items()
    }
    for module in (experiments, costs, summary):
        monkeypatch.setattr(module, "EXPERIMENTS", shortened, raising=False)
    return shortened


def fake_memory(experiment, depth, on_method):
    return {
        m: {"temp_bytes": 1, "argument_bytes": 1, "rss_before": 1, "peak_rss": 1}
        for m in costs.variants(experiment)
    }


def silent():
    return Display(Console(file=open(os.devnull, "w"), force_terminal=False))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", list(experiments.EXPERIMENTS))
def test_every_experiment_runs_two_steps_and_reports(name, tiny, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "memory", fake_memory)
    monkeypatch.setattr(costs, "_SCAN_STEPS", 1)
    reproduce.run_all([tiny[name]], small_data, False, None, tmp_path, False, silent())
    (found,) = summary.find([tmp_path])
    if name == "depth":
        assert sorted(found.depths) == [1, 4]
    else:
        assert {o.method for o in found.outcomes} == set(experiments.METHODS)
        assert {o.setting for o in found.outcomes} >= {"paper", "tuned"}
        assert all(o.finished == 1 for o in found.outcomes)
        assert not list((tmp_path / name / "states").glob("*"))
    page = report.build([tmp_path], tmp_path).read_text()
    assert page.count("<svg") == 1
    assert tiny[name].title in page
    assert not re.search(
        r"""(src|href)=["']?https?:|url\(["']?http|@import|<script""", page
    )  # needs no network
    report.write_markdown([tmp_path], tmp_path / "page.md")
    assert (tmp_path / "page" / f"{name}.svg").exists()
    first = (tmp_path / "page.md").read_text()
    (tmp_path / "page.md").write_text(f"before\n{first}after\n")
    report.write_markdown([tmp_path], tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == f"before\n{first}after\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's accounting")
def test_memory_of_a_step_is_measured_in_processes_of_their_own():
    found = costs.memory(experiments.EXPERIMENTS["logreg"], 0, lambda method: None)
    assert set(found) == {"bare", *experiments.METHODS, "checkpointed"}
    assert all(figures["peak_rss"] >= figures["rss_before"] > 2**20 for figures in found.values())


def test_low_rank_step_memory_does_not_grow_with_depth():
    """XLA's own figure: backprop stores an activation a layer, the low-rank forward gradient none."""

    def temp_bytes(method, depth):
        experiment = costs.depth_experiment(depth)
        estimator, checkpointed = costs.variants(experiment)[method]
        trainer = train.Trainer(experiment, estimator, costs.synthetic_data(1), checkpointed)
        shapes = jax.eval_shape(lambda: trainer.start(0))
        rows = jax.ShapeDtypeStruct((64,), np.int32)
        step = jax.jit(trainer._step, donate_argnums=0)
        lowered = step.lower(
            shapes,
            train.Rate(np.float32(0), np.float32(1)),
            jax.random.key(0),
            trainer.train_data,
            rows,
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    factors = 4 * 2 * 1024  # bytes of one layer's tangent
    assert temp_bytes("low-rank", 40) - temp_bytes("low-rank", 8) < 32 * 8 * factors
    assert temp_bytes("backprop", 40) - temp_bytes("backprop", 8) > 32 * 4 * 64 * 1024


def lines_without_time(path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in records.read_lines(path)]


# in a scan and, as convolutions are, step by step
RESUMED = [
    *((name, method) for name in ("rosenbrock", "logreg") for method in experiments.METHODS),
    ("cnn", "forward"),
]


@pytest.mark.parametrize(("name", "method"), RESUMED)
def test_resumed_equals_uninterrupted(name, method, small_data, tmp_path):
    """Interrupted at every point of its curve, a run ends with the bits of one that was never stopped."""
    experiment = experiments.EXPERIMENTS[name]
    data = small_data if callable(experiment.subject) else None
    trainer = train.Trainer(experiment, experiments.METHODS[method], data)
    budget = experiments.Budget(
        steps=6 if name != "cnn" else 2, points=3 if name != "cnn" else 2, eval_examples=20
    )
    run = train.Run(method, "paper", 1e-4, 3, budget.steps)
    train.train(trainer, run, budget, tmp_path / "whole", lambda run, point: None)

    class Stop(Exception):
        pass

    def stop(run, point):
        raise Stop

    for _ in range(budget.points):
        with pytest.raises(Stop):
            train.train(trainer, run, budget, tmp_path / "parts", stop)
    train.train(trainer, run, budget, tmp_path / "parts", stop)  # finished: reads, and does not run
    name = f"runs/{run.name}.jsonl"
    assert lines_without_time(tmp_path / "parts" / name) == lines_without_time(
        tmp_path / "whole" / name
    )
    assert not list((tmp_path / "parts" / "states").glob("*"))


def test_a_shared_run_goes_on_from_its_log_and_is_the_run_of_one_worker(small_data, tmp_path):
    """Interrupted at every point, and once more with the end of the log torn off: the same bits. By one worker alone: the same to rounding."""
    experiment, budget = (
        experiments.EXPERIMENTS["logreg"],
        experiments.Budget(steps=6, points=3, eval_examples=20),
    )
    mesh = jax.make_mesh((2,), ("workers",), devices=jax.devices()[:2])
    trainer = train.Trainer(experiment, experiments.METHODS["low-rank"], small_data, mesh=mesh)
    run = train.Run("low-rank", "paper", 1e-2, 3, budget.steps)
    train.train(trainer, run, budget, tmp_path / "whole", lambda run, point: None)

    class Stop(Exception):
        pass

    log = tmp_path / "parts" / "logs" / f"{run.name}.log"
    for steps in (2, 4, 6):  # the points before are reached again, from the log

        def stop(run, point, steps=steps):
            if point["step"] == steps:
                raise Stop

        with pytest.raises(Stop):
            train.train(trainer, run, budget, tmp_path / "parts", stop)
        assert len(pg.replay.ReplayLog.open(log)) == steps
    train.train(trainer, run, budget, tmp_path / "parts", lambda run, point: None)
    name = f"runs/{run.name}.jsonl"
    whole = lines_without_time(tmp_path / "whole" / name)
    assert lines_without_time(tmp_path / "parts" / name) == whole
    assert log.read_bytes() == (tmp_path / "whole" / "logs" / log.name).read_bytes()

    (tmp_path / "parts" / name).unlink()
    log.write_bytes(log.read_bytes()[:-50])
    train.train(trainer, run, budget, tmp_path / "parts", lambda run, point: None)
    assert lines_without_time(tmp_path / "parts" / name) == whole

    curve = lambda lines: [line["test_loss"] for line in lines if line["kind"] == "point"]
    alone = train.Trainer(experiment, experiments.METHODS["low-rank"], small_data)
    train.train(alone, run, budget, tmp_path / "alone", lambda run, point: None)
    np.testing.assert_allclose(
        curve(whole), curve(lines_without_time(tmp_path / "alone" / name)), rtol=1e-4
    )

    (tmp_path / "parts" / name).unlink()
    low_rank = train.Trainer(experiment, experiments.METHODS["low-rank"], small_data, mesh=mesh)
    with pytest.raises(records.RecordError, match="the log of another run"):
        train.train(
            low_rank, dataclasses.replace(run, learning_rate=0.1), budget, tmp_path / "parts", stop
        )


def test_a_record_ahead_of_its_state_is_cut_back(small_data, tmp_path):
    """Killed between the two files of a point: the record has a point more than the state; the result is the same."""
    trainer = train.Trainer(
        experiments.EXPERIMENTS["logreg"], experiments.METHODS["low-rank"], small_data
    )
    budget = experiments.Budget(steps=4, points=4, eval_examples=20)
    run = train.Run("low-rank", "paper", 1e-2, 0, 4)
    states = []
    save = records.save_state

    def keep_first_only(path, state):
        states.append(path)
        if len(states) == 2:
            raise KeyboardInterrupt
        save(path, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "save_state", keep_first_only)
        with pytest.raises(KeyboardInterrupt):
            train.train(trainer, run, budget, tmp_path / "cut", lambda run, point: None)
    assert records.read_lines(tmp_path / "cut" / "runs" / f"{run.name}.jsonl")[-1]["step"] == 2
    train.train(trainer, run, budget, tmp_path / "cut", lambda run, point: None)
    train.train(trainer, run, budget, tmp_path / "whole", lambda run, point: None)
    name = f"runs/{run.name}.jsonl"
    assert lines_without_time(tmp_path / "cut" / name) == lines_without_time(
        tmp_path / "whole" / name
    )


def test_divergence_ends_one_run_at_its_step(tmp_path):
    experiment = experiments.EXPERIMENTS["rosenbrock"]
    trainer = train.Trainer(experiment, experiments.METHODS["backprop"], None)
    run = train.Run("backprop", "paper", 1.0, 0, 100)
    record = train.train(
        trainer, run, experiments.Budget(steps=100, points=4), tmp_path, lambda run, point: None
    )
    assert record[-1]["status"] == "diverged"
    # the first loss that is not finite, counted by hand
    point, step = jax.numpy.asarray(experiment.subject.start), 0
    while bool(jax.numpy.isfinite(experiment.subject.fun(point))):
        point, step = (
            point - np.exp(-1e-4 * step) * jax.grad(experiment.subject.fun)(point),
            step + 1,
        )
    assert record[-1]["step"] == step


def test_parameters_that_the_last_step_ruined_count_as_divergence(small_data, tmp_path):
    """The losses of all steps are finite, what they leave behind is not."""
    trainer = train.Trainer(
        experiments.EXPERIMENTS["logreg"], experiments.METHODS["backprop"], small_data
    )
    run = train.Run("backprop", "paper", 1e38, 0, 1)
    budget = experiments.Budget(steps=1, points=1, eval_examples=20)
    record = train.train(trainer, run, budget, tmp_path, lambda run, point: None)
    assert record[-1]["status"] == "diverged"
    assert record[-1]["step"] == 1
    assert summary.outcome_of("backprop", "paper", [record], [record], {}).final_loss is None


def test_search_gives_every_method_the_same_trials_and_prefers_what_does_not_diverge(tmp_path):
    experiment = experiments.EXPERIMENTS["beale"]
    budget = experiments.Budget(steps=50)
    for method, estimator in experiments.METHODS.items():
        trainer = train.Trainer(experiment, estimator, None)
        trials = []
        best = train.search(
            trainer, method, budget, tmp_path, lambda m, i, trial: trials.append(trial)
        )
        assert len(trials) == len(train.SEARCH_GRID) + 2
        assert tuple(t["learning_rate"] for t in trials[:-2]) == train.SEARCH_GRID
        finite = [t for t in trials if t["loss"] is not None]
        assert best == min(finite, key=lambda t: t["loss"])["learning_rate"]
        assert any(t["loss"] is None for t in trials)  # a rate of 1 diverges
        recorded = records.read_json(tmp_path / "search" / f"{method}.json")
        assert recorded["best"] == best
        again = []
        assert train.search(trainer, method, budget, tmp_path, lambda *a: again.append(a)) == best
        assert not again


def test_bare_forward_pass_changes_no_parameter(small_data):
    trainer = train.Trainer(experiments.EXPERIMENTS["logreg"], None, small_data)
    carry = trainer.start(0)
    before = jax.tree.map(np.asarray, carry[0])
    carry, losses, _ = trainer.steps(carry, 1.0, 0, trainer.rows(0, 0, 3))
    jax.tree.map(np.testing.assert_array_equal, before, carry[0])
    assert losses.shape == (3,)


def test_every_epoch_sees_every_example_once_in_its_own_order(small_data):
    trainer = train.Trainer(experiments.EXPERIMENTS["logreg"], None, small_data)
    rows = trainer.rows(seed=1, first=0, count=8)
    assert sorted(rows[:4].ravel()) == sorted(rows[4:].ravel()) == list(range(256))
    assert not np.array_equal(rows[:4], rows[4:])
    np.testing.assert_array_equal(trainer.rows(1, 3, 4), rows[3:7])


def test_time_ratio_follows_from_steps_and_measured_costs():
    def run(method, losses):
        points = [
            {"kind": "point", "step": 10 * i, "test_loss": loss} for i, loss in enumerate(losses)
        ]
        head = {
            "kind": "run",
            "seed": 0,
            "method": method,
            "setting": "paper",
            "learning_rate": 1.0,
        }
        return [
            head,
            *points,
            {"kind": "end", "status": "completed", "step": 10 * (len(losses) - 1)},
        ]

    figures = {"low-rank": {"seconds": {"median": 2.0}}, "backprop": {"seconds": {"median": 3.0}}}
    backprop = run("backprop", [3.0, 1.0, 0.5, 0.7])  # best 0.5 at step 20: 60 s
    reaches = run("low-rank", [3.0, 2.0, 0.6, 0.5])  # at step 30: 60 s
    fails = run("low-rank", [3.0, 2.0, 0.6, 0.51])
    assert summary.outcome_of(
        "low-rank", "paper", [reaches], [backprop], figures
    ).time_ratio == pytest.approx(1.0)
    outcome = summary.outcome_of("low-rank", "paper", [fails], [backprop], figures)
    assert (outcome.time_ratio, outcome.time_bound, outcome.reached, outcome.compared) == (
        None,
        pytest.approx(1.0),
        0,
        1,
    )
    # two seeds, one of which does not reach it: the worse counts
    twice = [[{**run[0], "seed": seed}, *run[1:]] for seed, run in enumerate((reaches, fails))]
    references = [[{**backprop[0], "seed": seed}, *backprop[1:]] for seed in (0, 1)]
    assert summary.outcome_of("low-rank", "paper", twice, references, figures).time_ratio is None
    # no verdict without a reference: backprop has not run, or never got better than its start
    for reference in ([], [run("backprop", [1.0, 2.0])]):
        assert summary.outcome_of("low-rank", "paper", [reaches], reference, figures).compared == 0


# the command line, as a person uses it


def prograde(*arguments, **options):
    command = [sys.executable, "-m", "prograde.lab.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **options)


def start(*arguments, **options):
    command = [sys.executable, "-m", "prograde.lab.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def beale(tmp_path_factory):
    """A finished run of the command."""
    out = tmp_path_factory.mktemp("beale") / "out"
    done = prograde("reproduce", "beale", "--out", out, "--seeds", "2")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_reproduce_ends_with_a_table_and_a_page(beale):
    out, printed = beale
    assert "Beale function" in printed
    assert "backprop" in printed
    assert "\x1b" not in printed  # plain where the output is no terminal
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "Okabe" not in page


def test_report_is_rebuilt_from_records_alone(beale):
    out, _ = beale
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    done = prograde("report", out)
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").read_bytes() == before


def test_other_configuration_is_refused_and_nothing_changes(beale):
    out, _ = beale
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for arguments in (["--seeds", "3"], ["--seeds", "3", "--resume"], ["--full"], ["--seeds", "2"]):
        done = prograde("reproduce", "beale", "--out", out, *arguments)
        assert done.returncode == 2
        assert "Choose another --out" in done.stderr or "Pass --resume" in done.stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "bale"], "Valid names: all, beale, rosenbrock, logreg, mlp, cnn, depth"),
        (["reproduce", "mlp", "--data", "nowhere"], "Use digits, mnist, or a directory"),
        (["reproduce", "beale", "--seeds", "0"], "--seeds 0"),
        (["reproduce", "beale", "--resume"], "--resume needs --out"),
        (["reproduce", "mlp", "--data-dir", "."], "goes with --data mnist"),
        (["reproduce", "all", "bale"], "unknown experiment bale"),
        (["report", "nowhere"], "no records"),
        (["report"], ""),
        (["reproduce", "--colour"], "colour"),
        (
            ["reproduce", "beale", "--distributed", "--out", "x"],
            "Valid names: all, logreg, mlp, cnn",
        ),
        (["reproduce", "mlp", "--distributed"], "--distributed needs --out"),
        (["reproduce", "mlp", "--distributed", "--out", "x"], "JAX_COORDINATOR_ADDRESS"),
        (
            ["launch", "--processes", "2", "--", "bench"],
            "launch runs `reproduce`, and was given 'bench'",
        ),
        (["launch", "--processes", "0", "--", "reproduce", "mlp"], "--processes 0"),
        (["dance"], "dance"),
    ],
)
def test_a_bad_request_says_what_is_valid_and_exits_with_2(arguments, words, tmp_path):
    done = prograde(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_and_list_name_every_experiment_and_method():
    shown = prograde("list").stdout
    for name in (*experiments.EXPERIMENTS, *experiments.METHODS):
        assert name in shown
    assert "2.435" in shown
    manual = prograde("reproduce", "--help").stdout
    for option in ("--data", "--seeds", "--out", "--resume", "--data-dir", "--quick", "--full"):
        assert option in manual


LONG = ["reproduce", "rosenbrock", "--full", "--seeds", "1"]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """The records of a long run that was never stopped."""
    out = tmp_path_factory.mktemp("long") / "out"
    done = prograde(*LONG, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def run_lines(out):
    return {
        p.name: lines_without_time(p) for p in sorted((out / "rosenbrock" / "runs").glob("*.jsonl"))
    }


def test_ctrl_c_says_how_to_resume_and_resuming_gives_the_same_numbers(long_run, tmp_path):
    out = tmp_path / "stopped"
    process = start(*LONG, "--out", out)
    wait_for(
        lambda: list((out / "rosenbrock" / "search").glob("*.json")), process
    )  # most is still to be done
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    command = shlex.split(errors.split("To continue: ")[1])
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert run_lines(out) == run_lines(long_run)


def test_kill_loses_no_record_and_resuming_gives_the_same_numbers(long_run, tmp_path):
    out = tmp_path / "killed"
    for kills in range(3):
        process = start(*LONG, "--out", out, *(["--resume"] if kills else []))
        path = out / "rosenbrock" / "runs"
        before = sum(len(records.read_lines(p)) for p in path.glob("*.jsonl"))
        wait_for(
            lambda p=path, b=before: sum(len(records.read_lines(f)) for f in p.glob("*.jsonl")) > b,
            process,
        )
        process.kill()
        process.communicate()
        for file in out.rglob("*.json*"):
            if not file.name.startswith("."):
                (records.read_lines if file.suffix == ".jsonl" else records.read_json)(file)
    done = prograde(*LONG, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert run_lines(out) == run_lines(long_run)


def test_records_are_strict_json(long_run):
    for file in long_run.rglob("*.jsonl"):
        for line in file.read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{file}: {word}"))
