"""Processes that train on request, joined by a network or each alone."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prograde.lab.measure.timing import quartiles
from prograde.lab.studies.links.network import Link, Network, address

WORKER = "prograde.lab.studies.links.worker"


@dataclass(frozen=True)
class Job:
    """A training step: a workload, its total batch, and a method.

    **Fields:** `method`: "weight" for ours, or "backprop"; `tangents`: total of all workers.
    """

    workload: str
    batch: int
    method: str
    tangents: int = 1
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the method in records."""
        return "backprop" if self.method == "backprop" else f"K = {self.tangents}"


class Group:
    """Processes that wait for jobs, each on one core.

    On a network they share one training run. Without it, each trains alone on its own part.
    """

    def __init__(self, processes: int, network: Network | None = None):
        self.network, self.size = network, processes
        self._workers: list[subprocess.Popen] = []
        cores = sorted(os.sched_getaffinity(0))[:2]
        for i in range(processes):
            settings: dict[str, Any] = {"cores": [cores[i % len(cores)]], "processes": 1}
            settings["settle"] = 0.02 if network is None else 0.02 + 8 * network.link.delay
            if network is not None and processes > 1:
                settings |= {
                    "processes": processes,
                    "process": i,
                    "coordinator": f"{address(0)}:7777",
                }
            program = [sys.executable, "-m", WORKER, json.dumps(settings)]
            worker = subprocess.Popen(
                program if network is None else network.inside(i, *program),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            self._workers.append(worker)

    def ready(self) -> None:
        """Waits until all processes have found each other."""
        for worker in self._workers:
            self._answer(worker)

    def ask(self, do: str, job: Job | None = None, **more: Any) -> list[dict[str, Any]]:
        """Sends one request to all processes; returns their answers."""
        asked = {"do": do, "job": None if job is None else dataclasses.asdict(job), **more}
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(asked) + "\n")
            worker.stdin.flush()
        return [self._answer(worker) for worker in self._workers]

    def _answer(self, worker: subprocess.Popen) -> dict[str, Any]:
        assert worker.stdout is not None
        while line := worker.stdout.readline():
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"a worker of {self.size} ended with status {worker.wait()}.")

    def own_part(self, job: Job) -> Job:
        """Returns the job of one process: the whole batch if all share it, else its part."""
        joined = self.network is not None or self.size == 1
        return job if joined else dataclasses.replace(job, batch=job.batch // self.size)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.communicate()


@contextlib.contextmanager
def group(processes: int, link: Link | None = None) -> Iterator[Group]:
    """Starts processes on a link. Without a link, each trains alone on its part of the batch."""
    with contextlib.ExitStack() as stack:
        network = None if link is None else stack.enter_context(Network(link, processes))
        found = Group(processes, network)
        stack.callback(found.close)
        found.ready()
        yield found


class Measured:
    """A job on a group of processes, measured in any number of visits."""

    def __init__(self, group: Group, job: Job):
        self.group, self.job = group, group.own_part(job)
        self.facts = group.ask("compile", self.job)[0]
        self.seconds: list[float] = []
        self.bytes: list[float] = []
        self.dropped = 0
        group.ask("run", self.job, steps=1)  # makes the connections

    def visit(self, steps: int) -> list[float]:
        """Takes steps; returns the seconds of each step of each process."""
        before = self._dropped()
        found = self.group.ask("run", self.job, steps=steps)
        seconds = [s for worker in found for s in worker["seconds"]]
        self.seconds += seconds
        self.bytes += [worker["bytes"] for worker in found]
        self.dropped += self._dropped() - before
        return seconds

    def _dropped(self) -> int:
        return self.group.network.dropped() if self.group.network is not None else 0

    def record(self) -> dict[str, Any]:
        """The figures of all visits."""
        found = {"seconds": quartiles(self.seconds), "workers": self.group.size, **self.facts}
        if self.group.network is not None and self.group.size > 1:
            answers = self.group.ask("checksums", self.job)
            checks = [answer["checksums"] for answer in answers]
            found |= {
                "bytes": quartiles(self.bytes),
                "packets_dropped": self.dropped,
                "replicas_equal": all(c == checks[0] for c in checks),
            }
        return found
