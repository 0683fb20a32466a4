"""`prograde bench`: what is recorded, how it is continued, and what the report says of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from prograde.lab import cli
from prograde.lab.commands.report import report_of_directories
from prograde.lab.display import Display
from prograde.lab.measure.timing import Turns, quartiles
from prograde.lab.models import workloads
from prograde.lab.report import Table, markdown
from prograde.lab.store import Store
from prograde.lab.studies.bench import methods, report, run
from prograde.lab.studies.bench.plan import Bench
from prograde.lab.study import UsageError

ROOT = Path(__file__).parents[3]


def prograde(*words):
    """Runs a command; returns its exit code."""
    try:
        cli._main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def flags(monkeypatch):
    """The command changes XLA's flags."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.setattr("prograde.lab.measure.memory.keep_freed_memory", lambda: False)


BARE = [1.0e-3, 1.1e-3, 1.05e-3, 1.02e-3]


def method(ratio, **more):
    return {
        "seconds": quartiles([ratio * b for b in BARE]),
        "ratio": quartiles([ratio] * 4),
        "rounds": [ratio * b for b in BARE],
        "steps_a_visit": 3,
        "compile_seconds": 1.5,
        "temp_bytes": 3_000_000,
        "rss_before": 10_000_000,
        "peak_rss": 14_200_000,
        **more,
    }


def model(busy=0.02, **more):
    """A model on which ours takes half the time of backprop."""
    methods = {"bare": 1.0, "prograde-1": 2.0, "backprop": 4.0, "checkpointed": 5.0}
    return {
        "title": "A model",
        "sizes": {},
        "parameters": 1234,
        "missing": {},
        "torch": None,
        "busy": busy,
        "methods": {name: method(ratio) for name, ratio in methods.items()} | more,
    }


def with_torch():
    """A model on which PyTorch has the fastest backprop, which wins."""
    found = model(**{"torch-backprop": method(1.6, temp_bytes=None, compile_seconds=None)})
    torch = {"version": "9.9", "threads": 2}
    return found | {"torch": torch, "missing": {"torch-jvp": "why not"}}


def store_of(directory, **models):
    manifest = json.loads((ROOT / "records" / "bench" / "manifest.json").read_text())
    store = Store(directory)
    store.write("manifest", manifest | {"config": {"rounds": 4, "memory": True}})
    for name, found in models.items():
        store.write(name, found)
    return store


def test_figures_of_a_method_are_compared_with_bare_round_by_round():
    turns = Turns({"bare": [1.0, 8.0, 3.0], "mezo": [1.0, 4.0, 9.0]}, {"bare": 7, "mezo": 5}, 0.0)
    found = run.timing_figures(turns)["mezo"]
    assert found["ratio"] == {"median": 1.0, "low": 0.75, "high": 2.0, "n": 3}
    assert found["seconds"]["median"] == 4.0
    assert (found["rounds"], found["steps_a_visit"]) == ([1.0, 4.0, 9.0], 5)


def test_over_backprop_is_by_rounds_and_over_the_fastest():
    found = model()
    found["methods"]["prograde-1"]["rounds"] = [1.0, 4.0, 9.0, 2.0]
    found["methods"]["backprop"]["rounds"] = [1.0, 8.0, 3.0, 2.0]
    assert report.fastest_backprop(found) == "backprop"
    # 1, 1/2, 3 and 1: their median is 1, and the ratio of the medians 3 / 2.5
    assert report.over_backprop(found)["median"] == 1.0
    assert report.fastest_backprop(with_torch()) == "torch-backprop"
    assert report.over_backprop(with_torch())["median"] == pytest.approx(1.25)


def test_report_marks_the_fastest_backprop_and_where_it_wins(tmp_path):
    store_of(tmp_path, mlp=model(), cnn=with_torch())
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- records: {tmp_path} -->\n<!-- end of records -->\nafter\n")
    markdown.update(page, report_of_directories)
    text = page.read_text()
    assert (
        "fastest backprop on mlp (0.50). The fastest backprop takes less, or no more, on cnn"
        in (" ".join(text.split()))
    )
    assert "0.50 of the fastest backprop |" in text
    assert "1.25 of the fastest backprop, backprop wins |" in text
    assert "| torch-backprop | 1.66 | 1.60 (1.60 to 1.60) | – | – | 4.2 | – | fastest" in text
    assert "No `torch-jvp` here: why not" in text
    assert "| 3 | 4.2 | 1.5 |" in text
    assert "PyTorch 9.9; 4 rounds" in " ".join(text.split())
    assert "do not trust" not in text
    assert markdown.differences(page, report_of_directories) == []


def test_times_of_a_busy_machine_are_no_finding(tmp_path):
    store = store_of(tmp_path, mlp=model(busy=0.31), cnn=with_torch())
    overview, mlp, cnn = report.report([store]).sections[0], *report.report([store]).sections[1:]
    assert "Other processes used 31 % of the machine" not in " ".join(map(str, cnn.content))
    (warned,) = [part for part in reversed(mlp.content) if isinstance(part, str)]
    assert "Other processes used 31 % of the machine" in warned
    (said,) = [part for part in overview.content if isinstance(part, str)]
    assert "takes less time" not in said
    assert "Nothing is said of mlp (0.50): the machine was busy" in said


def test_unsteady_ratios_are_named(tmp_path):
    found = model()
    found["methods"]["backprop"]["ratio"] |= {"low": 3.0, "high": 4.5}
    section = report.report([store_of(tmp_path, mlp=found)]).sections[1]
    assert any("Unsteady" in part and "backprop." in part for part in section.content[1:])


def test_memory_that_was_left_out_is_no_column(tmp_path):
    found = model()
    for one in found["methods"].values():
        del one["rss_before"], one["peak_rss"]
    (table,) = [
        part
        for part in report.report([store_of(tmp_path, mlp=found)]).sections[1].content
        if isinstance(part, Table)
    ]
    assert "RSS, MB" not in table.columns
    assert table.rows[1][:6] == ["prograde-1", "2.07", "2.00 (2.00 to 2.00)", "–", "3", "1.5"]


def test_a_stopped_bench_goes_on_model_by_model(tmp_path, monkeypatch, capsys, flags):
    measured, out = [], tmp_path / "out"

    def measure(name, rounds, with_memory, display, *_):
        assert (rounds, with_memory) == (4, True)
        if name == "mlp" and "mlp" not in measured:
            measured.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return model()

    class Left(BaseException):
        """The process ends at once on Ctrl-C: `_leave` does not return."""

    def leave(status):
        raise Left(status)

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(cli, "_leave", leave)
    with pytest.raises(Left) as left:
        prograde("bench", "logreg", "mlp", "--rounds", 4, "--out", out)
    assert left.value.args == (130,)
    assert f"bench logreg mlp --rounds 4 --out {out} --resume" in " ".join(
        capsys.readouterr().err.split()
    )
    assert prograde("bench", "logreg", "mlp", "--rounds", 4, "--out", out, "--resume") == 0
    assert measured == ["logreg", "mlp", "mlp"]  # logreg only once
    assert prograde("bench", "cnn", "--rounds", 4, "--out", out, "--resume") == 0  # one more model
    assert list(report.models_of(Store.open(out))) == ["logreg", "mlp", "cnn"]
    assert prograde("bench", "cnn", "--rounds", 5, "--out", out, "--resume") == 2
    assert "rounds is 4 there and 5 here" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_noticed_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, flags
):
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert prograde("bench", "logreg", "--out", out) in (1, 2)
        assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (Bench(models=("mlq",)), "mlq. Valid names: all, logreg, mlp, mlp-512, cnn, resnet, "),
        (Bench(rounds=0), "--rounds 0"),
    ],
)
def test_a_bad_request_says_what_is_valid(study, words):
    with pytest.raises(UsageError) as error:
        study.configs()
    assert words in str(error.value)


def test_a_visit_whose_loss_is_not_finite_is_refused():
    class Side:
        def visit(self, method, count):
            return 0.5 * count, 1.0 if method == "good" else float("nan")

    assert run.finite_visit(Side(), "good")(3) == 1.5
    with pytest.raises(RuntimeError, match="bad: the loss is nan"):
        run.finite_visit(Side(), "bad")(3)


def test_a_model_is_measured_by_every_method_in_turns(monkeypatch):
    tiny = workloads.logreg(batch=4)
    monkeypatch.setattr(run, "WORKLOADS", {"logreg": lambda: tiny})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    steps = methods.steps(tiny)
    chosen = {name: steps[name] for name in ("backprop", "bare")}
    monkeypatch.setattr(methods, "steps", lambda workload: chosen)
    monkeypatch.setattr(run, "counted_ratios", lambda workload: {"backprop": 3.0})
    found = run.measure("logreg", 2, False, Display(Console(quiet=True)))
    assert list(found["methods"]) == ["bare", "backprop"]
    assert found["parameters"] == 7850
    assert found["torch"] is None
    assert 0 <= found["busy"] <= 1
    for one in found["methods"].values():
        assert len(one["rounds"]) == one["seconds"]["n"] == one["ratio"]["n"] == 2
        assert one["seconds"]["median"] > 0
        assert one["compile_seconds"] > 0
        assert one["temp_bytes"] >= 0
    assert found["methods"]["bare"]["ratio"]["median"] == 1.0
    assert found["methods"]["backprop"]["counted_ratio"] == 3.0


@pytest.mark.long
def test_command_measures_records_and_shows(tmp_path):
    """In a process of its own, in which PyTorch is not installed; with the memory of processes."""
    hidden = (
        "import importlib.util as u; f = u.find_spec; "
        "u.find_spec = lambda n, p=None: None if n == 'torch' else f(n, p)"
    )
    (tmp_path / "sitecustomize.py").write_text(hidden)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "150", "PYTHONPATH": path}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "prograde.lab.cli", "bench", "logreg", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "logreg: 1 rounds: done" in done.stdout
    assert "fastest backprop" in done.stdout
    found = Store.open(out).read("logreg")
    assert set(found["methods"]) == set(methods.steps(workloads.logreg()))
    assert all(one["peak_rss"] >= one["rss_before"] > 0 for one in found["methods"].values())


def test_a_gpu_that_is_not_there_is_refused_before_a_directory_is_made(tmp_path, flags, capsys):
    out = tmp_path / "out"
    assert prograde("bench", "mlp", "--device", "gpu", "--out", out) != 0
    assert "--device gpu, but JAX runs on cpu here" in capsys.readouterr().err
    assert not out.exists()
