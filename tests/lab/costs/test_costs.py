"""`prograde basics`, `bounds` and `replay-speed`: what is compared with what, and reported."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.measure import timing
from prograde.lab.models.network import Network
from prograde.lab.report import Table
from prograde.lab.store import Store
from prograde.lab.studies.basics import report as basics_report
from prograde.lab.studies.basics import run as basics
from prograde.lab.studies.basics.plan import Basics
from prograde.lab.studies.bounds import report as bounds_report
from prograde.lab.studies.bounds import run as bounds
from prograde.lab.studies.bounds.plan import Bounds
from prograde.lab.studies.replay_speed import report as replay_report
from prograde.lab.studies.replay_speed import run as replay
from prograde.lab.studies.replay_speed.plan import ReplaySpeed
from prograde.lab.study import UsageError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def display():
    return Display(Console(quiet=True))


def committed(name):
    return Store.open(ROOT / "records" / name)


def copied(name, directory, **changed):
    """The committed store of this name, with some records changed."""
    old, new = committed(name), Store(directory)
    new.write("manifest", old.manifest)
    for record in old.names():
        new.write(record, changed.get(record, old.read(record)))
    return new


def sentences(section):
    return [part for part in section.content if isinstance(part, str)]


def turns(**seconds):
    """Makes `take_turns` give these seconds by program and round."""
    return lambda visits, rounds, *_, **__: timing.Turns(seconds, {}, 0.25)


def test_imports_are_the_median_of_the_rounds_differences(monkeypatch, display):
    # the differences are 0.5, 2 and 0.25; that of the medians would be 1
    found = turns(jax=[1.0, 2.0, 2.0], both=[1.5, 4.0, 2.25])
    monkeypatch.setattr(basics, "take_turns", found)
    assert basics.imports(display) == {"seconds": 0.5, "n": 9, "busy": 0.25}


def test_the_loop_is_compared_with_steps_dispatched_alone(monkeypatch, display):
    # the rounds' ratios are 1, 1/2 and 3
    found = turns(loop=[1.0, 4.0, 9.0], alone=[1.0, 8.0, 3.0])
    monkeypatch.setattr(basics, "take_turns", found)
    monkeypatch.setattr(basics, "METHODS", {"backprop": pg.Backprop()})
    monkeypatch.setattr(basics.models, "mlp", lambda: LINEAR)
    one = basics.loop(3, display)["backprop"]
    assert one["ratio"] == {"median": 1.0, "low": 0.75, "high": 2.0, "n": 3}
    assert one["busy"] == 0.25


def logits(params, images):
    return images.reshape(len(images), -1) @ params


LINEAR = Network(lambda key: np.zeros((784, 10), np.float32), logits)


def test_steps_alone_and_in_the_loop_are_as_many(monkeypatch):
    monkeypatch.setattr(basics.models, "mlp", lambda: LINEAR)
    trainer = basics._trainer(pg.Backprop(), in_scan=False)
    taken, program = [], trainer.program

    def counted(carry, *arguments):
        taken.append(int(carry[2]))
        return program(carry, *arguments)

    trainer.program = counted
    visit = basics._dispatched(trainer)
    assert visit(3) > 0
    assert visit(2) > 0
    assert taken == [0, 1, 2, 3, 4]


def test_report_of_basics_says_what_misses_its_target(tmp_path):
    (section,) = basics_report.report([committed("basics")]).sections
    (table,) = (part for part in section.content if isinstance(part, Table))
    assert [row[1:] for row in table.rows] == [
        ["0.37 s", "0.5 s"],
        ["7.6 s", "20 s"],
        ["1.95", "1.9, missed"],
        ["2.95", ""],
        ["0.94", "1.05"],
        ["1.00", "1.05"],
    ]
    assert sentences(section) == []
    beale = committed("basics").read("beale") | {"busy": 0.4}
    (section,) = basics_report.report([copied("basics", tmp_path, beale=beale)]).sections
    assert "Other processes used 40 % of the machine" in sentences(section)[0]


def test_report_of_bounds_warns_where_the_machine_was_busy(tmp_path):
    found = committed("bounds").read("cnn")
    new = {name: one | {"busy": 0.4, "ratio": one["seconds"]} for name, one in found.items()}
    (section,) = bounds_report.report([copied("bounds", tmp_path, cnn=new)]).sections
    tables = [part for part in section.content if isinstance(part, Table)]
    assert tables[0].columns == ["program", "ms (quartiles)"]  # records of version 0.1
    assert tables[1].columns == ["program", "ms (quartiles)", "over loss"]
    assert tables[0].rows[0] == ["two products", "1.72 (1.58 to 2.06)"]
    assert tables[3].rows[0] == ["backprop", "0.453 (0.421 to 0.493)"]  # in seconds
    (unsteady, busy) = sentences(section)
    assert "Unsteady from round to round: one product of stacked rows." in unsteady
    assert "Other processes used 40 %" in busy


def test_compilation_is_timed_anew_each_round(monkeypatch, display):
    cleared, compiled, real = [], [], bounds.jax.clear_caches
    monkeypatch.setattr(bounds.jax, "clear_caches", lambda: (cleared.append(1), real()))

    def take_turns(visits, rounds, *_, calls):
        assert (rounds, calls) == (1, 1)
        compiled.extend(visits)
        return timing.Turns({name: [visit(calls)] for name, visit in visits.items()}, {}, 0.25)

    monkeypatch.setattr(bounds, "take_turns", take_turns)
    found = bounds.compilation(1, display, layers=1, width=4, batch=2)
    assert compiled == list(found) == ["backprop", "prograde-1", "prograde-4"]
    assert len(cleared) == 3
    assert all(one["seconds"]["median"] > 0 for one in found.values())


def test_parts_of_bounds_have_titles():
    assert list(bounds.PARTS) == list(bounds_report.TITLES)
    for name, (_, base) in bounds_report.TITLES.items():
        assert base in committed("bounds").read(name)


def test_replaying_makes_the_same_bits_whatever_the_order_of_the_turns(monkeypatch, display):
    """Replaying is a turn behind, so that a round may begin with it."""
    monkeypatch.setattr(replay.models, "mlp", lambda: LINEAR)
    seen = []

    def take_turns(visits, rounds, *_, calls):
        names, seconds = list(visits), {name: [] for name in visits}
        for order in [names, names, *itertools.repeat(names[::-1], rounds)]:
            for name in order:
                seen.append(name)
                seconds[name].append(visits[name](calls) * 0 + len(seen))
        return timing.Turns({name: values[2:] for name, values in seconds.items()}, {}, 0.25)

    monkeypatch.setattr(replay, "take_turns", take_turns)
    found = replay.measure(20, 4, display)
    assert seen[6:] == ["replay", "training in one scan", "training"] * 2
    assert found["same_bits"]
    assert found["parameters"] == 7840
    assert found["busy"] == 0.25
    # seconds of the turns are 7 and 10 over 9 and 12
    assert found["replay_over_training"]["median"] == pytest.approx((7 / 9 + 10 / 12) / 2)
    assert found["seconds_a_step"]["training"]["median"] == pytest.approx(10.5 / 4)


def test_report_of_replaying_says_when_bits_differ_and_times_are_worth_nothing(tmp_path):
    found = committed("replay-speed").read("replay")
    (section,) = replay_report.report([committed("replay-speed")]).sections
    assert "takes 121 KB" in section.content[0]
    assert (
        "the same bit by bit. Replaying takes 0.12 (0.11 to 0.13) of the time" in section.content[0]
    )
    changed = found | {"same_bits": False, "busy": 0.4}
    (section,) = replay_report.report([copied("replay-speed", tmp_path, replay=changed)]).sections
    assert "NOT the same" in section.content[0]
    assert "Other processes used 40 %" in sentences(section)[-1]


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (Basics(rounds=1), "--rounds 1: at least 2"),
        (Bounds(rounds=0), "--rounds 0: at least 1"),
        (ReplaySpeed(turn=0), "--turn 0: at least 1"),
        (ReplaySpeed(steps=1500, turn=500), "at least 4 times as large"),
        (ReplaySpeed(steps=10_001), "must be a multiple of --turn 500"),
    ],
)
def test_bad_options_are_refused(study, words):
    with pytest.raises(UsageError) as error:
        study.configs()
    assert words in str(error.value)
