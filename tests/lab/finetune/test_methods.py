"""The comparison of fine-tuning methods: its figures are those of the records."""

import json
from pathlib import Path

import numpy as np
import pytest

from prograde.lab.commands.report import report_of
from prograde.lab.report import Table
from prograde.lab.store import Store, claim
from prograde.lab.studies.finetune_methods import curves
from prograde.lab.studies.finetune_methods.methods import CURVES, OURS, STEPS
from prograde.lab.studies.finetune_methods.plan import FinetuneMethods
from prograde.lab.studies.finetune_methods.report import FORWARD, ratios
from prograde.lab.study import UsageError

ROOT = Path(__file__).parents[3]
RECORDS = ROOT / "records" / "finetune-methods"


def test_the_targets_that_the_page_calls_met_are_met():
    store = Store.open(RECORDS / "steps")
    memory, found = store.read("memory"), ratios(store)
    ours = memory[OURS]["peak_rss"] / memory["inference"]["peak_rss"]
    assert ours <= 1.15
    assert found["ours / backprop"] <= 0.5
    assert found["ours / MeZO"] <= 0.7
    page = " ".join((ROOT / "docs" / "finetune.md").read_text().split())
    assert (
        f"takes {found['ours / backprop']:.2f} of backprop's time, {found['ours / MeZO']:.2f} of "
        f"MeZO's and {found['ours / MeZO, rank-one directions']:.2f} of MeZO's with our rank-one "
        f"directions, and {ours:.2f} of the memory"
    ) in page


def test_a_ratio_is_the_median_of_the_rounds_own_ratios(tmp_path):
    """Rounds (1, 2), (6, 3), (8, 2): the ratios .5, 2, 4; the ratio of the medians is 3."""
    (store,) = claim("finetune-methods", {tmp_path: {"part": "steps"}}, False)
    seconds = {name: [2.0, 3.0, 2.0] for name in (FORWARD, *STEPS)} | {OURS: [1.0, 6.0, 8.0]}
    store.write("times", {"seconds": seconds, "busy": 0.5, "temp_bytes": dict.fromkeys(STEPS, 0)})
    memory = {name: {"peak_rss": 2_000_000} for name in ("inference", *STEPS)}
    store.write("memory", memory | {OURS: {"peak_rss": 3_000_000}})
    assert ratios(store)[OURS] == 2.0
    assert ratios(store)["ours / backprop"] == 2.0
    (section,) = report_of([store]).sections
    table = next(part for part in section.content if isinstance(part, Table))
    assert table.rows[1] == [OURS, "2.00", "0", "3", "1.50"]
    assert any("do not trust" in part for part in section.content if isinstance(part, str))


def test_every_method_has_three_seeds():
    store = Store.open(RECORDS / "curves")
    runs = [store.read(name) for name in store.names("runs")]
    found = sorted((run["method"], run["seed"]) for run in runs)
    assert found == sorted((method, seed) for method in CURVES for seed in range(3))
    assert {curves.record_name(m, s) for m, s in found} == set(store.names("runs"))
    trained = {run["method"]: run["trained"] for run in runs}
    assert trained["forward gradient, last norm, K = 32"] == 576
    assert f"{trained['backprop, all weights']:,}" in (ROOT / "docs" / "finetune.md").read_text()


def test_the_spread_is_mean_least_and_greatest(tmp_path):
    (store,) = claim("finetune-methods", {tmp_path: {"part": "curves"}}, False)
    point = lambda a: {"step": 4, "seconds": 2.0, "accuracy": a, "loss": 1 - a, "auc": a}
    for seed, accuracy in enumerate((0.5, 0.7, 0.9)):
        start = {"raw": point(0.25), "calibrated": point(0.5)}
        store.write(f"zero-shot/{seed}", start)
        run = {"method": "backprop, last norm", "seed": seed, "trained": 576}
        store.write(
            curves.record_name("backprop, last norm", seed), run | {"curve": [point(accuracy)]}
        )
    (section,) = report_of([store]).sections
    table = next(part for part in section.content if isinstance(part, Table))
    assert table.rows[2] == [
        "backprop, last norm (576)",
        "4",
        "2",
        "70.0 (50.0 to 90.0)",
        "0.300 (0.100 to 0.500)",
        "0.700 (0.500 to 0.900)",
    ]


def test_no_text_is_on_both_sides_of_the_split():
    different = [f"text {i}" for i in range(2500)]
    for seed in range(3):
        train, held_out = curves.split(different, seed)
        assert (len(train), len(held_out)) == (1500, 1000)
        assert sorted(np.concatenate([train, held_out])) == list(range(2500))
    assert curves.split(different, 0)[1][:4].tolist() == [1861, 799, 68, 458]
    repeated = [f"text {i % 2000}" for i in range(2500)]
    train, held_out = curves.split(repeated, 0)
    assert len(held_out) == 1000
    assert not {repeated[i] for i in train} & {repeated[i] for i in held_out}


def test_a_run_that_is_recorded_is_not_made_again(tmp_path):
    """The manifest of a directory names its part and its minutes, and no list of methods."""
    study = FinetuneMethods(parts=("steps",), rounds=3)
    assert study.configs() == {"steps": {"part": "steps", "rounds": 3}}
    table = tmp_path / "t.tsv"
    table.write_text("text\tlabel\n")
    configs = FinetuneMethods(parts=("curves", "steps"), data=table).configs()
    assert configs["curves"] == {"part": "curves", "data": "t.tsv", "minutes": 1.0}
    recorded = json.loads((RECORDS / "curves" / "manifest.json").read_text())["config"]
    assert recorded.keys() == configs["curves"].keys()


@pytest.mark.parametrize(
    "options",
    [{"parts": ("all",)}, {"parts": ("curves",)}, {"methods": ("SGD",)}, {"rounds": 0}],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError):
        FinetuneMethods(**options).configs()
