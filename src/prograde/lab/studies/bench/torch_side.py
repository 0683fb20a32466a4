"""PyTorch's side of the comparison: a process that works only on request."""

from pathlib import Path
from typing import Any

from prograde.lab.models.workload import Workload
from prograde.lab.processes.requests import Server


class TorchSide:
    """A workload in PyTorch, in its own process (`torch_worker`). `methods` names its methods.

    Raises `RequestError` if the process fails.
    """

    def __init__(self, workload: Workload, arrays: Path, keep_memory: bool = True):
        self._server = Server(
            "the process of PyTorch",
            "prograde.lab.studies.bench.torch_worker",
            TORCHINDUCTOR_CACHE_DIR=str(arrays.parent / "inductor"),
        )
        try:
            given = {"name": workload.name, "sizes": workload.sizes, "arrays": str(arrays)}
            facts = self._server.ask(do="start", **given, keep_memory=keep_memory)
            self.methods, self.facts = facts.pop("methods"), facts
        except BaseException:
            self.close()
            raise

    def compile(self, method: str) -> dict[str, Any]:
        """Takes the first step, whose time includes compilation if there is one."""
        return self._server.ask(do="compile", method=method)

    def visit(self, method: str, count: int) -> tuple[float, float]:
        """Takes `count` steps; returns the seconds and the last loss."""
        found = self._server.ask(do="visit", method=method, count=count)
        return found["seconds"], found["loss"]

    def memory(self, method: str) -> dict[str, Any]:
        """Measures the resident memory of the process before and during three steps."""
        return self._server.ask(do="memory", method=method)

    def __enter__(self) -> "TorchSide":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._server.close()
