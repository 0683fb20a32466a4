"""Times programs that take turns in one run, and computes the ratios between them.

Programs take turns round by round, so that other load on the machine affects all of them alike. A
ratio is the median of the ratios of the rounds, not the ratio of the medians.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
import psutil

from prograde.lab.display import Display
from prograde.lab.store import cores

VISIT_SECONDS = 0.05  # a visit makes as many calls as fit into this time
SETTLE_SECONDS = 0.01  # between visits, until the threads of the last program sleep

Visit = Callable[[int], float]
"""Makes a number of calls; returns the seconds that they took."""


def quartiles(values: list[float]) -> dict[str, float]:
    """Returns median and quartiles over the rounds of a measurement."""
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def ratio_quartiles(values: list[float], base: list[float]) -> dict[str, float]:
    """Returns median and quartiles of the ratios of the rounds."""
    return quartiles([v / b for v, b in zip(values, base, strict=True)])


def timed(calls: Callable[[int], Any]) -> Visit:
    """Makes a visit that measures the time until the results of `calls(count)` are ready."""

    def visit(count: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(calls(count))
        return time.perf_counter() - begin

    return visit


def repeated(call: Callable[[], Any]) -> Visit:
    """Makes a visit that repeats a call, and waits for the results of each."""

    def calls(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(call())

    return timed(calls)


@dataclass(frozen=True)
class Program:
    """A compiled program and its arguments. `call` waits for the results.

    `temp_bytes` is the memory that XLA plans in addition to arguments and results.
    """

    call: Callable[[], Any]
    temp_bytes: int
    compile_seconds: float


def compiled(fun: Callable[..., Any], *args: Any) -> Program:
    """Compiles `fun` for these arguments."""
    begin = time.perf_counter()
    program = eqx.filter_jit(fun).lower(*args).compile()
    seconds = time.perf_counter() - begin
    analysis: Any = program.compiled.memory_analysis()
    return Program(
        lambda: jax.block_until_ready(program(*args)), analysis.temp_size_in_bytes, seconds
    )


@dataclass(frozen=True)
class Turns:
    """Times of programs that took turns.

    **Fields:** `seconds`: of one call, by program and round; `calls`: number of calls in a visit;
    `busy`: the share of the machine's processor time that other processes used meanwhile.
    """

    seconds: dict[str, list[float]]
    calls: dict[str, int]
    busy: float

    def summary(self, base: str) -> dict[str, dict[str, Any]]:
        """For each program `seconds` and `ratio` to `base` (median, quartiles, n), and `busy`."""
        return {
            name: {
                "seconds": quartiles(values),
                "ratio": ratio_quartiles(values, self.seconds[base]),
                "busy": self.busy,
            }
            for name, values in self.seconds.items()
        }


def calibrated(visit: Visit) -> int:
    """Returns the number of calls that fill a visit. The first call may do more and is ignored."""
    visit(1)
    count = 1
    while (seconds := visit(count)) < VISIT_SECONDS / 2:
        count *= 4
    return max(1, math.ceil(count * VISIT_SECONDS / seconds))


def orders(names: list[str]) -> Iterator[list[str]]:
    """Yields orders of the names, the same in every run. Each differs from the one before."""
    chance, last = random.Random(0), []
    while True:
        order = chance.sample(names, len(names))
        if order != last or len(names) < 2:
            yield order
        last = order


def take_turns(
    visits: Mapping[str, Visit],
    rounds: int,
    display: Display,
    title: str,
    calls: int | None = None,
) -> Turns:
    """Visits each program once a round, each round in another order.

    **Arguments:** `calls`: the number of calls in a visit. Default: as many as fill
    `VISIT_SECONDS`, for each program. Every program is called before the first round.
    """
    counts, expected = {}, {}
    with display.stage(f"{title}: first calls", len(visits)):
        for name, visit in visits.items():
            if calls is None:
                counts[name] = calibrated(visit)
            else:
                visit(calls)
                counts[name] = calls
            expected[name] = visit(counts[name]) + SETTLE_SECONDS
            display.advance(1, name)
    seconds: dict[str, list[float]] = {name: [] for name in visits}
    with display.stage(f"{title}: {rounds} rounds", rounds * sum(expected.values())):
        watch = Others()
        for order in itertools.islice(orders(list(visits)), rounds):
            for name in order:
                time.sleep(SETTLE_SECONDS)
                seconds[name].append(visits[name](counts[name]) / counts[name])
                display.advance(expected[name], name)
        busy = watch.busy()
    return Turns(seconds, counts, busy)


class Others:
    """Measures how busy other processes keep the machine, from its creation on."""

    def __init__(self):
        self._all, self._own, self._begin = _machine(), _own(), time.monotonic()

    def busy(self) -> float:
        """Returns the share of processor time that other processes used, from 0 to 1."""
        elapsed = max(time.monotonic() - self._begin, 1e-9) * cores()
        used, own = _machine() - self._all, _own() - self._own
        return min(max((used - own) / elapsed, 0.0), 1.0)


def _machine() -> float:
    """Returns the processor time that the whole machine has used, in seconds."""
    found = psutil.cpu_times()
    return found.user + found.system + getattr(found, "steal", 0.0)


def _own() -> float:
    """Returns the processor time that this process and its children have used, in seconds."""
    process = psutil.Process()
    own = process.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:  # it has ended, and counts as an ended child
            continue
        total += times.user + times.system
    return total


def programs_in_turns(
    programs: Mapping[str, Program], rounds: int, base: str, display: Display, title: str
) -> dict[str, dict[str, Any]]:
    """Times compiled programs that take turns; returns their record.

    **Returns:** for each program `seconds` and `ratio` to `base` (median, quartiles, n), `busy`,
    `temp_bytes` and `compile_seconds`.
    """
    visits = {name: repeated(program.call) for name, program in programs.items()}
    summary = take_turns(visits, rounds, display, title).summary(base)
    return {
        name: figures
        | {
            "temp_bytes": programs[name].temp_bytes,
            "compile_seconds": programs[name].compile_seconds,
        }
        for name, figures in summary.items()
    }
