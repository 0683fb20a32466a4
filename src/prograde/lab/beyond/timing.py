"""Compiled programs that take turns."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax

from prograde.lab import costs
from prograde.lab.bench import SETTLE_SECONDS, VISIT_SECONDS
from prograde.lab.display import Display


@dataclass(frozen=True)
class Program:
    """A compiled program and its arguments; `temp_bytes` is what XLA says it needs beside arguments and results."""

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


def in_turns(
    programs: dict[str, Program], rounds: int, base: str, display: Display, title: str
) -> dict[str, dict[str, Any]]:
    """Seconds of a call of each program, round by round in another order, and the ratios to `base` in the same round.

    **Returns:** for each name `seconds` and `ratio` (median, quartiles, n), `temp_bytes` and `compile_seconds`.
    """
    counts, expected = {}, {}
    with display.stage(f"{title}: first calls", len(programs)):
        for name, program in programs.items():
            program.call()  # the first call may do more than the others
            begin = time.perf_counter()
            program.call()
            taken = time.perf_counter() - begin
            counts[name] = max(1, round(VISIT_SECONDS / max(taken, 1e-6)))
            expected[name] = taken * counts[name] + SETTLE_SECONDS
            display.advance(1, name)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    with display.stage(f"{title}: {rounds} rounds", rounds * sum(expected.values())):
        for i in range(rounds):
            for name in random.Random(i).sample(list(programs), len(programs)):
                time.sleep(SETTLE_SECONDS)
                begin = time.perf_counter()
                for _ in range(counts[name]):
                    programs[name].call()
                seconds[name].append((time.perf_counter() - begin) / counts[name])
                display.advance(expected[name], name)
    return {
        name: {
            "seconds": costs.quartiles(values),
            "ratio": costs.ratio_quartiles(values, seconds[base]),
            "temp_bytes": programs[name].temp_bytes,
            "compile_seconds": programs[name].compile_seconds,
        }
        for name, values in seconds.items()
    }
