"""Measures training steps of processes that are joined by a slow link."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prograde.lab.display import Display
from prograde.lab.measure.memory import load_average
from prograde.lab.measure.timing import Others, Visit, quartiles, take_turns
from prograde.lab.studies.links.group import Group, Job, Measured, group
from prograde.lab.studies.links.network import Link, Network, check

LINKS = {link.name: link for link in (Link(10e6, 0.025), Link(100e6, 0.025), Link())}
_MIDDLE, _FREE = "100 Mbit/s, 50 ms", "unlimited"

Tell = Callable[[str], None]


def measure(name: str, quick: bool, note: str, display: Display) -> dict[str, Any]:
    """Measures a part; returns its record."""
    tell: Tell = lambda text: display.advance(1, text)  # noqa: E731
    before, others = load_average(), Others()
    with stopped_by_signals():
        if name == "scaling":
            found = scaling(quick, display)
        else:
            measures, stages = _PARTS[name]
            with display.stage(name, stages(quick)):
                found = measures(quick, tell)
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return {
        "note": note,
        "congestion_control": control,
        "load": before,
        "load_after": load_average(),
        "busy": others.busy(),
        "found": found,
    }


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into `SystemExit`, so that networks and processes are removed."""
    before = {
        number: signal.signal(number, lambda number, _: sys.exit(128 + number))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def steps_of(group: Group, job: Job, steps: int, tell: Tell) -> dict[str, Any]:
    """Measures a job in one visit."""
    measured = Measured(group, job)
    measured.visit(steps)
    found = measured.record()
    where = "apart" if group.network is None else group.network.link.name
    said = f"{group.size} x {job.workload}, {job.name}, {where}"
    tell(f"{said}: {found['seconds']['median']:.4f} s")
    return found


def the_link(quick: bool, tell: Tell) -> dict[str, Any]:
    """Measures rate and round trip of a TCP connection over each link."""
    found = {}
    for name, link in LINKS.items():
        with Network(link, 2) as network:
            seconds = 1 if quick else 6
            sent = int((link.rate or 4e9) / 8 * seconds)
            found[name] = check(network, sent) | {"queue_bytes": link.queue}
            tell(f"{name}: {found[name]['bits_a_second'] / 1e6:.1f} Mbit/s")
    return found


_UPDATES = {"mlp": (1, 64, 512, 4096), "smollm2": (1, 64)}


def updates(quick: bool, tell: Tell) -> dict[str, Any]:
    """Measures the seconds of the update alone, by workload and number of tangents.

    If each worker has its own tangents, the update grows with the number of workers.
    """
    found: dict[str, dict[str, Any]] = {}
    with group(1) as alone:
        for workload, counts in _UPDATES.items():
            found[workload] = {}
            for tangents in counts:
                steps = 3 if quick or tangents > 64 else 7
                (answer,) = alone.ask("update", workload=workload, tangents=tangents, steps=steps)
                found[workload][str(tangents)] = quartiles(answer["seconds"])
                tell(f"update of {workload} from {tangents} tangents")
    return found


def smollm2(quick: bool, tell: Tell) -> dict[str, Any]:
    """Measures SmolLM2-135M shapes, 4 x 64 tokens on two workers, in turns with backprop."""
    ours, theirs = Job("smollm2", 4, "weight"), Job("smollm2", 4, "backprop")
    found: dict[str, dict[str, Any]] = {"apart": {}}
    with group(2) as apart:
        for each in (ours, theirs):
            found["apart"][each.name] = steps_of(apart, each, 2 if quick else 10, tell)
    for name in [_FREE] if quick else [_FREE, _MIDDLE]:
        with group(2, LINKS[name]) as joined:
            pair = [Measured(joined, each) for each in (ours, theirs)]
            for _ in range(2):
                pair[0].visit(2 if quick else 5)
                pair[1].visit(1 if name != _FREE else 3)
                tell(f"2 x smollm2, {name}")
            found[name] = {m.job.name: m.record() for m in pair}
    return found


def mlp(quick: bool, tell: Tell) -> dict[str, Any]:
    """Measures the MLP at batch 64, with one to sixty-four tangents and with backprop.

    Each link joins two workers. Two of the links also join four, with fewer methods.
    """
    jobs = [Job("mlp", 64, "weight", k) for k in (1, 8, 64)] + [Job("mlp", 64, "backprop")]
    steps = 3 if quick else 20
    found: dict[str, Any] = {"1": {}, "2": {}, "4": {}}
    with group(1) as alone:
        found["1"]["apart"] = {job.name: steps_of(alone, job, steps, tell) for job in jobs}
    for processes, chosen in ((2, jobs), (4, [jobs[0], jobs[-1]])):
        of_size = found[str(processes)]
        with group(processes) as apart:
            of_size["apart"] = {job.name: steps_of(apart, job, steps, tell) for job in chosen}
        for name, link in LINKS.items():
            if processes == 4 and link.rate == 10e6:
                continue
            with group(processes, link) as joined:
                of_size[name] = {}
                for job in chosen:
                    count = max(3, steps // 4) if job.method == "backprop" else steps
                    of_size[name][job.name] = steps_of(joined, job, count, tell)
                if processes == 2 and name == _MIDDLE:
                    idle = joined.ask("idle", seconds=2 if quick else 20)
                    found["idle_bytes_a_second"] = idle[1]["bytes_a_second"]
    return found


SCALING = {
    **{f"MLP, batch {b}": Job("mlp", b, "weight") for b in (64, 256, 1024, 4096)},
    "MLP, batch 1024, K = 8": Job("mlp", 1024, "weight", 8),
    "MLP, batch 4096, backprop": Job("mlp", 4096, "backprop"),
    "transformer, 8 x 128 tokens": Job("transformer", 8, "weight"),
    "transformer, 32 x 128 tokens": Job("transformer", 32, "weight"),
}
_VISIT_SECONDS = 0.4


def scaling(quick: bool, display: Display) -> dict[str, Any]:
    """Measures the same batch in one, two and four processes, and in two without exchange.

    All take turns. `of_ideal` is the share of the ideal, which is twice as fast as one core.
    """
    found = {}
    with group(1) as one, group(2, Link()) as two, group(4, Link()) as four, group(2) as apart:
        kinds = {"1": one, "2": two, "4": four, "2 apart": apart}
        for name, job in SCALING.items():
            measured = {kind: Measured(g, job) for kind, g in kinds.items()}
            once = measured["1"].visit(1)[0]
            steps = max(1, min(20, int(_VISIT_SECONDS / once)))
            visits = {kind: median_visit(m) for kind, m in measured.items()}
            turns = take_turns(visits, 2 if quick else 5, display, name, calls=steps)
            found[name] = {
                "seconds": {kind: quartiles(values) for kind, values in turns.seconds.items()},
                "of_ideal": of_ideal(turns.seconds),
                "steps_a_visit": steps,
            }
            for g in kinds.values():
                g.ask("forget")
    return found


def median_visit(measured: Measured) -> Visit:
    """Makes a visit that gives every step the median time of all steps and processes."""
    return lambda count: count * quartiles(measured.visit(count))["median"]


def of_ideal(rounds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Returns half the time of one process over the time of each other kind, by rounds."""
    return {
        kind: quartiles([alone / (2 * t) for alone, t in zip(rounds["1"], values, strict=True)])
        for kind, values in rounds.items()
        if kind != "1"
    }


_PARTS: dict[str, tuple[Callable[[bool, Tell], dict[str, Any]], Callable[[bool], int]]] = {
    "link": (the_link, lambda quick: len(LINKS)),
    "updates": (updates, lambda quick: sum(map(len, _UPDATES.values()))),
    "smollm2": (smollm2, lambda quick: 4 if quick else 6),
    "mlp": (mlp, lambda quick: 4 + 4 * 4 + 2 * 3),
}
"""For each part except scaling: its function, and the number of times it reports progress."""
