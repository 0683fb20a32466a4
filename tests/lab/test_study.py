"""A toy study through the command line: it is run, stopped, continued and shown as all are."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from typing import ClassVar

import pytest

from prograde.lab import cli, studies
from prograde.lab.report import Figure, Report, Section, Table
from prograde.lab.report.words import made_on
from prograde.lab.study import Study, UsageError


@dataclasses.dataclass(frozen=True)
class Toy(Study):
    """Count to a number.

    - prograde toy --to 3: counts to three
    """

    name: ClassVar[str] = "toy"
    measured: ClassVar[list] = []
    fails: ClassVar[BaseException | None] = None

    to: int = 2
    """Number to count to."""
    words: tuple[str, ...] = ()
    """Words."""

    def configs(self):
        if self.to < 1:
            raise UsageError(f"--to {self.to}: at least 1 is needed.")
        return {".": self.config("words")}

    def run(self, stores, display):
        def measure(n):
            if n > 1 and self.fails is not None:
                raise self.fails
            self.measured.append(n)
            return {"n": n}

        for n in range(1, self.to + 1):
            stores["."].once(f"numbers/{n}", lambda n=n: measure(n))

    @classmethod
    def report(cls, stores):
        (store,) = stores
        rows = [[name, str(store.read(name)["n"])] for name in store.names("numbers")]
        picture = Figure("line", "a line", lambda canvas: canvas.subplots().plot([0, 1]))
        content = ["a < b & [/b]", picture, Table("Numbers [bold]", ["name", "n"], rows)]
        section = Section("all", "All", content, made_on(store.manifest), store.manifest)
        return Report("Toys", "Some toys.", "n is a number.", [section])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(studies, "STUDIES", {"toy": "toy"})
    monkeypatch.setattr(cli, "STUDIES", {"toy": "toy"})
    monkeypatch.setattr(studies, "study", lambda name: Toy)
    monkeypatch.setattr(cli, "study", lambda name: Toy)
    monkeypatch.setattr(Toy, "measured", [])
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setattr(sys, "argv", ["prograde"])
    return Toy


def prograde(*words):
    """Runs a command; returns its exit code."""
    try:
        cli._main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def test_a_study_writes_records_and_a_report(toy, tmp_path, capsys):
    out = tmp_path / "out"
    assert prograde("toy", "--to", 3, "--out", out) == 0
    said = capsys.readouterr().out
    assert "a < b & [/b]" in said
    assert "Numbers [bold]" in said
    assert toy.measured == [1, 2, 3]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["study"], manifest["config"]) == ("toy", {"to": 3})
    page = (out / "report.html").read_text()
    assert "a &lt; b &amp; [/b]" in page
    assert "<svg" in page
    assert "<td class=number>3</td>" in page


def test_records_are_continued_or_refused(toy, tmp_path, capsys):
    out = tmp_path / "out"
    toy.fails = RuntimeError("no more")
    try:
        assert prograde("toy", "--to", 3, "--words", "a b", "--out", out) == 1
    finally:
        toy.fails = None
    said = capsys.readouterr().err.replace("\n", " ")
    assert "no more The records so far are complete. To continue:" in said
    assert f"toy --to 3 --words 'a b' --out {out} --resume" in said
    assert toy.measured == [1]
    assert prograde("toy", "--to", 3, "--out", out) == 2
    assert "Pass --resume" in capsys.readouterr().err
    assert prograde("toy", "--to", 4, "--out", out, "--resume") == 2
    assert "to is 3 there and 4 here" in capsys.readouterr().err
    assert prograde("toy", "--to", 3, "--out", out, "--resume") == 0
    assert toy.measured == [1, 2, 3]


def test_records_are_shown_again_without_measuring(toy, tmp_path, capsys):
    out = tmp_path / "out"
    prograde("toy", "--out", out)
    first = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert prograde("toy", "--from", out) == 0
    assert (out / "report.html").read_bytes() == first
    assert prograde("report", out) == 0
    assert (out / "report.html").read_bytes() == first
    assert toy.measured == [1, 2]
    capsys.readouterr()
    assert prograde("toy", "--from", out, "--to", 3) == 2
    assert "takes no other option, but got --to" in capsys.readouterr().err.replace("\n", " ")
    assert prograde("report", tmp_path) == 0  # stores one level below are found
    assert prograde("report", tmp_path / "absent") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", 0], "--to 0: at least 1 is needed"),
        (["--resume"], "--resume needs --out DIR"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    words, said, toy, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert prograde("toy", *words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_ends_with_1_and_no_advice(toy, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert prograde("toy", "--out", tmp_path / "file" / "out") == 1
    assert "To continue" not in capsys.readouterr().err


def test_pages_are_written_between_marks_and_compared_with_records(toy, tmp_path, capsys):
    out, page = tmp_path / "out", tmp_path / "docs" / "page.md"
    prograde("toy", "--out", out)
    page.parent.mkdir()
    marks = f"<!-- records: {out} only all -->", "<!-- end of records -->"
    page.write_text(f"before\n\n{marks[0]}\nold\n{marks[1]}\n\nafter\n")
    assert prograde("report", "--pages", page, "--check") == 1
    assert "differs from its records" in capsys.readouterr().err
    assert "old" in page.read_text()
    for _ in range(2):  # writing it again changes nothing
        assert prograde("report", "--pages", page) == 0
        text = page.read_text()
        assert text.startswith(f"before\n\n{marks[0]}\n\na < b & [/b]")
        assert text.endswith(f"{marks[1]}\n\nafter\n")
        assert text.count("| numbers/2 | 2 |") == 1
        assert "![a line](page/line.svg)" in text
    assert prograde("report", "--pages", page, "--check") == 0
    (page.parent / "page" / "line.svg").write_text("another")
    assert prograde("report", "--pages", page, "--check") == 1
    page.write_text("no marks")
    assert prograde("report", "--pages", page) == 2
    page.write_text(f"<!-- records: {out} only some -->\n{marks[1]}\n")
    assert prograde("report", "--pages", page) == 2
    assert "the marks name some" in capsys.readouterr().err


PROGRAM = """
import sys, threading, time, _thread
import jax, jax.numpy as jnp
sys.path.insert(0, {folder!r})
from test_study import Toy, cli, studies

class Slow(Toy):
    def run(self, stores, display):
        stores["."].once("numbers/1", lambda: {{"n": 1}})
        print("running", flush=True)
        jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, y: y @ x, x))(jnp.ones((200, 200)))
        time.sleep(60)

for module in (cli, studies):
    module.STUDIES = {{"toy": "toy"}}
    module.study = lambda name: Slow
cli.main()
"""


@pytest.mark.long
def test_ctrl_c_ends_with_130_while_a_device_works(tmp_path):
    """Device work that still runs does not crash the process, and the way to go on is said."""
    program = textwrap.dedent(PROGRAM.format(folder=os.path.dirname(__file__)))
    process = subprocess.Popen(
        [sys.executable, "-c", program, "toy", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "running" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped; the records are complete. To continue:" in errors.replace("\n", " ")
    assert json.loads((tmp_path / "out" / "numbers" / "1.json").read_text()) == {"n": 1}


@pytest.mark.long
def test_help_piped_into_head_ends_quietly():
    command = f"{sys.executable} -m prograde.lab.cli --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_control_characters_of_data_do_not_reach_the_terminal(capsys):
    from rich.console import Console

    from prograde.lab.report import terminal

    table = Table("\x1b[31mtitle", ["a"], [["[/b]\x1b]0;x\x07 [red]y"]])
    terminal.print_table(table, Console(force_terminal=False, width=80))
    terminal.say(Console(width=80), "path [/b] \x1b[2J")
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[/b]\\x1b]0;x\\x07 [red]y" in said
    assert "path [/b] \\x1b[2J" in said


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_study_explains_each_of_its_options(name):
    """The first line of the help text is a sentence, and every field has a docstring of its own."""
    from tyro._docstrings import get_field_docstring

    cls = studies.study(name)
    assert cls.name == name
    assert cls.__doc__.splitlines()[0].endswith(".")
    for options, name in options_of(cls):
        assert get_field_docstring(options, name, ()), name


def options_of(cls):
    """The options of a study, with the class that documents each: nested ones have their own."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from options_of(type(field.default))
        else:
            yield cls, field.name
