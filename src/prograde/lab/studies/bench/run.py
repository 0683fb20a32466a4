"""Measures one model of `prograde bench`. Where PyTorch is installed, it takes turns with JAX."""

import contextlib
import importlib.util
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from prograde.lab.display import Display
from prograde.lab.measure import memory
from prograde.lab.measure.timing import Turns, Visit, take_turns
from prograde.lab.models.workload import Workload
from prograde.lab.models.workloads import WORKLOADS
from prograde.lab.processes.requests import RequestError
from prograde.lab.studies.bench.methods import METHODS, JaxSide, counted_ratios, in_bfloat16
from prograde.lab.studies.bench.torch_side import TorchSide

Figures = dict[str, dict[str, Any]]  # of each method


def measure(
    name: str,
    rounds: int,
    with_memory: bool,
    display: Display,
    methods: Sequence[str] = (),
    device: str = "cpu",
) -> dict[str, Any]:
    """Takes all figures of a model, by all methods or by those named; returns its record."""
    workload = WORKLOADS[name]()
    if device == "gpu":
        workload = in_bfloat16(workload)
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        record = _timed(workload, arrays, rounds, display, methods)
        if with_memory:
            _add_memory(workload, arrays, record["methods"], display)
    return record


def _timed(
    workload: Workload, arrays: Path, rounds: int, display: Display, methods: Sequence[str]
) -> dict[str, Any]:
    """Times all methods in turns."""
    jax_side, missing = JaxSide(workload, methods), {}
    parameters = sum(w.size for w in jax.tree.leaves(jax_side.carry[0]))
    with contextlib.ExitStack() as stack:
        torch_side = None
        wanted = not methods or any(name.startswith("torch") for name in methods)
        if wanted and importlib.util.find_spec("torch") is not None:
            jax_side.save(arrays)
            try:
                torch_side = stack.enter_context(TorchSide(workload, arrays))
            except RequestError as error:
                missing["torch"] = str(error)
        figures, visits = _compiled(workload, jax_side, torch_side, missing, display)
        turns = take_turns(visits, rounds, display, workload.name)
    for name, found in timing_figures(turns).items():
        figures[name] |= found
    for name, ratio in counted_ratios(workload).items():
        if name in figures:
            figures[name]["counted_ratio"] = ratio
    return {
        "title": workload.title,
        "sizes": workload.sizes,
        "parameters": parameters,
        "torch": None if torch_side is None else torch_side.facts,
        "missing": missing,  # PyTorch methods that do not run here, and why
        "busy": turns.busy,
        "load": memory.load_average(),
        "methods": {name: figures[name] for name in METHODS if name in figures},
    }


def timing_figures(turns: Turns) -> Figures:
    """Returns the times of each method, in total, over the bare forward pass, and by round."""
    summary = turns.summary("bare")
    return {
        name: {
            "seconds": summary[name]["seconds"],
            "ratio": summary[name]["ratio"],
            "steps_a_visit": turns.calls[name],
            "rounds": [float(f"{value:.5g}") for value in values],
        }
        for name, values in turns.seconds.items()
    }


def _compiled(
    workload: Workload,
    jax_side: JaxSide,
    torch_side: TorchSide | None,
    missing: dict[str, str],
    display: Display,
) -> tuple[Figures, dict[str, Visit]]:
    """Compiles everything; returns the costs of compilation and the visit of each method."""
    sides: dict[str, JaxSide | TorchSide] = dict.fromkeys(jax_side.methods, jax_side)
    if torch_side is not None:
        sides |= dict.fromkeys(torch_side.methods, torch_side)
    figures: Figures = {}
    visits: dict[str, Visit] = {}
    # the first compilation of a process also does set-up for all others
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((8, 8))))
    with display.stage(f"{workload.name}: compiling", len(sides)):
        for name, side in sides.items():
            try:
                figures[name] = side.compile(name)
            except RequestError as error:  # for example, no C++ compiler: the other methods go on
                missing[name] = str(error)
            else:
                visits[name] = finite_visit(side, name)
            display.advance(1, name)
    if "torch-bare" in visits:  # neither has changed its parameters yet
        ours, theirs = jax_side.visit("bare", 1)[1], figures["torch-bare"]["first_loss"]
        if not math.isclose(ours, theirs, rel_tol=1e-3):
            raise RuntimeError(
                f"{workload.name}: the loss is {ours:g} in JAX and {theirs:g} in PyTorch."
            )
    return figures, visits


def finite_visit(side: JaxSide | TorchSide, method: str) -> Visit:
    """Makes a visit of a method that raises `RuntimeError` if the loss is not finite."""

    def visit(count: int) -> float:
        seconds, loss = side.visit(method, count)
        if not math.isfinite(loss):
            raise RuntimeError(f"{method}: the loss is {loss}, so its time would mean nothing.")
        return seconds

    return visit


def _add_memory(workload: Workload, arrays: Path, figures: Figures, display: Display) -> None:
    """Measures each method in its own process, with default settings of the allocator."""
    with display.stage(f"{workload.name}: memory", len(figures)):
        for name, found in figures.items():
            if name.startswith("torch"):
                try:
                    with TorchSide(workload, arrays, keep_memory=False) as side:
                        found |= side.memory(name)
                except RequestError as error:
                    found |= {"rss_before": None, "peak_rss": None, "error": str(error)}
            else:
                module = "prograde.lab.studies.bench.methods"
                more = memory.in_a_process(module, workload.name, name)
                found |= {k: v for k, v in more.items() if v is not None or k not in found}
            display.advance(1, name)
