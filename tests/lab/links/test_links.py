"""Steps over a slow link: the cost model, the record, and the link itself where this is root."""

import math
import signal
import subprocess
from pathlib import Path

import pytest

from prograde.lab.report import Table
from prograde.lab.report.words import quartiles as words_of
from prograde.lab.store import Store
from prograde.lab.studies.links import PARTS, model, network, report, run
from prograde.lab.studies.links.group import Group, Job, Measured
from prograde.lab.studies.links.plan import Links
from prograde.lab.study import UsageError

ROOT = Path(__file__).parents[3]
GATHER, SUM = "all-gather f32[4,3]{1,0}", "all-reduce (f32[10,100]{1,0}, /*index=5*/f32[])"


def test_rounds_and_bytes_are_those_of_a_ring():
    assert model.arrays(SUM) == [4000, 4]
    # each of 4 workers passes on 3 messages of 3 float32, with 50 bytes around each
    assert model.exchange([GATHER], 4, 50) == (3, 3 * (12 + 50))
    # two arrays, of 4,000 and of 4 bytes, one after the other
    assert model.exchange([SUM], 4, 50) == (12, pytest.approx(2 * 4004 * 3 / 4))
    assert model.exchange([GATHER, SUM], 4, 50)[0] == 15
    assert model.exchange([GATHER, SUM], 1, 50) == (0, 0)


def test_seconds_are_compute_and_delays_and_bytes():
    assert model.seconds(0.5, 3, 1000, 8000, 0.025) == pytest.approx(0.5 + 0.15 + 1.0)
    assert model.seconds(0.5, 3, 1000, math.inf, 0) == 0.5


def test_the_rate_grows_with_all_tangents_until_they_are_as_many_as_the_parameters():
    assert model.rate_factor(1000, 10) == pytest.approx(10 / 1010)
    assert model.rate_factor(1000, 1_000_000) == pytest.approx(1, rel=1e-2)


def step(seconds, collectives, **more):
    return {"seconds": {"median": seconds}, "collectives": collectives, "parameters": 999, **more}


SOURCE = {
    "apart": {"K = 1": step(0.5, []), "backprop": step(0.7, [])},
    "unlimited": {
        "K = 1": step(0.6, ["all-gather f32[2,2]"]),
        # the first collective is the sum of the losses
        "backprop": step(0.9, ["all-reduce f32[]", "all-reduce f32[250]", "all-reduce f32[250]"]),
    },
}


def test_a_prediction_adds_the_exchange_to_what_workers_apart_take():
    source = SOURCE | {"10 Mbit/s, 50 ms": SOURCE["unlimited"]}
    found = model.predicted(source, 2, 652)
    assert found["unlimited", "K = 1"] == 0.5
    assert found["unlimited", "backprop"] == 0.7
    # one round; 8 bytes and what is around them
    assert found["10 Mbit/s, 50 ms", "K = 1"] == pytest.approx(0.5 + 0.05 + 8 * 660 / 10e6)
    # two rounds for each of three sums; each sends its bytes once
    assert found["10 Mbit/s, 50 ms", "backprop"] == pytest.approx(0.7 + 0.3 + 8 * 2004 / 10e6)


def test_a_projection_gives_each_worker_a_tangent_of_its_own():
    updates = {"1": {"median": 0.1}, "64": {"median": 2.0}}
    slow = model.projected(SOURCE, updates, 64, 652)[0]
    assert slow["link"] == "10 Mbit/s"
    ours, theirs = slow["ours"], slow["backprop"]
    assert slow["update_measured"]
    assert ours["compute"] == pytest.approx(0.5 - 0.1 + 2.0)
    sent = 63 * (8 + 652)
    assert ours["ring"] == pytest.approx(2.4 + 63 * 0.05 + 8 * sent / 10e6)
    # six rounds, and bytes around six messages
    assert ours["doubling"] == pytest.approx(2.4 + 6 * 0.05 + 8 * (63 * 8 + 6 * 652) / 10e6)
    sent = 2 * 2000 * 63 / 64
    assert theirs["ring"] == pytest.approx(0.7 + 4 * 63 * 0.05 + 8 * sent / 10e6)
    assert theirs["doubling"] == pytest.approx(0.7 + 12 * 0.05 + 8 * sent / 10e6)
    many = model.projected(SOURCE, updates, 4096, 652)[0]  # 64 times as many tangents
    assert not many["update_measured"]
    assert many["ours"]["compute"] == pytest.approx(0.4 + 64 * 2.0)
    two = model.projected(SOURCE, updates, 2, 652)[0]
    assert two["ours"]["compute"] == pytest.approx(0.5)


def test_parts_of_the_ideal_are_medians_of_the_rounds_ratios():
    found = run.of_ideal({"1": [4.0, 2.0, 6.0], "2": [2.0, 4.0, 1.5], "4": [1.0, 1.0, 1.0]})
    # 1, 1/4 and 2; the ratio of the medians is 1 as well, but not its quartiles
    assert found["2"] == {"median": 1.0, "low": 0.625, "high": 1.5, "n": 3}
    assert found["4"]["median"] == 2.0
    assert "1" not in found


def test_jobs_share_the_batch_or_each_has_its_part():
    job = Job("mlp", 64, "weight", 8)
    assert (job.name, Job("mlp", 64, "backprop").name) == ("K = 8", "backprop")
    apart, joined, alone = (object.__new__(Group) for _ in range(3))
    apart.size, apart.network = 4, None
    joined.size, joined.network = 4, object()
    alone.size, alone.network = 1, None
    assert apart.own_part(job).batch == 16
    assert joined.own_part(job) == alone.own_part(job) == job


class FakeGroup:
    """Two workers, whose steps take 1, 2, 3, ... and 10, 20, 30, ... seconds."""

    size = 2

    def __init__(self, checksums=(1, 1)):
        self.asked, self.checks = [], checksums
        self.network = self
        self.count = 0

    def dropped(self):
        return 7 * len(self.asked)

    def own_part(self, job):
        return job

    def ask(self, do, job=None, **more):
        self.asked.append((do, more))
        if do == "compile":
            return [{"payload": 8}, {"payload": 9}]
        if do == "checksums":
            return [{"checksums": check} for check in self.checks]
        steps = range(1, more["steps"] + 1)
        return [
            {"seconds": [float(s) for s in steps], "bytes": 100.0},
            {"seconds": [10.0 * s for s in steps], "bytes": 300.0},
        ]


def test_a_measurement_is_of_all_steps_of_all_workers_but_the_first():
    measured = Measured(FakeGroup(), Job("mlp", 64, "weight"))
    assert [do for do, _ in measured.group.asked] == ["compile", "run"]
    assert measured.seconds == []
    assert measured.visit(2) == [1.0, 2.0, 10.0, 20.0]
    found = measured.record()
    assert found["seconds"] == {"median": 6.0, "low": 1.75, "high": 12.5, "n": 4}
    assert found["bytes"]["median"] == 200.0
    assert (found["payload"], found["workers"]) == (8, 2)
    assert found["replicas_equal"]
    apart = Measured(FakeGroup((1, 2)), Job("mlp", 64, "weight"))
    apart.visit(1)
    assert not apart.record()["replicas_equal"]
    assert run.median_visit(measured)(2) == 12.0


@pytest.fixture(scope="module")
def store():
    return Store.open(ROOT / "records" / "links")


def test_what_was_measured_keeps_to_the_payload_and_to_equal_replicas(store):
    mlp, smollm2 = store.read("mlp")["found"], store.read("smollm2")["found"]
    groups = [found for w in ("2", "4") for where, found in mlp[w].items() if where != "apart"]
    groups += [found for where, found in smollm2.items() if where != "apart"]
    for methods in groups:
        for method, one in methods.items():
            assert one["replicas_equal"]
            if method != "backprop":
                k = int(method.removeprefix("K = "))
                assert one["payload"] <= 8 * k + 64
                # one gather and nothing else is exchanged
                (collective,) = one["collectives"]
                assert model.arrays(collective) == [one["workers"] * one["payload"]]


def test_report_warns_of_a_busy_machine_and_shows_the_note(store, tmp_path):
    copy = Store(tmp_path)
    copy.write("manifest", store.manifest)
    copy.write("scaling", store.read("scaling") | {"busy": 0.5, "note": "a note"})
    (section,) = report.report([copy]).sections
    said = [part for part in section.content if isinstance(part, str)]
    assert "Note on the part `scaling`: a note" in said
    assert any("Other processes used 50 % of the machine" in text for text in said)
    assert any("Unsteady" in text and "MLP, batch 64, 2 processes" in text for text in said)
    (table,) = (part for part in section.content if isinstance(part, Table))
    found = store.read("scaling")["found"]["MLP, batch 64"]["of_ideal"]
    assert table.rows[0][2:] == [words_of(found[kind]) for kind in ("2", "2 apart", "4")]


def test_a_request_that_cannot_be_carried_out_is_refused_before_anything_runs(monkeypatch):
    with pytest.raises(UsageError, match=r"unknown part mlq\. Valid names: all, link, updates"):
        Links(parts=("mlq",)).configs()
    monkeypatch.setattr(network, "missing", lambda: "it must be started by root")
    with pytest.raises(UsageError, match="it must be started by root"):
        Links().configs()
    assert set(run._PARTS) | {"scaling"} == set(PARTS)


def test_a_signal_to_stop_unwinds():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, run.stopped_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.long
def test_the_link_delays_and_leaves_nothing_behind():
    if why := network.missing():
        pytest.skip(why)
    with network.Network(network.Link(20e6, 0.01), 2) as joined:
        found = network.check(joined, 2_000_000)
        names = joined.names
    assert found["round_trip_seconds"] >= 0.02
    # packets may wait for the relay, and come together
    assert found["bits_a_second"] <= 1.02 * 20e6
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.split()
    assert not set(names) & set(left)
    assert joined.relay.poll() is not None
