"""Real processes, Gloo between them: killed, restarted, started wrongly."""

import os
import random
import subprocess
import sys
import textwrap

import pytest

from prograde.lab.processes.launch import free_port
from prograde.lab.studies.kills.group import PROGRAM, Group, begun_from, finals, kill_at_random
from prograde.replay import ReplayLog

STEPS = 200


@pytest.fixture(autouse=True, scope="module")
def one_device_each():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    assert Group(directory, STEPS).wait(300) == 0
    return directory


@pytest.mark.long
def test_workers_end_with_the_same_parameters_and_the_same_log(undisturbed):
    first, second = finals(undisturbed)
    assert first == second
    logs = [(undisturbed / str(i) / "run.log").read_bytes() for i in range(2)]
    assert logs[0] == logs[1]
    assert len(ReplayLog.open(undisturbed / "0" / "run.log")) == STEPS


@pytest.mark.long
def test_a_run_with_a_killed_worker_ends_as_one_without(undisturbed, tmp_path, seed):
    kill = kill_at_random(tmp_path, STEPS, random.Random(seed))
    assert Group(tmp_path, STEPS).wait(300) == 0
    assert finals(tmp_path) == finals(undisturbed)
    assert begun_from(tmp_path) == kill.flushed > 0  # no flushed step was lost
    assert (tmp_path / "1" / "run.log").read_bytes() == (undisturbed / "1" / "run.log").read_bytes()


@pytest.mark.long
def test_a_worker_that_lost_everything_catches_up_from_the_log_of_another(undisturbed, tmp_path):
    (tmp_path / "1").mkdir()
    content = (undisturbed / "1" / "run.log").read_bytes()
    (tmp_path / "1" / "run.log").write_bytes(content[: len(content) - 1000])
    assert Group(tmp_path, STEPS).wait(300) == 0
    assert finals(tmp_path) == finals(undisturbed)
    assert begun_from(tmp_path) > STEPS // 2


def started(tmp_path, *workers):
    """Processes with numbers, counts and options of their own: exit statuses and outputs."""
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for number, count, *options in workers:
        names = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": count,
            "JAX_PROCESS_ID": number,
        }
        environment = os.environ | {name: str(value) for name, value in names.items()}
        command = [*PROGRAM, str(tmp_path), "40", *options]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    return [(process.communicate(timeout=90)[1], process.returncode) for process in processes]


@pytest.mark.long
def test_other_data_on_one_worker_is_refused_at_the_start(tmp_path):
    for said, status in started(tmp_path, (0, 2), (1, 2, "order=3")):
        assert status != 0
        assert "order of the data is" in said
        assert "0 on process 0" in said
        assert "3 on process 1" in said
    assert not list(tmp_path.glob("*/run.log"))


@pytest.mark.long
def test_another_number_of_workers_is_refused_at_the_start(tmp_path):
    said = [text for text, status in started(tmp_path, (0, 2), (1, 3)) if status != 0]
    assert len(said) == 2
    assert any("number of processes is" in text and "3 on process 1" in text for text in said)


@pytest.mark.long
def test_who_waits_for_one_that_never_comes_says_so_and_ends(tmp_path):
    for number in (0, 1):
        ((said, status),) = started(tmp_path, (number, 2, "timeout=3"))
        assert status != 0
        assert f"process {number} of 2 did not find all the others at 127.0.0.1" in said


@pytest.mark.long
def test_an_address_that_is_taken_or_not_of_this_machine_is_refused():
    """In a process of its own: JAX must not have run anything before."""
    program = """
        import os, socket
        from prograde.distributed import StartError, initialize

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            try:
                initialize(address, 2, 0)
            except StartError as error:
                assert f"cannot listen at {address}" in str(error), error
                print("taken")
        os.environ["JAX_COORDINATOR_BIND_ADDRESS"] = "192.0.2.1:12345"  # for examples, by RFC 5737
        try:
            initialize("127.0.0.1:12345", 2, 0)
        except StartError as error:
            assert "cannot listen at 192.0.2.1" in str(error), error
            print("not of this machine")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["taken", "not of this machine"], done.stderr


@pytest.mark.long
def test_replicas_that_came_apart_stop_the_run(tmp_path):
    found = started(tmp_path, (0, 2), (1, 2, "spoil=25"))
    assert all(status != 0 for _, status in found)
    message = "after step 40 the parameters of worker 1 differ from those of worker 0, in ['bias']"
    assert any(
        message in said for said, _ in found
    )  # both find it; the first to end may take the other with it
