"""The page on fine-tuning says what its records say."""

import re
from pathlib import Path

import finetune_page
import pytest

from prograde.lab import records

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_records():
    page = finetune_page.PAGE.read_text()
    assert finetune_page.written(page) == page


def test_the_targets_that_are_called_met_are_met():
    steps = records.read_json(ROOT / "records" / "finetune-steps.json")
    ours, inference = (
        steps["memory"]["forward gradient, K = 1"]["peak_rss"],
        steps["memory"]["inference"]["peak_rss"],
    )
    assert ours <= 1.15 * inference
    assert steps["over_backprop"] <= 0.5
    mezo = steps["over_mezo"]
    assert mezo["MeZO"] <= 0.7
    page = " ".join(finetune_page.PAGE.read_text().split())
    assert (
        f"takes {steps['over_backprop']:.2f} of backprop's time, {mezo['MeZO']:.2f} of MeZO's and "
        f"{mezo['MeZO, rank-one directions']:.2f} of MeZO's with our rank-one directions, and {ours / inference:.2f} of the memory"
    ) in page


@pytest.mark.parametrize("method", finetune_page._COLOURS)
def test_every_method_has_three_seeds(method):
    runs = [
        run
        for run in records.read_json(ROOT / "records" / "finetune-curves.json")["runs"]
        if run["method"] == method
    ]
    assert sorted(run["seed"] for run in runs) == [0, 1, 2]


def test_numbers_of_the_page_that_are_not_in_tables():
    page = finetune_page.PAGE.read_text()
    curves = records.read_json(ROOT / "records" / "finetune-curves.json")
    trained = {run["method"]: run["trained"] for run in curves["runs"]}
    assert trained["forward gradient, last norm, K = 32"] == 576
    assert re.search(rf"{trained['backprop, all weights']:,}", page)
