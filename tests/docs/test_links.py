"""Steps over a slow link: the cost model, the record, and the link itself where this is root."""

import math
import os
import subprocess
from pathlib import Path

import link_network
import link_report
import pytest

from prograde.lab import records

ROOT = Path(__file__).parents[2]

GATHER, SUM = "all-gather f32[4,3]{1,0}", "all-reduce (f32[10,100]{1,0}, /*index=5*/f32[])"


def test_rounds_and_bytes_are_those_of_a_ring():
    # each of 4 workers passes on 3 messages of 3 float32, with 50 bytes around each
    assert link_report.exchange([GATHER], 4, 50) == (3, 3 * (12 + 50))
    # two arrays, of 4,000 and of 4 bytes, one after the other
    assert link_report.exchange([SUM], 4, 50) == (12, pytest.approx(2 * 4004 * 3 / 4))
    assert link_report.exchange([GATHER, SUM], 1, 50) == (0, 0)


def test_seconds_are_compute_and_delays_and_bytes():
    assert link_report.seconds(0.5, 3, 1000, 8000, 0.025) == pytest.approx(0.5 + 0.15 + 1.0)
    assert link_report.seconds(0.5, 3, 1000, math.inf, 0) == 0.5


def test_the_rate_grows_with_all_tangents_until_they_are_as_many_as_the_parameters():
    assert link_report.rate_factor(1000, 10) == pytest.approx(10 / 1010)
    assert link_report.rate_factor(1000, 1_000_000) == pytest.approx(1, rel=1e-2)


@pytest.fixture(scope="module")
def record():
    return records.read_json(ROOT / "records" / "links.json")


def test_the_page_in_the_docs_is_that_of_the_record(record):
    text = (ROOT / "docs" / "links.md").read_text()
    begin, end = text.index(link_report.BEGIN) + len(link_report.BEGIN), text.index(link_report.END)
    assert text[begin:end].strip() == link_report.markdown(record).strip()
    assert record["model"] == records._plain(link_report.model(record))


def test_what_was_measured_keeps_to_the_payload_and_to_equal_replicas(record):
    mlp, smollm2 = record["parts"]["mlp"]["found"], record["parts"]["smollm2"]["found"]
    groups = [found for w in ("2", "4") for where, found in mlp[w].items() if where != "apart"]
    groups += [found for where, found in smollm2.items() if where != "apart"]
    for methods in groups:
        for method, one in methods.items():
            assert one["replicas_equal"]
            if method != "backprop":
                k = int(method.removeprefix("K = "))
                assert one["payload"] <= 8 * k + 64
                # one gather and nothing else is exchanged
                assert len(one["collectives"]) == 1
                assert link_report.arrays(one["collectives"][0]) == [
                    one["workers"] * one["payload"]
                ]


def test_the_link_delays_and_leaves_nothing_behind():
    if os.name != "posix" or os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("needs root and /dev/net/tun")
    try:
        subprocess.run(["ip", "netns", "add", "prograde-probe"], check=True, capture_output=True)
        subprocess.run(["ip", "netns", "delete", "prograde-probe"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces here")
    with link_network.Network(link_network.Link(20e6, 0.01), 2) as network:
        found = link_network.check(network, 2_000_000)
        names = network.names
    assert found["round_trip_seconds"] >= 0.02
    assert (
        found["bits_a_second"] <= 1.02 * 20e6
    )  # packets may wait for the relay, and come together
    assert not set(names) & set(
        subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.split()
    )
    assert network.relay.poll() is not None
