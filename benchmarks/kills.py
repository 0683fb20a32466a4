"""Kills workers of a training run at random moments, starts the run again, and looks whether anything is lost.

    python benchmarks/kills.py --kills 50 --out records/kills.json

Two processes train a small network together. Again and again one of them, chosen by chance, is killed with SIGKILL at a moment chosen by
chance; how long the other takes to end is measured, and whether the next start goes on from the last step that was flushed. The
parameters at the end have to be those of a run that nobody disturbed, bit by bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from prograde.lab import records
from prograde.lab.launch import launch
from prograde.replay import ReplayLog

PROGRAM = [sys.executable, str(Path(__file__).with_name("training_worker.py"))]
STEPS = 200  # of a run in the tests


class Group:
    """Two workers started by `launch` in the background, with what it said and the status it ended with."""

    def __init__(self, directory, *options, steps=STEPS):
        self.directory, self.said, self.status = directory, [], None
        for left in [*directory.glob("*/pid"), *directory.glob("*/start.json")]:
            left.unlink()
        program = [*PROGRAM, str(directory), str(steps), *options]
        self.thread = threading.Thread(target=self._run, args=(program,))
        self.thread.start()

    def _run(self, program):
        self.status = launch(program, 2, None, self.said.append)

    def pid(self, worker):
        return int((self.directory / str(worker) / "pid").read_text())

    def wait(self, seconds):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"not ended after {seconds} s"
        return self.status


@dataclass
class Kill:
    """What came of one kill: which worker, at which step of the log, the steps any log had flushed, seconds until all had ended."""

    victim: int
    begun: int
    flushed: int
    seconds: float
    hung: bool
    status: int | None


def kill_at_random(directory, chance, *options, steps=STEPS):
    """Starts the run, lets it do a few steps, and kills one of its workers."""
    group, victim = Group(directory, "sleep=0.02", *options, steps=steps), chance.randrange(2)
    _until(lambda: group.status is not None or len(list(directory.glob("*/start.json"))) == 2)
    begun = json.loads((directory / "0" / "start.json").read_text())["from"]
    log = directory / "0" / "run.log"
    at_start = log.stat().st_size
    _until(lambda: group.status is not None or log.stat().st_size > at_start)
    time.sleep(chance.random() * 1.5)
    begin = time.monotonic()
    if group.status is None:
        os.kill(group.pid(victim), signal.SIGKILL)
    hung = False
    try:
        group.wait(60)
    except AssertionError:
        hung = True
    flushed = max(len(ReplayLog.open(path, partial=True)) for path in directory.glob("*/run.log"))
    said = any(f"worker {victim} was ended by SIGKILL" in text for text in group.said)
    assert said or group.status == 0, group.said
    return Kill(victim, begun, flushed, time.monotonic() - begin, hung, group.status)


def _until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finals(directory):
    """The fingerprints of the parameters that the workers ended with."""
    return [path.read_text() for path in sorted(directory.glob("*/final"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills.json"))
    arguments = parser.parse_args()
    steps, chance = 60 * arguments.kills, random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        found = []
        disturbed, undisturbed = Path(name) / "disturbed", Path(name) / "undisturbed"
        disturbed.mkdir()
        while len(found) < arguments.kills:
            kill = kill_at_random(disturbed, chance, steps=steps)
            if kill.status == 0:
                raise SystemExit(f"the run ended after {len(found)} kills; it needs more steps")
            found.append(kill)
            print(f"{len(found)} of {arguments.kills}: {kill}", flush=True)
        assert Group(disturbed, steps=steps).wait(600) == 0
        begun = [kill.begun for kill in found[1:]] + [
            json.loads((disturbed / "0" / "start.json").read_text())["from"]
        ]
        assert Group(undisturbed, steps=steps).wait(600) == 0
        record = {
            "config": {
                "kills": arguments.kills,
                "steps": steps,
                "seed": arguments.seed,
                "workers": 2,
            },
            "environment": records.environment(),
            "hangs": sum(kill.hung for kill in found),
            "lost_steps": sum(
                max(0, kill.flushed - start) for kill, start in zip(found, begun, strict=True)
            ),
            "same_parameters": len(set(finals(disturbed) + finals(undisturbed))) == 1,
            "seconds_to_end": sorted(round(kill.seconds, 2) for kill in found),
            "kills": [asdict(kill) for kill in found],
        }
        shutil.rmtree(disturbed)
    records.write_json(arguments.out, record)
    print(
        {
            name: record[name]
            for name in ("hangs", "lost_steps", "same_parameters", "seconds_to_end")
        }
    )


if __name__ == "__main__":
    main()
