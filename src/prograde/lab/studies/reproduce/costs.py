"""What a training step costs: time by interleaved measurement, memory by XLA's own figure and by processes of their own."""

import contextlib
import ctypes
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import prograde as pg
from prograde.lab import experiments, models
from prograde.lab.data import BATCH_SIZE, IMAGE_SIZE, NUM_CLASSES, Dataset
from prograde.lab.train import Rate, Trainer

_SCAN_STEPS = 20  # steps a measurement, where they run inside one scan


def variants(experiment: experiments.Experiment) -> dict[str, tuple[pg.Estimator | None, bool]]:
    """What is measured: name -> (estimator, whether reverse mode is checkpointed)."""
    found: dict[str, tuple[pg.Estimator | None, bool]] = {"bare": (None, False)}
    found |= {name: (estimator, False) for name, estimator in experiments.METHODS.items()}
    if not isinstance(experiment.subject, models.Surface):
        found["checkpointed"] = (pg.Backprop(), True)
    return found


def synthetic_data(num_batches: int = 10) -> Dataset:
    """Random images, where only the cost matters."""
    generator = np.random.default_rng(0)
    n = num_batches * BATCH_SIZE
    part = (
        generator.random((n, IMAGE_SIZE, IMAGE_SIZE), np.float32),
        generator.integers(0, NUM_CLASSES, n).astype(np.int32),
    )
    return Dataset("synthetic", part, part, part)


def step_seconds(
    trainers: dict[str, Trainer],
    rounds: int,
    on_round: Callable[[int], None],
    steps: int | None = None,
) -> dict[str, Any]:
    """Seconds a full training step (or bare forward pass) of each trainer takes.

    The trainers take turns, round by round, so that what disturbs the machine disturbs all of them; the figures are medians
    and quartiles over the rounds, and each ratio is the median of the rounds' own ratios. `steps` is how many make a turn.
    """
    runs: dict[str, tuple[Any, Any]] = {}
    for name, trainer in trainers.items():
        rows = trainer.rows(0, 0, steps or (_SCAN_STEPS if trainer.in_scan else 1))
        runs[name] = (trainer.start(0), rows)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for i in range(rounds + 1):
        for name, trainer in trainers.items():
            carry, rows = runs[name]
            begin = time.perf_counter()
            carry, losses, _ = trainer.steps(carry, 0.0, 0, rows)
            jax.block_until_ready((carry, losses))
            if i > 0:  # the first round compiles
                seconds[name].append((time.perf_counter() - begin) / len(rows))
            runs[name] = (carry, rows)
        on_round(i)
    return {
        name: {"seconds": quartiles(values), "ratio": ratio_quartiles(values, seconds["bare"])}
        for name, values in seconds.items()
    }


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles over the rounds of a measurement."""
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def ratio_quartiles(values: list[float], base: list[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' own ratios."""
    return quartiles([v / b for v, b in zip(values, base, strict=True)])


def experiment_costs(
    experiment: experiments.Experiment,
    trainers: dict[str, Trainer],
    data: Dataset | None,
    rounds: int,
    on_round: Callable,
) -> dict[str, Any]:
    """`step_seconds` of an experiment's methods, with the bare forward pass and the checkpointed variant beside them."""
    everything = {
        name: trainers[name]
        if name in trainers
        else Trainer(experiment, estimator, data, checkpointed)
        for name, (estimator, checkpointed) in variants(experiment).items()
    }
    return step_seconds(everything, rounds, on_round)


def depth_experiment(depth: int) -> experiments.Experiment:
    """The depth experiment at one depth, as something to train."""
    base = experiments.EXPERIMENTS["depth"]
    return experiments.Experiment(
        base.name,
        base.title,
        lambda checkpointed: models.deep(depth, checkpointed=checkpointed),
        base.paper_rates,
        base.reported,
        base.quick,
        base.full,
    )


def depth_seconds(depth: int, rounds: int, on_round: Callable[[int], None]) -> dict[str, Any]:
    """`step_seconds` at one depth. All methods share one set of parameters, one after the other, so that they fit."""
    experiment, data = depth_experiment(depth), synthetic_data()
    carry = Trainer(experiment, None, data).start(0)
    steps = {}
    for name, (estimator, checkpointed) in variants(experiment).items():
        steps[name] = Trainer(experiment, estimator, data, checkpointed)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    inner = max(1, 20 // depth)
    for i in range(rounds + 1):
        for name, trainer in steps.items():
            rows = trainer.rows(0, i, inner)
            begin = time.perf_counter()
            carry, losses, _ = trainer.steps(carry, 0.0, 0, rows)
            jax.block_until_ready((carry, losses))
            if i > 0:
                seconds[name].append((time.perf_counter() - begin) / inner)
        on_round(i)
    return {
        name: {
            "seconds": {"median": float(np.median(v)), "n": len(v)},
            "ratio": {"median": float(np.median(np.divide(v, seconds["bare"]))), "n": len(v)},
        }
        for name, v in seconds.items()
    }


def memory(
    experiment: experiments.Experiment, depth: int, on_method: Callable[[str], None]
) -> dict[str, Any]:
    """Memory of one training step of each method, each in a process of its own, two at a time; in bytes.

    `temp_bytes` is what XLA says the step needs beside its arguments and results; `peak_rss` and `rss_before` are the
    process's resident memory at its peak during three steps and just before them (null where the system cannot tell).
    """

    def measure(method: str) -> dict[str, Any]:
        figures = in_a_process("prograde.lab.costs", experiment.name, method, str(depth))
        on_method(method)
        return figures

    methods = list(variants(experiment))
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(methods, pool.map(measure, methods), strict=True))


def in_a_process(module: str, *arguments: str) -> dict[str, Any]:
    """The figures of memory that a module, run with these arguments, prints as JSON on its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:  # out of memory, say: the figure is missing, and the record says why
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        missing = dict.fromkeys(("temp_bytes", "argument_bytes", "rss_before", "peak_rss"))
        return {
            **missing,
            "error": f"{shlex.join(command[1:])} ended with {done.returncode}: {reason}",
        }
    return json.loads(done.stdout.splitlines()[-1])


def _resident(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def resident_memory(steps: Callable[[], Any]) -> dict[str, int | None]:
    """Resident memory of this process just before `steps` and at its peak while they run, in bytes."""
    peak_is_of_steps = False
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what compilation freed and the C library kept would hide what steps need
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the compilation
        peak_is_of_steps = True
    before = _resident("VmRSS")
    steps()
    return {"rss_before": before, "peak_rss": _resident("VmHWM") if peak_is_of_steps else None}


def step_memory(compiled: Any, carry: Any, *arguments: Any) -> dict[str, int | None]:
    """Memory of a compiled step `carry, _ = compiled(carry, *arguments)`, in this process: three steps after a first one."""

    def steps(count: int) -> None:
        nonlocal carry
        for _ in range(count):
            carry, _ = compiled(carry, *arguments)
        jax.block_until_ready(carry)

    analysis = compiled.memory_analysis()
    steps(1)
    return {
        "temp_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
        **resident_memory(lambda: steps(3)),
    }


def compiled_step(trainer: Trainer) -> tuple[Any, Any, tuple[Any, ...]]:
    """One step of a trainer, compiled by itself: `carry, _ = compiled(carry, *arguments)`; with a carry and the arguments."""
    carry, rows = trainer.start(0), jnp.asarray(trainer.rows(0, 0, 1)[0])
    arguments = (
        Rate(jnp.float32(0.0), jnp.float32(1.0)),
        jax.random.key(0),
        trainer.train_data,
        rows,
    )
    return (
        jax.jit(trainer._step, donate_argnums=0).lower(carry, *arguments).compile(),
        carry,
        arguments,
    )


def _measure_memory(name: str, method: str, depth: int) -> dict[str, Any]:
    experiment = depth_experiment(depth) if depth else experiments.EXPERIMENTS[name]
    estimator, checkpointed = variants(experiment)[method]
    trainer = Trainer(experiment, estimator, synthetic_data(1), checkpointed)
    compiled, carry, arguments = compiled_step(trainer)
    return step_memory(compiled, carry, *arguments)


if __name__ == "__main__":
    print(json.dumps(_measure_memory(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
