"""Killed workers: which process is killed, what counts as lost, and how the series goes on."""

import random
from pathlib import Path

import pytest
from rich.console import Console

from prograde.lab.display import Display
from prograde.lab.report import Table
from prograde.lab.store import Store
from prograde.lab.studies.kills import group, report, run

ROOT = Path(__file__).parents[3]


class FakeGroup:
    """Two workers that write a step each time somebody looks, and end when one is killed."""

    made, killed, ended_by = [], [], 137

    def __init__(self, directory, steps, *options):
        self.directory, self.status, self.said = directory, None, []
        self.made.append((steps, options))
        for i in range(2):
            (directory / str(i)).mkdir(exist_ok=True)
            (directory / str(i) / "start.json").write_text('{"from": 40}')
            (directory / str(i) / "run.log").write_bytes(b"")

    def kill(self, worker):
        self.killed.append(worker)
        self.said.append(f"worker {worker} was ended by SIGKILL; the others are stopped.")

    def wait(self, seconds):
        self.status = self.ended_by
        return self.status


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeGroup, "made", [])
    monkeypatch.setattr(FakeGroup, "killed", [])
    monkeypatch.setattr(FakeGroup, "ended_by", 137)
    monkeypatch.setattr(group, "Group", FakeGroup)
    lengths = {"0": 55, "1": 60}
    monkeypatch.setattr(group, "ReplayLog", type("Log", (), {
        "open": staticmethod(lambda path, partial: range(lengths[path.parent.name]))
    }))  # fmt: skip
    slept = []
    monkeypatch.setattr(group.time, "sleep", slept.append)

    def until(condition, seconds=120):
        for log in FakeGroup.directory.glob("*/run.log"):
            log.write_bytes(log.read_bytes() + b"x")
        assert condition()

    monkeypatch.setattr(group, "_until", until)
    return slept


def test_chance_decides_which_worker_is_killed_and_when(fake, tmp_path):
    FakeGroup.directory = tmp_path
    kill = group.kill_at_random(tmp_path, 300, random.Random(3))
    chance = random.Random(3)
    victim = chance.randrange(2)
    assert FakeGroup.killed == [victim] == [kill.victim]
    assert fake == [1.5 * chance.random()]  # seconds after the first new record in the log
    assert FakeGroup.made == [(300, ("sleep=0.02",))]
    assert (kill.begun, kill.flushed) == (40, 60)  # the log that got furthest
    assert (kill.hung, kill.status) == (False, 137)
    assert {group.kill_at_random(tmp_path, 300, random.Random(i)).victim for i in range(9)} == {
        0,
        1,
    }


def test_a_kill_that_nobody_noticed_is_an_error(fake, tmp_path, monkeypatch):
    FakeGroup.directory = tmp_path
    monkeypatch.setattr(FakeGroup, "kill", lambda self, worker: None)
    with pytest.raises(RuntimeError, match="was killed, and `launch` said"):
        group.kill_at_random(tmp_path, 300, random.Random(0))


def test_workers_that_do_not_end_are_a_hang_and_are_killed(fake, tmp_path, monkeypatch):
    FakeGroup.directory = tmp_path
    ended = []

    def never(self, seconds):
        raise TimeoutError(seconds)

    monkeypatch.setattr(FakeGroup, "wait", never)
    monkeypatch.setattr(FakeGroup, "kill_all", lambda self: ended.append(True), raising=False)
    assert group.kill_at_random(tmp_path, 300, random.Random(0)).hung
    assert ended == [True]


def kill(begun, flushed, victim=0, seconds=0.25, hung=False, status=137, busy=0.0):
    return group.Kill(victim, begun, flushed, seconds, hung, status, busy)


def test_steps_are_lost_where_the_next_start_goes_on_from_before_them():
    kills = [vars(kill(0, 20)), vars(kill(20, 45)), vars(kill(40, 60))]
    assert run.lost_steps(kills, 60) == 5  # 45 were flushed, and it went on from 40
    assert run.lost_steps(kills, 52) == 5 + 8
    assert run.lost_steps(kills[:1], 25) == 0  # another worker was further


@pytest.fixture
def series(monkeypatch, tmp_path):
    """A series whose kills are made up: (store, what was done in order)."""
    done, starts = [], iter(range(0, 1000, 20))

    def kill_at_random(directory, steps, chance):
        begun = next(starts)
        done.append((directory.name, steps, chance.random()))
        return kill(begun, begun + 20, victim=len(done) % 2)

    class Group:
        def __init__(self, directory, steps):
            directory.mkdir(exist_ok=True)
            done.append((directory.name, steps, "to the end"))

        def wait(self, seconds):
            return 0

    monkeypatch.setattr(run, "kill_at_random", kill_at_random)
    monkeypatch.setattr(run, "Group", Group)
    monkeypatch.setattr(run, "begun_from", lambda directory: 60)
    monkeypatch.setattr(run, "finals", lambda directory: ["same", "same"])
    manifest = Store.open(ROOT / "records" / "kills").manifest
    store = Store(tmp_path)
    store.write("manifest", manifest | {"config": {"kills": 3, "seed": 5}})
    return store, done


def test_a_series_that_was_stopped_goes_on_with_the_kills_that_are_left(series, monkeypatch):
    store, done = series
    quiet = Display(Console(quiet=True))
    real, count = run.kill_at_random, iter(range(9))

    def stopped(directory, steps, chance):
        if next(count) == 1:
            raise KeyboardInterrupt
        return real(directory, steps, chance)

    monkeypatch.setattr(run, "kill_at_random", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.measure(store, 3, 5, quiet)
    assert len(store.read_lines("kills")) == 1
    run.measure(store, 3, 5, quiet)
    chances = [random.Random(f"5 {i}").random() for i in range(3)]
    assert done == [
        *(("disturbed", 180, chance) for chance in chances),
        ("disturbed", 180, "to the end"),
        ("undisturbed", 180, "to the end"),
    ]
    expected = {"steps": 180, "lost_steps": 0, "same_parameters": True}
    assert store.read("result") == expected
    assert not store.path("disturbed").exists()
    run.measure(store, 3, 5, quiet)
    assert len(done) == 5  # it is complete


def test_parameters_that_differ_are_told(series, monkeypatch):
    store, _ = series
    monkeypatch.setattr(run, "finals", lambda directory: [directory.name] * 2)
    run.measure(store, 3, 5, Display(Console(quiet=True)))
    assert not store.read("result")["same_parameters"]
    store.write_lines("kills", [vars(kill(0, 20, seconds=s, hung=s > 1)) for s in (0.5, 1.5, 0.75)])
    (section,) = report.report([store]).sections
    text = section.content[0]
    assert "killed with SIGKILL 3 times" in text
    assert "1 hangs, 0 lost steps" in text
    assert "DIFFER from those of a run that nobody disturbed" in text
    assert "after 0.75 s in the median, and after 1.50 s at most" in text
    (table,) = (part for part in section.content if isinstance(part, Table))
    assert table.rows == [["0", "3", "0.75", "1.50", "1"], ["1", "0", "0.00", "0.00", "0"]]


def test_report_of_kills_on_a_busy_machine_warns(series):
    store, _ = series
    store.write_lines("kills", [vars(kill(0, 20, busy=b)) for b in (0.0, 0.4)])
    (section,) = report.report([store]).sections
    assert "The series is not complete" in section.content[0]
    assert "Other processes used 40 % of the machine" in section.content[-1]
