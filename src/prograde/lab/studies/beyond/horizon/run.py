"""Long horizons: the gradient of a loss along a trajectory, at constant memory."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from rich.console import Console

from prograde.lab.display import Display
from prograde.lab.measure.timing import Program, compiled, programs_in_turns
from prograde.lab.studies.beyond.horizon.loops import (
    METHODS,
    Pendulum,
    Recurrent,
    gradient,
)

# XLA's CPU backend compiles a loop to one kernel if a step touches less than a kilobyte. In a loop
# that touches more, it dispatches every operation of every step, which costs more than the
# arithmetic of a small system. This option raises the limit.
ONE_KERNEL = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000"
_SETTINGS = {"default": "as XLA comes", "one kernel": "loop as one kernel"}


@dataclass(frozen=True)
class Plan:
    """How much is measured, in a process with one setting of XLA."""

    lengths: tuple[int, ...] = (1_000, 100_000)  # in addition to search_length
    unrolls: tuple[int, ...] = (1, 2)  # steps of an iteration that are tried, for every method
    search_length: int = 10_000
    rounds: int = 5
    widths: tuple[int, ...] = (32,)  # pendulums at once
    recurrent: tuple[int, ...] = (1_000, 10_000)
    methods: tuple[str, ...] = tuple(METHODS)


# compilation takes much longer with the default setting, where the quick plan omits the search
QUICK = {"default": Plan(lengths=(), unrolls=(1,)), "one kernel": Plan()}
_FULL = Plan((1_000, 100_000, 1_000_000), (1, 4, 16), 10_000, 7, (8, 32), (1_000, 10_000, 100_000))
FULL = {"default": replace(_FULL, lengths=(1_000, 100_000)), "one kernel": _FULL}
_WIDE = ("bare", "ours", "backprop", "each step", "square root")


def _compiled(problem: Any, steps: int, unrolls: dict[str, int]) -> dict[str, Program]:
    """Compiles a program of each method, two at a time."""
    params = problem.params()

    def make(item: tuple[str, int]) -> Program:
        return compiled(gradient(problem, item[0], steps, item[1]), jax.random.key(0), params)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(unrolls, pool.map(make, unrolls.items()), strict=True))


def pendulum_figures(plan: Plan, setting: str, display: Display) -> dict[str, Any]:
    """Searches the best unrolling, then measures time and memory of all methods by T.

    The setting of XLA is that of this process.
    """
    title = f"pendulum, {_SETTINGS[setting]}"
    searched, programs = {}, {}
    for unroll in plan.unrolls:
        programs[unroll] = _compiled(
            Pendulum(), plan.search_length, dict.fromkeys(plan.methods, unroll)
        )
        said = f"{title}, {plan.search_length:,} steps, {unroll} an iteration"
        searched[unroll] = programs_in_turns(programs[unroll], plan.rounds, "bare", display, said)
    unrolls = {
        method: min(plan.unrolls, key=lambda u: _seconds(searched[u], method))
        for method in plan.methods
    }
    search = {str(u): {m: _seconds(at, m) for m in at} for u, at in searched.items()}
    lengths, gradients = {}, {}
    for steps in sorted({plan.search_length, *plan.lengths}):
        if steps == plan.search_length:  # measured by the search
            best = {m: programs[u][m] for m, u in unrolls.items()}
            lengths[str(steps)] = {m: searched[u][m] for m, u in unrolls.items()}
        else:
            best = _compiled(Pendulum(), steps, unrolls)
            lengths[str(steps)] = programs_in_turns(
                best, plan.rounds, "bare", display, f"{title}, {steps:,} steps"
            )
        gradients[str(steps)] = {
            m: np.asarray(p.call()[1]).tolist() for m, p in best.items() if m != "bare"
        }
    return {"search": search, "unrolls": unrolls, "lengths": lengths, "gradients": gradients}


def wide_figures(plan: Plan, display: Display) -> dict[str, Any]:
    """Measures several pendulums at once, with more arithmetic: number -> method -> figures."""
    found = {}
    for count in plan.widths:
        methods = [m for m in _WIDE if m in plan.methods]
        programs = _compiled(Pendulum(count), plan.search_length, dict.fromkeys(methods, 1))
        found[str(count)] = programs_in_turns(
            programs, plan.rounds, "bare", display, f"{count} pendulums at once"
        )
    return found


def recurrent_figures(plan: Plan, display: Display) -> dict[str, Any]:
    """Measures the GRU: T -> method -> figures."""
    found = {}
    for steps in plan.recurrent:
        methods = [m for m in (*_WIDE, "cube root") if m in plan.methods]
        programs = _compiled(Recurrent(), steps, dict.fromkeys(methods, 1))
        found[str(steps)] = programs_in_turns(
            programs, plan.rounds, "bare", display, f"GRU, {steps:,} steps"
        )
    return found


def _one_kernel(plan: Plan) -> dict[str, Any]:
    """Measures the pendulum in a process of its own, because XLA reads its settings once."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_KERNEL}".strip()
    }
    command = [sys.executable, "-m", __name__, json.dumps(asdict(plan))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(
            f"the process that measures with XLA_FLAGS={environment['XLA_FLAGS']!r} ended with "
            f"status {done.returncode}; its messages are above. If XLA does not know the flag, use "
            "jaxlib 0.7.1 or later."
        )
    return json.loads(done.stdout.splitlines()[-1])


def _seconds(figures: dict[str, Any], method: str) -> float:
    return figures[method]["seconds"]["median"]


def _plan(text: str) -> Plan:
    figures: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()
    }
    return Plan(**figures)


def measure(full: bool, display: Display) -> dict[str, Any]:
    """Takes all figures. On two cores this takes a minute, and several with `full`."""
    return measured(FULL if full else QUICK, display)


def measured(plans: dict[str, Plan], display: Display) -> dict[str, Any]:
    """Takes the figures of one plan for each setting of XLA."""
    default, one_kernel = plans["default"], plans["one kernel"]
    record: dict[str, Any] = {"plans": {setting: asdict(plan) for setting, plan in plans.items()}}
    record["pendulum"] = {"default": pendulum_figures(default, "default", display)}
    record["recurrent"] = recurrent_figures(default, display)
    of_process = _one_kernel(one_kernel)
    record["pendulum"]["one kernel"], record["wide"] = (
        of_process["pendulum"],
        of_process["wide"],
    )
    return record


if __name__ == "__main__":
    chosen, shown = _plan(sys.argv[1]), Display(Console(stderr=True))
    of_pendulum = pendulum_figures(chosen, "one kernel", shown)
    print(json.dumps({"pendulum": of_pendulum, "wide": wide_figures(chosen, shown)}))
