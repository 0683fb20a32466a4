"""Measures one module of `prograde torch`: two processes take turns."""

import contextlib
from functools import partial
from importlib import metadata
from typing import Any

from prograde.lab.display import Display
from prograde.lab.measure.timing import Visit, take_turns
from prograde.lab.processes.requests import RequestError, Server

WORKER = "prograde.lab.studies.torch.worker"
METHODS = {
    "torch": ("torch-bare", "torch-backprop", "torch-compiled"),
    "prograde": ("prograde", "prograde-whole", "jax-alone", "jax-backprop"),
}


def _seconds(side: Server, method: str, count: int) -> float:
    return side.ask(method=method, count=count)["seconds"]


def measure(name: str, rounds: int, display: Display) -> dict[str, Any]:
    """Takes all figures of a module; returns its record."""
    figures: dict[str, dict[str, Any]] = {}
    visits: dict[str, Visit] = {}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        sides = {}
        for side in METHODS:
            sides[side] = Server(f"the process of {side}", WORKER, side, name)
            stack.callback(sides[side].close)
        with display.stage(f"{name}: first steps", sum(map(len, METHODS.values()))):
            for side, methods in METHODS.items():
                for method in methods:
                    try:
                        first = sides[side].ask(method=method, count=1)
                    except RequestError as error:
                        if method != "torch-compiled":  # it needs a C++ compiler
                            raise RequestError(f"{method}: {error}") from None
                        missing[method] = str(error)
                    else:
                        figures[method] = {"first": first["seconds"], "loss": first["loss"]}
                        visits[method] = partial(_seconds, sides[side], method)
                    display.advance(1, method)
        turns = take_turns(visits, rounds, display, name)
    for method, found in turns.summary("torch-backprop").items():
        figures[method] |= {"seconds": found["seconds"], "ratio": found["ratio"]}
        figures[method]["rounds"] = [float(f"{x:.5g}") for x in turns.seconds[method]]
    versions = {package: metadata.version(package) for package in ("torch", "torchax")}
    return {"methods": figures, "missing": missing, "busy": turns.busy, "versions": versions}
