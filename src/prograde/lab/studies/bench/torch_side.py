"""PyTorch's side of the comparison: a process that works only on request."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prograde.lab.models.workload import Workload

# Waiting threads of PyTorch spin for less than a millisecond, and sleep during JAX's turns. PyTorch
# is as fast with this as by default. (With OMP_WAIT_POLICY=PASSIVE threads do not spin at all, and
# an MLP step of PyTorch is a fifth slower.)
_SPINS = "20000"


class TorchError(RuntimeError):
    """PyTorch or its process failed to carry out a request."""


class TorchSide:
    """A workload in PyTorch, in its own process (`torch_worker`). `methods` names its methods.

    Raises `TorchError` if the process fails.
    """

    def __init__(self, workload: Workload, arrays: Path, keep_memory: bool = True):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        settings = {
            "GOMP_SPINCOUNT": _SPINS,
            "TORCHINDUCTOR_CACHE_DIR": str(arrays.parent / "inductor"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prograde.lab.studies.bench.torch_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | settings,
            start_new_session=True,  # Ctrl-C goes to the command, which ends this process
        )
        try:
            given = {"name": workload.name, "sizes": workload.sizes, "arrays": str(arrays)}
            facts = self._ask(do="start", **given, keep_memory=keep_memory)
            self.methods, self.facts = facts.pop("methods"), facts
        except BaseException:
            self.close()
            raise

    def _ask(self, **request: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            raise TorchError(f"the process of PyTorch ended: {(lines or ['no message'])[-1]}")
        found = json.loads(reply)
        if "error" in found:
            raise TorchError(found["error"])
        return found

    def compile(self, method: str) -> dict[str, Any]:
        """Takes the first step, whose time includes compilation if there is one."""
        return self._ask(do="compile", method=method)

    def visit(self, method: str, count: int) -> tuple[float, float]:
        """Takes `count` steps; returns the seconds and the last loss."""
        found = self._ask(do="visit", method=method, count=count)
        return found["seconds"], found["loss"]

    def memory(self, method: str) -> dict[str, Any]:
        """Measures the resident memory of the process before and during three steps."""
        return self._ask(do="memory", method=method)

    def __enter__(self) -> "TorchSide":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()
