"""The figures on the page about many machines are those of the records."""

import statistics
from pathlib import Path

from prograde.lab import records

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "distributed.md").read_text().split())


def test_kills():
    record = records.read_json(ROOT / "records" / "kills.json")
    kills, seconds = len(record["kills"]), record["seconds_to_end"]
    assert record["same_parameters"]
    assert f"one was killed with SIGKILL {kills} times" in PAGE
    assert f"{record['hangs']} hangs, {record['lost_steps']} lost steps" in PAGE
    assert (
        f"after {statistics.median(seconds):.2f} s in the median, and after {max(seconds):.2f} s at most"
        in PAGE
    )


def test_replay():
    record = records.read_json(ROOT / "records" / "replay.json")
    ratio, size = record["replay_over_training"], record["log_bytes"] / 1000
    assert record["same_bits"]
    assert f"{int(record['config']['steps']):,} steps" in PAGE
    assert (
        f"{ratio['median']:.2f} of the time of training ({ratio['low']:.2f} to {ratio['high']:.2f})"
        in PAGE
    )
    assert f"a log of {size:.0f} KB" in PAGE
    assert f"{record['parameter_bytes'] / 1e6:.1f} MB" in PAGE
