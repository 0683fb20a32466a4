"""Training steps of processes that are joined by a slow link, against data-parallel backprop on the same link; a cost model beside it.

Run as root on an otherwise idle Linux machine with two cores: `python benchmarks/links.py --out records/links.json`. Writes a record, part by
part, and prints its tables. `--from-record FILE --markdown PAGE` writes them into a page between its marks, and measures nothing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # of the workers as well

import link_report
import tyro
from link_network import Link, Network, address, check

from prograde.lab import costs, records

WORKER = Path(__file__).with_name("link_worker.py")
CORES = sorted(os.sched_getaffinity(0))[:2]
LINKS = {link.name: link for link in (Link(10e6, 0.025), Link(100e6, 0.025), Link())}
PARTS = ("scaling", "smollm2", "mlp", "updates", "link")


@dataclass(frozen=True)
class Arguments:
    """What to measure and where to write it."""

    out: Path = Path("runs/bench/links.json")
    """The record."""
    parts: tuple[str, ...] = PARTS
    """What to measure; what the record holds of the others is kept."""
    note: str = ""
    """What else there is to know about the machine, for the record."""
    quick: bool = False
    """Few steps, to see that all works."""
    from_record: Path | None = None
    """A record to show; nothing is measured."""
    markdown: Path | None = None
    """A page to write the tables into."""


class Group:
    """Processes that wait for jobs: joined into one training run by a network, or each by itself where there is none."""

    def __init__(self, processes: int, network: Network | None = None):
        self.network, self.size, self.workers = network, processes, []
        for i in range(processes):
            settings: dict[str, Any] = {"cores": [CORES[i % len(CORES)]], "processes": 1}
            settings["settle"] = 0.02 if network is None else 0.02 + 8 * network.link.delay
            if network is not None and processes > 1:
                settings |= {
                    "processes": processes,
                    "process": i,
                    "coordinator": f"{address(0)}:7777",
                }
            program = [sys.executable, str(WORKER), json.dumps(settings)]
            program = network.inside(i, *program) if network is not None else program
            self.workers.append(
                subprocess.Popen(
                    program,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )

    def ask(self, **what: Any) -> list[dict]:
        """What each of them answers."""
        for worker in self.workers:
            worker.stdin.write(json.dumps({"job": None} | what) + "\n")
            worker.stdin.flush()
        return [self._answer(worker) for worker in self.workers]

    def _answer(self, worker: subprocess.Popen) -> dict:
        while line := worker.stdout.readline():
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"a worker of {self.size} ended with status {worker.wait()}.")

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.communicate()

    def own_part(self, job: dict) -> dict:
        """The job as its workers are given it: the whole batch where they share it, their part of it where they are apart."""
        joined = self.network is not None or self.size == 1
        return job if joined else job | {"batch": job["batch"] // self.size}


@contextlib.contextmanager
def group(processes: int, link: Link | None = None) -> Iterator[Group]:
    """So many processes on a link; without one, each trains alone on its part of the batch."""
    with contextlib.ExitStack() as stack:
        found = Group(
            processes, stack.enter_context(Network(link, processes)) if link is not None else None
        )
        stack.callback(found.close)
        for worker in found.workers:
            found._answer(worker)  # ready
        yield found


def job(workload: str, batch: int, method: str, tangents: int = 1, **sizes: int) -> dict:
    return {
        "workload": workload,
        "batch": batch,
        "method": method,
        "tangents": tangents,
        "sizes": sizes,
    }


def name_of(job: dict) -> str:
    return "backprop" if job["method"] == "backprop" else f"K = {job['tangents']}"


class Measured:
    """One job on one group of processes, in as many visits as one likes."""

    def __init__(self, group: Group, job: dict):
        self.group, self.job = group, group.own_part(job)
        self.facts = group.ask(do="compile", job=self.job)[0]
        self.seconds, self.bytes, self.dropped = [], [], 0
        group.ask(do="run", job=self.job, steps=1)  # connections are made

    def visit(self, steps: int) -> None:
        before = self._dropped()
        found = self.group.ask(do="run", job=self.job, steps=steps)
        self.seconds += [s for worker in found for s in worker["seconds"]]
        self.bytes += [worker["bytes"] for worker in found]
        self.dropped += self._dropped() - before

    def _dropped(self) -> int:
        return self.group.network.dropped() if self.group.network is not None else 0

    def record(self) -> dict:
        found = {"seconds": costs.quartiles(self.seconds), "workers": self.group.size, **self.facts}
        if self.group.network is not None and self.group.size > 1:
            checks = [
                answer["checksums"] for answer in self.group.ask(do="checksums", job=self.job)
            ]
            found |= {
                "bytes": costs.quartiles(self.bytes),
                "packets_dropped": self.dropped,
                "replicas_equal": all(c == checks[0] for c in checks),
            }
        return found


def measure(group: Group, job: dict, steps: int, visits: int = 1) -> dict:
    measured = Measured(group, job)
    for _ in range(visits):
        measured.visit(steps)
    found = measured.record()
    where = group.network.link.name if group.network is not None else "apart"
    bytes_a_step = f", {found['bytes']['median']:.0f} bytes a step" if "bytes" in found else ""
    print(
        f"  {group.size} x {job['workload']}, {name_of(job)}, {where}: {found['seconds']['median']:.4f} s{bytes_a_step}",
        flush=True,
    )
    return found


def the_link(quick: bool) -> dict:
    """What a TCP connection over each link gets, and how long a byte takes there and back."""
    found = {}
    for name, link in LINKS.items():
        with Network(link, 2) as network:
            seconds = 1 if quick else 6
            found[name] = check(network, int((link.rate or 4e9) / 8 * seconds)) | {
                "queue_bytes": link.queue
            }
    return found


def updates(quick: bool) -> dict:
    """Seconds of the update alone, from so many tangents: what grows with workers that each have tangents of their own."""
    found: dict[str, dict] = {}
    with group(1) as alone:
        for workload, counts in {"mlp": (1, 64, 512, 4096), "smollm2": (1, 64)}.items():
            found[workload] = {}
            for tangents in counts:
                (answer,) = alone.ask(
                    do="update",
                    workload=workload,
                    tangents=tangents,
                    steps=3 if tangents > 64 else 7,
                )
                found[workload][str(tangents)] = costs.quartiles(answer["seconds"])
                print(
                    f"  update of {workload} from {tangents}: {found[workload][str(tangents)]['median']:.4f} s",
                    flush=True,
                )
    return found


def smollm2(quick: bool) -> dict:
    """SmolLM2-135M shapes, 4 x 64 tokens shared by two workers, in turns with backprop."""
    ours, theirs = job("smollm2", 4, "weight"), job("smollm2", 4, "backprop")
    found: dict[str, dict] = {"apart": {}}
    with group(2) as apart:
        for each in (ours, theirs):
            found["apart"][name_of(each)] = measure(apart, each, 2 if quick else 10)
    names = ["unlimited"] if quick else ["unlimited", "100 Mbit/s, 50 ms"]
    for name in names:
        with group(2, LINKS[name]) as joined:
            pair = [Measured(joined, each) for each in (ours, theirs)]
            for _ in range(2):
                pair[0].visit(2 if quick else 5)
                pair[1].visit(1 if name != "unlimited" else 3)
            found[name] = {name_of(m.job): m.record() for m in pair}
            for method, one in found[name].items():
                print(
                    f"  2 x smollm2, {method}, {name}: {one['seconds']['median']:.3f} s", flush=True
                )
    return found


def mlp(quick: bool) -> dict:
    """The MLP at batch 64: one to sixty-four tangents and backprop, on each link with two workers, and with four on one of them."""
    jobs = [job("mlp", 64, "weight", k) for k in (1, 8, 64)] + [job("mlp", 64, "backprop")]
    steps = 3 if quick else 20
    few = [jobs[0], jobs[-1]]
    found: dict[str, dict] = {"1": {}, "2": {}, "4": {}}
    with group(1) as alone:
        found["1"]["apart"] = {name_of(each): measure(alone, each, steps) for each in jobs}
    for processes, chosen in ((2, jobs), (4, few)):
        with group(processes) as apart:
            found[str(processes)]["apart"] = {
                name_of(each): measure(apart, each, steps) for each in chosen
            }
        for name, link in LINKS.items():
            if processes == 4 and link.rate == 10e6:
                continue
            with group(processes, link) as joined:
                found[str(processes)][name] = {
                    name_of(each): measure(
                        joined, each, max(3, steps // 4) if each["method"] == "backprop" else steps
                    )
                    for each in chosen
                }
                if processes == 2 and link.rate == 100e6:
                    idle = joined.ask(do="idle", seconds=2 if quick else 20)
                    found["idle_bytes_a_second"] = idle[1]["bytes_a_second"]
    return found


def scaling(quick: bool) -> dict:
    """The same batch on one core, on two, with the work of two on two that exchange nothing, and on four processes: in turns."""
    jobs = {
        **{f"MLP, batch {b}": job("mlp", b, "weight") for b in (64, 256, 1024, 4096)},
        "MLP, batch 1024, K = 8": job("mlp", 1024, "weight", 8),
        "MLP, batch 4096, backprop": job("mlp", 4096, "backprop"),
        "transformer, 8 x 128 tokens": job("transformer", 8, "weight"),
        "transformer, 32 x 128 tokens": job("transformer", 32, "weight"),
    }
    found = {}
    with group(1) as one, group(2, Link()) as two, group(4, Link()) as four, group(2) as apart:
        for name, each in jobs.items():
            kinds = {"1": one, "2": two, "4": four, "2 apart": apart}
            measured = {kind: Measured(g, each) for kind, g in kinds.items()}
            once = measured["1"].group.ask(do="run", job=measured["1"].job, steps=1)[0]["seconds"][
                0
            ]
            steps = max(1, min(20, int(0.4 / once)))
            rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(2 if quick else 5):
                for kind, m in measured.items():
                    before = len(m.seconds)
                    m.visit(steps)
                    rounds[kind].append(costs.quartiles(m.seconds[before:])["median"])
            ideal = {
                kind: [t1 / (2 * t) for t1, t in zip(rounds["1"], rounds[kind], strict=True)]
                for kind in list(kinds)[1:]
            }
            found[name] = {
                "seconds": {kind: costs.quartiles(values) for kind, values in rounds.items()},
                "of_ideal": {kind: costs.quartiles(values) for kind, values in ideal.items()},
                "steps_a_visit": steps,
            }
            shown = ", ".join(
                f"{kind} {v['median']:.2f}" for kind, v in found[name]["of_ideal"].items()
            )
            print(
                f"  {name}: {1e3 * found[name]['seconds']['1']['median']:.1f} ms on one core; of ideal: {shown}",
                flush=True,
            )
            for g in kinds.values():
                g.ask(do="forget")
    return found


def main(arguments: Arguments) -> None:
    if arguments.from_record is None:
        record = records.read_json(arguments.out) if arguments.out.exists() else {"parts": {}}
        measures = {
            "link": the_link,
            "updates": updates,
            "smollm2": smollm2,
            "mlp": mlp,
            "scaling": scaling,
        }
        for part in arguments.parts:
            print(part, flush=True)
            about = records.environment() | {"note": arguments.note, "load": os.getloadavg()[0]}
            about["congestion_control"] = (
                Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
            )
            found = measures[part](arguments.quick)
            record["parts"][part] = {
                "environment": about,
                "load_after": os.getloadavg()[0],
                "found": found,
            }
            records.write_json(arguments.out, record)
        record["model"] = link_report.model(record)
        records.write_json(arguments.out, record)
        print(f"record: {arguments.out}")
    else:
        record = records.read_json(arguments.from_record)
    print(link_report.markdown(record))
    if arguments.markdown is not None:
        link_report.write_markdown(record, arguments.markdown)


if __name__ == "__main__":
    # however it is ended, what it made on this machine goes with it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    main(tyro.cli(Arguments))
