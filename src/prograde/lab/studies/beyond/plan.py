"""The options of `prograde beyond`."""

import time
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.report import Report, Table
from prograde.lab.store import Store
from prograde.lab.studies.beyond import PROBLEMS
from prograde.lab.study import Study, UsageError

_LENGTH = tyro.conf.create_mutex_group(required=False, title="length")


@dataclass(frozen=True)
class Beyond(Study):
    """Solve problems where reverse mode cannot go, compared with the best reverse mode found.

    - prograde beyond newton ode control: loops whose length depends on the parameters
    - prograde beyond posterior: NUTS on differential equations, by the gradients of each mode
    - prograde beyond horizon: gradients through 10^3 to 10^6 steps, at constant memory
    - prograde beyond stream: learning while the data flows, compared with truncated backprop
    - prograde beyond recall: a symbol asked for after 100 to 10,000 distractors, in a stream
    - prograde beyond hyper: hyperparameters, by the derivative through a whole training run

    Without names, all problems run. Each takes about a minute.
    """

    name: ClassVar[str] = "beyond"
    extra: ClassVar[str] = "beyond"

    problems: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar=f"[{'|'.join(PROBLEMS)} ...]")
    ] = ("all",)
    """Names of problems. Default: all."""
    quick: Annotated[bool, _LENGTH] = False
    """About a minute each. This is the default."""
    full: Annotated[bool, _LENGTH] = False
    """Longer horizons, more rounds, larger networks: several minutes each."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store for each problem."""
        names = list(dict.fromkeys(self.problems)) or ["all"]
        if unknown := [name for name in names if name not in PROBLEMS and name != "all"]:
            raise UsageError(
                f"unknown problem {', '.join(unknown)}. Valid names: all, {', '.join(PROBLEMS)}."
            )
        names = PROBLEMS if "all" in names else names
        return {name: {"problem": name, "full": self.full} for name in names}

    def run(self, stores: dict[str, Store], display: Any) -> None:
        """Measures the problems one after the other."""
        from prograde.lab.studies.beyond.report import module

        runs = {name: module(name, "run") for name in stores}  # fails before any run

        def measure(name: str) -> dict[str, Any]:
            begin = time.perf_counter()
            figures = runs[name].measure(self.full, display)
            return figures | {"run_seconds": time.perf_counter() - begin}

        for name, store in stores.items():
            store.once("figures", lambda name=name: measure(name))

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each problem in a section."""
        from prograde.lab.studies.beyond.report import report

        return report(stores)

    @classmethod
    def choices(cls) -> list[Table]:
        """The problems."""
        from prograde.lab.studies.beyond.report import module

        rows = [[name, module(name, "report").TITLE] for name in PROBLEMS]
        return [Table("Problems of prograde beyond", ["name", "problem"], rows, unbroken=1)]
