"""`prograde beyond`: records, the page made from them, and the streams it learns from."""

import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from prograde.lab import records
from prograde.lab.beyond import report, run
from prograde.lab.beyond.experiment import Experiment
from prograde.lab.beyond.stream import (
    Setting,
    Stream,
    adding,
    characters,
    delayed_copy,
    library_text,
)
from prograde.lab.display import Display
from prograde.lab.report import Table


class Toy(Experiment):
    name, title = "newton", "A toy"

    def __init__(self):
        self.measured = 0

    def measure(self, full, display):
        self.measured += 1
        return {"x": 2.0 if full else 1.0}

    def tables(self, record):
        return [Table("toys", ["x"], [[f"{record['x']:g}"]])]

    def conclusion(self, record):
        return f"x < y & x is {record['x']:g}."

    def draw(self, record, figure):
        figure.subplots().plot([0, record["x"]])


@pytest.fixture
def toy(monkeypatch):
    toy = Toy()
    monkeypatch.setattr(run, "experiment", lambda name: toy)
    return toy


def test_a_record_is_measured_once_and_never_overwritten(toy, tmp_path):
    display = Display(Console(quiet=True))
    run.run([toy], False, tmp_path, False, display)
    before = (tmp_path / "newton.json").read_bytes()
    with pytest.raises(records.RecordError, match="Pass --resume"):
        run.run([toy], False, tmp_path, False, display)
    with pytest.raises(records.RecordError, match="record of a quick run, and this is a full one"):
        run.run([toy], True, tmp_path, True, display)
    run.run([toy], False, tmp_path, True, display)
    assert toy.measured == 1
    assert (tmp_path / "newton.json").read_bytes() == before


def test_page_and_markdown_are_made_from_records_alone(toy, tmp_path):
    run.run([toy], True, tmp_path, False, Display(Console(quiet=True)))
    page = report.build(tmp_path).read_text()
    assert "x &lt; y &amp; x is 2." in page
    assert "<svg" in page
    assert "<td>2</td>" in page
    document = tmp_path / "page.md"
    marks = report._BEGIN.format("newton"), report._END.format("newton")
    document.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    for _ in range(2):  # writing it again changes nothing
        report.write_markdown(tmp_path, document)
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| 2 |") == 1
    assert (tmp_path / "page" / "newton.svg").read_text().startswith("<svg")
    document.write_text("no marks")
    with pytest.raises(records.RecordError, match="lacks the marks"):
        report.write_markdown(tmp_path, document)


def test_what_is_no_record_is_refused(toy, tmp_path):
    with pytest.raises(records.RecordError, match="holds no record"):
        run.find(tmp_path)
    (tmp_path / "newton.json").write_text('{"full": true}')
    with pytest.raises(records.RecordError, match="is not a record of prograde beyond"):
        run.find(tmp_path)


def test_the_copy_task_asks_for_what_was_shown_delay_steps_before(key):
    task = delayed_copy(7)
    inputs, targets = task.draw(key, 50)
    assert inputs.shape == (50, 8, 5)
    np.testing.assert_array_equal(jnp.argmax(inputs[:, 0, :4], -1), targets[:, 7])
    assert not inputs[:, 1:7].any()
    assert (targets[:, :7] == -1).all()
    assert len(set(np.asarray(targets[:, 7]))) == 4
    assert float(task.loss(jnp.zeros(4), targets[0, 7])) == pytest.approx(task.guessing)
    assert float(task.loss(jnp.ones(4), targets[0, 0])) == 0


def test_the_adding_task_asks_for_the_sum_of_two_marked_numbers(key):
    inputs, targets = adding(9).draw(key, 2000)
    assert (inputs[:, :, 1].sum(1) == 2).all()
    np.testing.assert_allclose(
        ((inputs[:, :, 0] + 0.5) * inputs[:, :, 1]).sum(1), targets[:, -1], rtol=1e-6
    )
    # the best guess without looking is the mean, 1, whose error is the variance, 1/6
    error = np.asarray((targets[:, -1] - 1) ** 2)
    assert error.mean() == pytest.approx(adding(9).guessing, abs=5 * float(error.std()) / 2000**0.5)


def test_characters_are_those_that_follow(key):
    text = library_text()
    assert len(text) > 100_000
    task = characters(text)
    inputs, targets = task.draw(key, 3)
    np.testing.assert_array_equal(
        jnp.argmax(inputs.reshape(-1, task.inputs)[1:], -1), targets.reshape(-1)[:-1]
    )


def test_stream_is_told_from_a_tiny_record():
    setting = Setting(
        units=4,
        delay=2,
        windows=(2, 6),
        rates=(1e-2,),
        seconds=0.2,
        learners=("RTRL",),
        tasks=("copy",),
    )
    experiment = Stream()
    record = experiment.measure_setting(setting, Display(Console(quiet=True)))
    (table,) = experiment.tables(record)
    assert [row[0] for row in table.rows] == [
        "RTRL, exact",
        *(f"backprop truncated to {w} steps" for w in (2, 6)),
    ]
    assert all(
        run["steps"] > 0 for m in record["tasks"]["copy"]["methods"].values() for run in m["runs"]
    )
    figure = Figure(layout="constrained")
    experiment.draw(record, figure)
    ends = record["tasks"]["copy"]["methods"]
    loss = lambda name, value: ends[name]["runs"][0].update(loss=value)
    loss("RTRL", 0.1), loss("backprop 2", 1.0), loss("backprop 6", 0.01)
    said = experiment.conclusion(record)
    assert "RTRL ends at 0.1" in said
    assert "(2 steps) at 1: lower" in said
    assert "RTRL ends at 0.1, truncated backprop with 6 steps at 0.01: higher" in said
    loss("RTRL", 2.0)
    assert "(2 steps) at 1: higher" in experiment.conclusion(record)
    ends["RTRL"]["runs"].append({"loss": 0.1})
    assert "(2 steps) at 1: no clear difference" in experiment.conclusion(record)


def test_the_page_says_what_the_records_hold(request):
    """Between its marks stands what `prograde beyond --markdown` would write."""
    root = request.config.rootpath
    page = (root / "docs" / "beyond.md").read_text()
    shown = set()
    for experiment, record in run.find(root / "records" / "beyond"):
        begin, end = report._BEGIN.format(experiment.name), report._END.format(experiment.name)
        between = page.split(begin)[1].split(end)[0].strip()
        assert between == report.markdown(experiment, record, f"beyond/{experiment.name}.svg"), (
            experiment.name
        )
        assert (root / "docs" / "beyond" / f"{experiment.name}.svg").exists()
        shown.add(experiment.name)
    assert shown == set(re.findall("<!-- (\\w+): begin", page))


def test_the_example_of_a_stream_runs(request):
    """It ends with an assertion about what it shows."""
    example = request.config.rootpath / "examples" / "stream.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
