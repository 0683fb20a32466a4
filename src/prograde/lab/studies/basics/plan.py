"""The options of `prograde basics`."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.display import Display
from prograde.lab.report import Report
from prograde.lab.store import Store
from prograde.lab.study import Study, UsageError


@dataclass(frozen=True)
class Basics(Study):
    """Measure the costs that the project promises: the import, a step, the training loop.

    It takes about two minutes. Run it on an otherwise idle machine: other load spoils the times.
    """

    name: ClassVar[str] = "basics"

    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 40
    """Number of rounds. Each program is timed once a round."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store."""
        if self.rounds < 2:
            raise UsageError(f"--rounds {self.rounds}: at least 2 are needed.")
        return {".": self.config()}

    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Measures one thing after the other."""
        from prograde.lab.studies.basics import run

        (store,) = stores.values()
        store.once("imports", lambda: run.imports(display))
        store.once("beale", lambda: run.beale(display))
        store.once("mlp-step", lambda: run.mlp_step(self.rounds, display))
        store.once("loop", lambda: run.loop(self.rounds // 2, display))

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each store in a section."""
        from prograde.lab.studies.basics.report import report

        return report(stores)
