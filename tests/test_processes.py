"""Real processes, Gloo between them: killed, restarted, started wrongly."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prograde.lab.launch import _free_port, launch
from prograde.replay import ReplayLog

PROGRAM = [sys.executable, str(Path(__file__).with_name("training_worker.py"))]
STEPS = 120


class Group:
    """A launch in the background, with what it said and when it ended."""

    def __init__(self, directory, *options, processes=2):
        self.directory, self.said, self.status = directory, [], None
        for pid in directory.glob("*/pid"):
            pid.unlink()
        program = [*PROGRAM, str(directory), str(STEPS), *options]
        self.thread = threading.Thread(target=self._run, args=(program, processes))
        self.thread.start()

    def _run(self, program, processes):
        self.status = launch(program, processes, None, self.said.append)

    def pid(self, worker):
        return int((self.directory / str(worker) / "pid").read_text())

    def wait(self, seconds):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"not ended after {seconds} s"
        return self.status


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finals(directory):
    return [path.read_text() for path in sorted(directory.glob("*/final"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    assert Group(directory).wait(120) == 0
    return directory


def test_workers_end_with_the_same_parameters_and_the_same_log(undisturbed):
    first, second = finals(undisturbed)
    assert first == second
    logs = [(undisturbed / str(i) / "run.log").read_bytes() for i in range(2)]
    assert logs[0] == logs[1]
    assert len(ReplayLog.open(undisturbed / "0" / "run.log")) == STEPS


def killed_and_continued(directory, kills, chance):
    """Kills a worker by chance at some step, again and again; returns how far each start began, and the steps flushed before it."""
    starts = []
    for _ in range(kills):
        group = Group(directory, "sleep=0.02", "flush_every=5")
        log, victim = directory / "0" / "run.log", chance.randrange(2)
        until(lambda: len(list(directory.glob("*/start.json"))) == 2 and len(list(directory.glob("*/pid"))) == 2)
        begun = log.stat().st_size if log.exists() else 0
        wanted = begun + chance.randrange(1, 8) * 60
        until(lambda: group.status is not None or (log.exists() and log.stat().st_size >= wanted))
        if group.status is None:
            os.kill(group.pid(victim), signal.SIGKILL)
        group.wait(40)  # bounded: 15 s for the others to end by themselves, and then they are stopped
        if group.status == 0:
            break
        assert any(f"worker {victim} was ended by SIGKILL" in text for text in group.said), group.said
        flushed = max(len(ReplayLog.open(path)) for path in directory.glob("*/run.log"))
        for path in directory.glob("*/start.json"):
            path.unlink()
        starts.append(flushed)
    return starts


def test_a_run_with_killed_workers_ends_as_one_without(undisturbed, tmp_path, seed):
    flushed = killed_and_continued(tmp_path, 2, random.Random(seed))
    assert Group(tmp_path).wait(120) == 0
    assert finals(tmp_path) == finals(undisturbed)
    assert (
        json.loads((tmp_path / "0" / "start.json").read_text())["from"] == flushed[-1] > 0
    )  # no flushed step was lost
    assert (tmp_path / "1" / "run.log").read_bytes() == (undisturbed / "1" / "run.log").read_bytes()


def test_a_worker_that_lost_everything_catches_up_from_the_log_of_another(undisturbed, tmp_path):
    (tmp_path / "1").mkdir()
    content = (undisturbed / "1" / "run.log").read_bytes()
    (tmp_path / "1" / "run.log").write_bytes(content[: len(content) - 1000])
    assert Group(tmp_path).wait(120) == 0
    assert finals(tmp_path) == finals(undisturbed)
    assert json.loads((tmp_path / "0" / "start.json").read_text())["from"] > STEPS // 2


def started(tmp_path, *workers):
    """Processes with their own numbers, counts and options: the exit statuses and what they said."""
    address = f"127.0.0.1:{_free_port()}"
    processes = []
    for number, count, *options in workers:
        names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": number}
        environment = os.environ | {name: str(value) for name, value in names.items()}
        command = [*PROGRAM, str(tmp_path), "40", *options]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return [(process.communicate(timeout=90)[1], process.returncode) for process in processes]


def test_other_data_on_one_worker_is_refused_at_the_start(tmp_path):
    for said, status in started(tmp_path, (0, 2), (1, 2, "order=3")):
        assert status != 0
        assert "order of the data is" in said
        assert "0 on process 0" in said
        assert "3 on process 1" in said
    assert not list(tmp_path.glob("*/run.log"))


def test_another_number_of_workers_is_refused_at_the_start(tmp_path):
    said = [text for text, status in started(tmp_path, (0, 2), (1, 3)) if status != 0]
    assert len(said) == 2
    assert any("number of processes is" in text and "3 on process 1" in text for text in said)


def test_replicas_that_came_apart_stop_the_run(tmp_path):
    for said, status in started(tmp_path, (0, 2), (1, 2, "spoil=25")):
        assert status != 0
        assert "after step 40 the parameters of worker 1 differ from those of worker 0, in ['bias']" in said
