"""`prograde reproduce`: every experiment runs and reports, and what is interrupted continues."""

import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from prograde.lab import cli, store
from prograde.lab.commands.report import report_of_directories
from prograde.lab.data import images, synthetic
from prograde.lab.display import Display
from prograde.lab.report import Figure, Table, figures, markdown, terminal
from prograde.lab.studies.reproduce import costs, experiments, plan, run
from prograde.lab.studies.reproduce.report import report
from prograde.lab.studies.reproduce.summary import summarise

pytestmark = pytest.mark.optimised

ROOT = Path(__file__).parents[3]
TINY = experiments.Budget(
    steps=2, points=2, seeds=1, eval_examples=20, timing_rounds=1, depths=(1, 4)
)
long = pytest.mark.long


@pytest.fixture(scope="module")
def tiny():
    """All experiments at a budget of two steps, on random data, without processes for memory."""
    with pytest.MonkeyPatch.context() as patch:
        _shorten(patch)
        yield


def _shorten(monkeypatch):
    for name, experiment in experiments.EXPERIMENTS.items():
        short = dataclasses.replace(experiment, quick=TINY)
        monkeypatch.setitem(experiments.EXPERIMENTS, name, short)

    def memory(experiment, depth, display, part):
        figures = {"temp_bytes": 2**20, "argument_bytes": 1, "rss_before": 1, "peak_rss": 2**21}
        return dict.fromkeys(costs.variants(experiment), figures)

    monkeypatch.setattr(costs, "memory", memory)
    monkeypatch.setattr(run, "_SCAN_STEPS", 1)
    data = dataclasses.replace(synthetic(2), name="small")
    monkeypatch.setattr("prograde.lab.data.load", lambda source, directory: data)


def reproduce(out, *names, resume=False, **options):
    """Runs experiments; returns their stores."""
    study = plan.Reproduce(experiments=names, **options)
    configs = study.configs()
    stores = store.claim("reproduce", {out / name: c for name, c in configs.items()}, resume)
    study.run(dict(zip(configs, stores, strict=True)), Display(Console(file=io.StringIO())))
    return stores


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """The records of a function."""
    (records,) = reproduce(tmp_path_factory.mktemp("recorded"), "rosenbrock")
    return records


@pytest.fixture
def copied(recorded, tmp_path):
    """The same, to be changed."""
    return store.Store(shutil.copytree(recorded.directory, tmp_path / "rosenbrock"))


@pytest.mark.parametrize(
    "name", ["logreg", *(pytest.param(n, marks=long) for n in ("beale", "cnn", "depth"))]
)
def test_every_experiment_runs_two_steps_and_reports(name, tiny, tmp_path):
    (records,) = reproduce(tmp_path, name)
    found = summarise(records)
    if name == "depth":
        assert sorted(found.depths) == [1, 4]
    else:
        assert {o.method for o in found.outcomes} == set(experiments.METHODS)
        assert {o.setting for o in found.outcomes} >= {"paper", "tuned"}
        assert all(o.finished == 1 for o in found.outcomes)
        assert not list((tmp_path / name / "states").glob("*"))
    (section,) = report([records]).sections
    assert section.title == experiments.EXPERIMENTS[name].title
    (picture,) = (part for part in section.content if isinstance(part, Figure))
    assert figures.svg(picture) == figures.svg(picture)  # the same records give the same bytes


def test_legends_name_methods_as_the_tables_do(recorded, monkeypatch):
    """Of a function too, where a rank-one tangent is a vector of signs."""
    (section,) = report([recorded]).sections
    table = next(part for part in section.content if isinstance(part, Table))
    named = {row[table.columns.index("method")] for row in table.rows}
    labels = set()
    monkeypatch.setattr(
        "prograde.lab.studies.reproduce.figures.legend_below",
        lambda canvas, axes: labels.update(axes.get_legend_handles_labels()[1]),
    )
    next(part for part in section.content if isinstance(part, Figure)).draw(
        figures.Canvas(layout="constrained")
    )
    assert labels == named == set(experiments.METHODS)


def test_the_configuration_of_the_records_made_before_is_the_same():
    """So that they can be continued."""
    for path in sorted((ROOT / "records" / "mnist-full").glob("*/manifest.json")):
        old = json.loads(path.read_text())["config"]
        experiment = experiments.EXPERIMENTS[old["experiment"]]
        now = experiments.describe(experiment, True, None, old["data"])
        assert {k: v for k, v in store.plain(now).items() if k != "methods"} == {
            k: v for k, v in old.items() if k != "methods"
        }


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=long)])
def test_the_page_says_what_the_records_do(drawn, monkeypatch):
    """Its words and tables, and the figures as they are drawn."""
    monkeypatch.chdir(ROOT)
    if not drawn:
        folder = Path("docs/reproduction")
        monkeypatch.setattr(figures, "svg", lambda f: (folder / f"{f.name}.svg").read_text())
    assert markdown.differences(Path("docs/reproduction.md"), report_of_directories) == []


def test_a_step_that_was_timed_on_a_busy_machine_is_not_to_be_trusted(copied):
    for busy, said in ((0.05, False), (0.4, True)):
        timed = {name: cost | {"busy": busy} for name, cost in copied.read("costs").items()}
        copied.write("costs", timed)
        (section,) = report([copied]).sections
        assert any("do not trust" in str(part) for part in section.content) == said


def test_a_search_in_which_every_trial_diverged_is_said(copied):
    found = copied.read("search/forward")
    lost = [trial | {"loss": None} for trial in found["trials"]]
    copied.write("search/forward", found | {"trials": lost})
    (section,) = report([copied]).sections
    assert "(all trials diverged)" in section.made_on


@long
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's accounting")
def test_memory_of_a_step_is_measured_in_processes_of_their_own():
    silent = Display(Console(file=io.StringIO()))
    found = costs.memory(experiments.EXPERIMENTS["logreg"], 0, silent, 1)
    assert set(found) == {"bare", *experiments.METHODS, "checkpointed"}
    assert all(figures["peak_rss"] >= figures["rss_before"] > 2**20 for figures in found.values())


def test_low_rank_step_memory_does_not_grow_with_depth():
    """XLA's own figure: backprop stores an activation a layer, the low-rank estimate none."""

    def temp_bytes(method, depth):
        experiment = costs.depth_experiment(depth)
        estimator, checkpointed = costs.variants(experiment)[method]
        trainer = costs.trainer_of(experiment, estimator, synthetic(1), checkpointed)
        shapes = jax.eval_shape(lambda: trainer.start(0))
        rows = jax.ShapeDtypeStruct((64,), np.int32)
        arguments = trainer.arguments(run.Run("", "", 0.0, 0, 1).rate, 0)
        step = jax.jit(trainer.step, donate_argnums=0).lower(shapes, *arguments, rows)
        return step.compile().memory_analysis().temp_size_in_bytes

    factors = 4 * 2 * 1024  # bytes of one layer's tangent
    assert temp_bytes("low-rank", 40) - temp_bytes("low-rank", 8) < 32 * 8 * factors
    assert temp_bytes("backprop", 40) - temp_bytes("backprop", 8) > 32 * 4 * 64 * 1024


# the command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bale"], "Valid names: all, beale, rosenbrock, logreg, mlp, cnn, depth"),
        (["all", "bale"], "unknown experiment bale"),
        (["mlp", "--data", "nowhere"], "Use digits, mnist, or a directory"),
        (["beale", "--seeds", "0"], "--seeds 0"),
        (["beale", "--resume"], "--resume needs --out"),
        (["mlp", "--data-dir", "."], "goes with --data mnist"),
        (["beale", "--distributed", "--out", "x"], "Valid names: all, logreg, mlp, cnn"),
        (["mlp", "--distributed"], "--distributed needs --out"),
        (["mlp", "--distributed", "--out", "x"], "JAX_COORDINATOR_ADDRESS"),
        (["--colour"], "colour"),
    ],
)
def test_a_bad_request_says_what_is_valid_and_exits_with_2(
    words, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prograde.lab.data.load", images.load)  # `tiny` replaces it in this file
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr(
        "prograde.lab.processes.workers._keep_output_of_libraries_away", lambda: None
    )
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setattr(sys, "argv", ["prograde"])
    with pytest.raises(SystemExit) as end:
        cli._main(["reproduce", *words])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert said in " ".join((printed.err + printed.out).replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "2", "--", "bench"], "launch runs `reproduce`, and got 'bench'"),
        (["--processes", "2"], "launch runs `reproduce`, and got nothing"),
        (["--processes", "0", "--", "reproduce", "mlp"], "--processes 0"),
    ],
)
def test_launch_refuses_what_it_cannot_start(words, said, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    with pytest.raises(SystemExit) as end:
        cli._main(["launch", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_list_names_every_experiment_with_what_the_paper_reports_and_every_method():
    console = Console(file=io.StringIO(), width=200)
    for table in plan.Reproduce.choices():
        terminal.print_table(table, console)
    shown = console.file.getvalue()
    for name in (*experiments.EXPERIMENTS, *experiments.METHODS):
        assert name in shown
    assert "R_f 2.435, R_b 4.389; T" not in shown
    assert "R_f 2.435, R_b 4.389, T 0.553" in shown


# real processes

ROSENBROCK = ["reproduce", "rosenbrock", "--seeds", "1"]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}


def start(*arguments, **options):
    command = [sys.executable, "-m", "prograde.lab.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes, **options)


def finish(*arguments):
    process = start(*arguments)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The records of a run that was never stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    status, _, errors = finish(*ROSENBROCK, "--out", out)
    assert status == 0, errors
    return out


def run_lines(out):
    records = store.Store(out / "rosenbrock")
    return {
        name: [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        for name in records.names("runs")
        if (lines := records.read_lines(name))
    }


@long
def test_ctrl_c_says_how_to_resume_and_resuming_gives_the_same_numbers(undisturbed, tmp_path):
    out = tmp_path / "stopped"
    process = start(*ROSENBROCK, "--out", out)
    search = out / "rosenbrock" / "search"
    wait_for(lambda: list(search.glob("*.json")), process)  # most is still to be done
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    command = shlex.split(errors.split("To continue: ")[1])
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert run_lines(out) == run_lines(undisturbed)


@long
def test_kill_loses_no_record_and_resuming_gives_the_same_numbers(undisturbed, tmp_path):
    out = tmp_path / "killed"
    lines = lambda: sum(map(len, run_lines(out).values()))
    for kills in range(2):
        before = lines()
        process = start(*ROSENBROCK, "--out", out, *(["--resume"] if kills else []))
        wait_for(lambda before=before: lines() > before, process)
        process.kill()
        process.communicate()
        for file in out.rglob("[!.]*.json*"):
            (store.read_lines if file.suffix == ".jsonl" else store.read_json)(file)
    status, _, errors = finish(*ROSENBROCK, "--out", out, "--resume")
    assert status == 0, errors
    assert run_lines(out) == run_lines(undisturbed)


@long
def test_of_two_processes_on_one_directory_one_is_refused(undisturbed, tmp_path):
    """Started alike, and continued alike: one runs, the other names it and changes nothing."""
    out = tmp_path / "shared"
    for resume in ([], ["--resume"]):
        first = start(*ROSENBROCK, "--out", out, *resume)
        manifest = out / "rosenbrock" / "manifest.json"
        count = len(resume) + 1
        wait_for(
            lambda m=manifest, n=count: m.exists() and len(store.read_json(m)["environments"]) == n,
            first,
        )
        status, _, errors = finish(*ROSENBROCK, "--out", out, "--resume")
        assert (status, "Traceback" in errors) == (2, False)
        assert f"is in use by process {first.pid} on" in errors
        assert len(store.read_json(manifest)["environments"]) == count
        if not resume:
            first.kill()
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert run_lines(out) == run_lines(undisturbed)


@long
def test_records_are_strict_json(undisturbed):
    for file in undisturbed.rglob("*.jsonl"):
        for line in file.read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{file}: {word}"))


@long
def test_launched_processes_give_one_report_and_libraries_print_nothing(tmp_path):
    out = tmp_path / "out"
    words = ["--out", out, "--data", "digits", "--seeds", "1"]
    process = start("launch", "--processes", "2", "--", "reproduce", "logreg", *words)
    search = out / "logreg" / "search"
    wait_for(lambda: list(search.glob("*.json")), process, 300)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Starting 2 processes. Each compiles" in printed
    assert "Gloo" not in printed + errors
    assert "Traceback" not in errors
    command = " ".join(errors.split("To continue: ")[1].split())
    again = f"launch --processes 2 -- reproduce logreg --out {out} --data digits --seeds 1 --resume"
    assert again in command
