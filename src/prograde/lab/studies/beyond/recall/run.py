"""Recall after distractors: what each method learns in equal time, and what its steps take."""

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

import prograde as pg
from prograde.lab.display import Display
from prograde.lab.measure.timing import compiled, programs_in_turns, repeated
from prograde.lab.models.recurrent import min_gru, start
from prograde.lab.studies.beyond.recall.methods import Method, methods
from prograde.lab.studies.beyond.recall.task import GUESSING, INPUTS, SYMBOLS, episode

_POINTS = 40  # of a curve


@dataclass(frozen=True)
class Delay:
    """How a delay is measured: seconds for each run, rates tried, seeds at the best rate."""

    delay: int
    seconds: float
    rates: tuple[float, ...] = (0.01,)
    seeds: int = 0
    windows: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """Sizes of the study. `costs`: units of the cells whose steps are timed, of 32 inputs."""

    units: int = 128
    streams: int = 32
    delays: tuple[Delay, ...] = (
        Delay(100, 5.0, (0.01,), 0, (10, 50, 1), ("RTRL", "backprop", "window 50")),
    )
    memory: tuple[int, ...] = (100, 1_000)
    costs: tuple[int, ...] = (256,)
    steps: int = 200
    rounds: int = 5


QUICK = Setting()
_NAMES = ("RTRL", "backprop", "window 50", "d = 0", "UORO", "SnAp")
FULL = Setting(
    delays=(
        Delay(100, 4.0, (0.003, 0.01, 0.03), 3, (50, 1), _NAMES),
        Delay(1_000, 22.0, (0.03,), 0, (500,), ("RTRL", "backprop", "window 500")),
        Delay(10_000, 150.0, (0.03,), 0, (), ("RTRL",)),
    ),
    memory=(100, 1_000, 10_000),
    costs=(256, 1_024),
)


def measure(full: bool, display: Display) -> dict[str, Any]:
    """Learns at every delay, then takes memory and times of steps."""
    return measure_setting(FULL if full else QUICK, display)


def measure_setting(setting: Setting, display: Display) -> dict[str, Any]:
    """Does the same for any setting."""
    tasks = {str(plan.delay): _learned(plan, setting, display) for plan in setting.delays}
    return {
        "setting": {"units": setting.units, "streams": setting.streams, "inputs": INPUTS},
        "guessing": GUESSING,
        "tasks": tasks,
        "memory": {str(delay): memory(delay, setting) for delay in setting.memory},
        "costs": {str(units): costs(units, 32, setting, display) for units in setting.costs},
    }


def _learned(plan: Delay, setting: Setting, display: Display) -> dict[str, Any]:
    found = {}
    chosen = methods(plan.delay, plan.windows, noisy=True)
    each = (len(plan.rates) + plan.seeds) * plan.seconds
    with display.stage(f"recall after {plan.delay:,} steps", each * len(plan.names)):
        for name in plan.names:
            trials = {}
            for rate in plan.rates:
                trials[rate] = _run(chosen[name], plan, setting, rate, 0)
                display.advance(plan.seconds, f"{name}, {rate:g}: {trials[rate]['loss']:.3g}")
            rate = min(trials, key=lambda r: np.nan_to_num(trials[r]["loss"], nan=np.inf))
            runs = [trials[rate]]
            if plan.seeds:  # seeds that did not choose the rate
                runs = []
                for seed in range(1, plan.seeds + 1):
                    runs.append(_run(chosen[name], plan, setting, rate, seed))
                    display.advance(plan.seconds, f"{name}: {runs[-1]['loss']:.3g}")
            found[name] = {
                "title": chosen[name].title,
                "rate": rate,
                "trials": {f"{r:g}": trial["loss"] for r, trial in trials.items()},
                "runs": runs,
            }
    return {"seconds": plan.seconds, "methods": found}


def _run(method: Method, plan: Delay, setting: Setting, rate: float, seed: int) -> dict[str, Any]:
    """Learns for some seconds. The loss of an episode is that before its update.

    The loss at the end is the mean of the last tenth of the time.
    """
    begin = method.begin(setting.units, setting.streams, plan.delay, rate, seed)
    data = jax.random.key(1000 + seed)
    drawn = lambda i: episode(jax.random.fold_in(data, i), plan.delay, setting.streams)  # noqa: E731
    jax.block_until_ready(method.learn(plan.delay, *begin, *drawn(0)))  # compiles
    (carry, opt_state), losses, times = begin, [], []
    clock = time.perf_counter()
    while (elapsed := time.perf_counter() - clock) < plan.seconds:
        try:
            carry, opt_state, value = method.learn(
                plan.delay, carry, opt_state, *drawn(len(losses) + 1)
            )
        except pg.online.StreamError:  # diverged
            value = np.nan
        losses.append(float(value))
        times.append(elapsed)
        if not np.isfinite(losses[-1]):
            break
    cuts = np.searchsorted(times, np.arange(_POINTS + 1) * plan.seconds / _POINTS)
    curve = [
        [(i + 1) * plan.seconds / _POINTS, float(np.mean(losses[a:b]))]
        for i, (a, b) in enumerate(itertools.pairwise(cuts))
        if b > a
    ]
    last = losses[int(np.searchsorted(times, 0.9 * plan.seconds)) :] or losses[-1:]
    learned = next((t for t, value in curve if value < 0.01), None)
    return {
        "loss": float(np.mean(last)),
        "episodes": len(losses),
        "learned_seconds": learned,
        "curve": curve,
    }


def memory(delay: int, setting: Setting) -> dict[str, int]:
    """Bytes while an episode is learned from, beside the episode: what is carried, and temporaries.

    Backprop is compiled, and not run.
    """
    found = {}
    for name in ("RTRL", "backprop"):
        method = methods(delay, (), noisy=False)[name]
        inputs, targets = jax.eval_shape(lambda: episode(jax.random.key(0), delay, setting.streams))
        carry, opt_state = method.begin(setting.units, setting.streams, delay, 0.01, 0)
        learn = lambda *args, method=method: method.learn(delay, *args)  # noqa: E731
        program = jax.jit(learn).lower(carry, opt_state, inputs, targets).compile()
        carried = sum(x.nbytes for x in jax.tree.leaves((carry, opt_state)))
        analysis: Any = program.memory_analysis()
        found[name] = carried + analysis.temp_size_in_bytes
    return found


def costs(units: int, inputs: int, setting: Setting, display: Display) -> dict[str, Any]:
    """Times of a step: forward, RTRL sparse and dense, and backprop through all steps."""
    cell = min_gru
    params = start(cell, jax.random.key(0), inputs, units, SYMBOLS)
    squared = lambda output, target: jnp.mean((output - target) ** 2)  # noqa: E731
    state = jnp.zeros(units)
    sparse = pg.online.RTRL(cell, squared)
    dense = replace(sparse, influence="dense")

    def stream(steps: int) -> tuple[Array, Array]:
        keys = jax.random.split(jax.random.key(1))
        xs = jax.random.normal(keys[0], (steps, inputs))
        return xs, jax.random.normal(keys[1], (steps, SYMBOLS))

    def total(params: Any, xs: Array, ys: Array) -> Array:
        def one(state: Array, xy: tuple[Array, Array]) -> tuple[Array, Array]:
            state, output = cell(params, state, xy[0])
            return state, squared(output, xy[1])

        return jnp.sum(lax.scan(one, state, (xs, ys))[1])

    def online(learner: pg.online.RTRL) -> Any:
        def run(carry: Any, xs: Array, ys: Array) -> Any:
            def one(loop: Any, xy: tuple[Array, Array]) -> tuple[Any, None]:
                carry, sums = loop
                carry, _, grads = learner.step(jax.random.key(0), carry, *xy)
                return (carry, jax.tree.map(jnp.add, sums, grads)), None

            return lax.scan(one, (carry, jax.tree.map(jnp.zeros_like, params)), (xs, ys))[0]

        return run

    many = stream(setting.steps)
    few = jax.tree.map(lambda x: x[:2], many)
    carry = sparse.init(params, state, many[0][0], many[1][0])
    programs = {
        "forward": compiled(total, params, *many),
        "RTRL, sparse": compiled(online(sparse), carry, *many),
        "backprop": compiled(jax.grad(total), params, *many),
    }
    found = programs_in_turns(
        programs, setting.rounds, "forward", display, f"steps of {units:,} units"
    )
    of_dense = compiled(online(dense), dense.init(params, state), *few)
    visit = repeated(of_dense.call)
    visit(1)
    times = [visit(1) for _ in range(2)]
    gradient = programs["backprop"].call()
    ours = programs["RTRL, sparse"].call()[1]
    plan = sparse.plan(params, state, many[0][0])
    return {
        "steps": {
            name: {
                "seconds": figures["seconds"]["median"] / setting.steps,
                "ratio": figures["ratio"],
                "busy": figures["busy"],
            }
            for name, figures in found.items()
        },
        "dense_seconds": min(times) / 2,
        "error": _distance(ours, gradient),
        "plan": {
            "colours": sum(plan.colours),
            "numbers": plan.numbers,
            "parameters": plan.parameters,
            "dense_bytes": 4 * plan.parameters * plan.state,
        },
    }


def _distance(a: Any, b: Any) -> float:
    square = lambda tree: sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree))  # noqa: E731
    return (square(jax.tree.map(jnp.subtract, a, b)) / square(b)) ** 0.5
