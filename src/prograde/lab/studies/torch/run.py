"""Measures one module of `prograde torch`: two processes take turns."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from typing import Any

from prograde.lab.display import Display
from prograde.lab.measure.timing import Visit, take_turns

METHODS = {
    "torch": ("torch-bare", "torch-backprop", "torch-compiled"),
    "prograde": ("prograde", "prograde-whole", "jax-alone", "jax-backprop"),
}


class Side:
    """A process of `worker` for one module. Raises `RuntimeError` if it fails."""

    def __init__(self, side: str, name: str):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prograde.lab.studies.torch.worker", side, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # waiting threads of PyTorch sleep during the turns of others, and it is no slower
            env=os.environ | {"GOMP_SPINCOUNT": "20000"},
            start_new_session=True,  # Ctrl-C goes to the command, which ends this process
        )

    def ask(self, method: str, count: int) -> dict[str, Any]:
        """Takes steps, and returns their seconds and the last loss."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"method": method, "count": count}) + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{method}: its process ended: {(lines or ['no message'])[-1]}")
        found = json.loads(reply)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return found

    def visit(self, method: str) -> Visit:
        """The seconds of a number of steps."""
        return lambda count: self.ask(method, count)["seconds"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


def measure(name: str, rounds: int, display: Display) -> dict[str, Any]:
    """Takes all figures of a module; returns its record."""
    figures: dict[str, dict[str, Any]] = {}
    visits: dict[str, Visit] = {}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        sides = {side: stack.enter_context(Side(side, name)) for side in METHODS}
        with display.stage(f"{name}: first steps", sum(map(len, METHODS.values()))):
            for side, methods in METHODS.items():
                for method in methods:
                    try:
                        first = sides[side].ask(method, 1)
                    except RuntimeError as error:
                        if method != "torch-compiled":  # it needs a C++ compiler
                            raise
                        missing[method] = str(error)
                    else:
                        figures[method] = {"first": first["seconds"], "loss": first["loss"]}
                        visits[method] = sides[side].visit(method)
                    display.advance(1, method)
        turns = take_turns(visits, rounds, display, name)
    for method, found in turns.summary("torch-backprop").items():
        figures[method] |= {"seconds": found["seconds"], "ratio": found["ratio"]}
        figures[method]["rounds"] = [float(f"{x:.5g}") for x in turns.seconds[method]]
    versions = {package: metadata.version(package) for package in ("torch", "torchax")}
    return {"methods": figures, "missing": missing, "busy": turns.busy, "versions": versions}
