"""Starts two workers of a small training run in the background, and kills them."""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prograde.lab.measure.timing import Others
from prograde.lab.processes.launch import launch
from prograde.replay import ReplayLog

PROGRAM = [sys.executable, "-m", "prograde.lab.studies.kills.worker"]
WORKERS = 2
_LONGEST_WAIT = 1.5  # seconds from the first new record in the log to the kill
_HUNG = 60.0  # seconds


class Group:
    """Workers that `launch` watches in the background.

    **Fields:** `said`: the messages of `launch`; `status`: its exit status, None before its end.
    """

    def __init__(self, directory: Path, steps: int, *options: str):
        self.directory = directory
        self.said: list[str] = []
        self.status: int | None = None
        for left in [*directory.glob("*/pid"), *directory.glob("*/start.json")]:
            left.unlink()
        program = [*PROGRAM, str(directory), str(steps), *options]
        self._thread = threading.Thread(target=self._run, args=(program,), daemon=True)
        self._thread.start()

    def _run(self, program: list[str]) -> None:
        self.status = launch(program, WORKERS, None, self.said.append)

    def kill(self, worker: int) -> None:
        """Kills a worker."""
        os.kill(int((self.directory / str(worker) / "pid").read_text()), signal.SIGKILL)

    def wait(self, seconds: float) -> int | None:
        """Waits until all have ended; returns the status. Raises `TimeoutError` after `seconds`."""
        try:
            self._thread.join(seconds)
        except BaseException:  # Ctrl-C leaves no process behind
            self.kill_all()
            raise
        if self._thread.is_alive():
            raise TimeoutError(f"the workers did not end within {seconds:g} s")
        return self.status

    def kill_all(self) -> None:
        """Kills the remaining workers."""
        for worker in range(WORKERS):
            try:
                self.kill(worker)
            except (OSError, ValueError):
                continue


@dataclass(frozen=True)
class Kill:
    """The result of one kill.

    **Fields:** `victim`: the worker; `begun`: the step at which the run began; `flushed`: number of
    steps in the log afterwards; `seconds`: until all workers had ended; `hung`: true if that took
    more than a minute; `status`: of `launch`, 0 if the run ended before the kill; `busy`: share of
    the machine that other processes used meanwhile.
    """

    victim: int
    begun: int
    flushed: int
    seconds: float
    hung: bool
    status: int | None
    busy: float


def kill_at_random(directory: Path, steps: int, chance: random.Random) -> Kill:
    """Starts the run, lets it take a few steps, and kills one of its workers.

    `chance` decides which worker, and when. A step is slowed down to 20 ms.
    """
    group, victim = Group(directory, steps, "sleep=0.02"), chance.randrange(WORKERS)
    try:
        _until(lambda: group.status is not None or _started(directory))
        begun, log = begun_from(directory), directory / "0" / "run.log"
        at_start = log.stat().st_size
        _until(lambda: group.status is not None or log.stat().st_size > at_start)
        time.sleep(_LONGEST_WAIT * chance.random())
        begin, others = time.monotonic(), Others()
        if group.status is None:
            group.kill(victim)
        try:
            group.wait(_HUNG)
            hung = False
        except TimeoutError:
            hung = True
            group.kill_all()
        seconds = time.monotonic() - begin
    except BaseException:  # Ctrl-C leaves no process behind
        group.kill_all()
        raise
    said = any(f"worker {victim} was ended by SIGKILL" in text for text in group.said)
    if not said and group.status != 0 and not hung:
        raise RuntimeError(f"worker {victim} was killed, and `launch` said: {group.said}")
    flushed = max(len(ReplayLog.open(path, partial=True)) for path in directory.glob("*/run.log"))
    return Kill(victim, begun, flushed, seconds, hung, group.status, others.busy())


def begun_from(directory: Path) -> int:
    """Returns the step at which the last start of the run began."""
    return json.loads((directory / "0" / "start.json").read_text())["from"]


def finals(directory: Path) -> list[str]:
    """Returns the fingerprints of the final parameters of the workers."""
    return [path.read_text() for path in sorted(directory.glob("*/final"))]


def _started(directory: Path) -> bool:
    return len(list(directory.glob("*/start.json"))) == WORKERS


def _until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the workers did not get on within {seconds:g} s")
        time.sleep(0.02)
