"""`prograde torch`: options, and the report of a record."""

import importlib.util

import pytest

from prograde.lab.report import Table
from prograde.lab.store import Store
from prograde.lab.studies.torch.plan import Torch
from prograde.lab.studies.torch.run import METHODS
from prograde.lab.study import UsageError


@pytest.mark.parametrize(
    ("options", "words"),
    [({"models": ("mlp", "vgg")}, "vgg.*choose from mlp"), ({"rounds": 1}, "--rounds 1")],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Torch(**options).configs()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"torch is not installed.*transformers"):
        Torch().configs()


def figures(seconds):
    rounds = [seconds, 1.1 * seconds, 0.9 * seconds]
    spread = {"median": seconds, "low": seconds, "high": seconds, "n": 3}
    return {"first": 2.0, "loss": 1.0, "rounds": rounds, "seconds": spread, "ratio": dict(spread)}


def test_the_report_gives_ratios_of_rounds_to_both_of_torch(tmp_path):
    times = {name: 0.01 for names in METHODS.values() for name in names}
    times |= {"prograde": 0.004, "torch-compiled": 0.008, "jax-alone": 0.0032}
    record = {"methods": {n: figures(s) for n, s in times.items()}, "missing": {}, "busy": 0.0}
    record["methods"]["prograde"]["ratio"]["median"] = 0.4
    store = Store(tmp_path)
    store.write("llama", record)
    machine = {"git_dirty": False, "git_commit": "0" * 40, "device": "cpu", "processor": "x"}
    machine |= {"cores": 2, "versions": {"jax": "0"}, "started": "2026-11-28", "xla_flags": ""}
    store.write("manifest", {"config": {}, "study": "torch", "environments": [machine]})
    (section,) = Torch.report([store]).sections
    sentence, table, *_ = section.content
    assert "target: 0.40, reached" in sentence
    assert "takes 1.25 of the time of the same function" in sentence
    assert isinstance(table, Table)
    row = next(row for row in table.rows if row[0].startswith("`value_and_grad`, rank one"))
    assert row[1:] == ["4", "0.40", "0.50", "2.0"]
