"""Measures the time of training steps. All trainers take turns."""

import time
from collections.abc import Mapping
from typing import Any

import jax

from prograde.lab.display import Display
from prograde.lab.measure.timing import Visit, take_turns
from prograde.lab.training.schedules import Rate
from prograde.lab.training.trainer import Carry, Trainer


def step_seconds(
    trainers: Mapping[str, Trainer],
    rounds: int,
    display: Display,
    title: str,
    steps: int,
    one_carry: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times full training steps of trainers that take turns. The trainer `bare` is the base.

    **Arguments:** `steps`: the number of steps in a visit; `one_carry`: all trainers share one set
    of parameters, for cases where several sets do not fit in memory.

    **Returns:** for each trainer `seconds` of a step and `ratio` to `bare`, with their spread, and
    `busy`.
    """
    shared = [trainers["bare"].start(0)] if one_carry else None
    visits = {
        name: training_visit(trainer, shared or [trainer.start(0)])
        for name, trainer in trainers.items()
    }
    return take_turns(visits, rounds, display, title, steps).summary("bare")


def training_visit(trainer: Trainer, carry: list[Carry]) -> Visit:
    """Makes a visit of steps at rate 0. The carry in the list is replaced by the next one."""

    def visit(count: int) -> float:
        rows = trainer.rows(0, 0, count)
        begin = time.perf_counter()
        carry[0], losses, _ = trainer.steps(carry[0], Rate(0.0), 0, rows)
        jax.block_until_ready((carry[0], losses))
        return time.perf_counter() - begin

    return visit
