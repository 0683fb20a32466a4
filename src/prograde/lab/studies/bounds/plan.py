"""The options of `prograde bounds`."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.display import Display
from prograde.lab.report import Report
from prograde.lab.store import Store
from prograde.lab.study import Study, UsageError


@dataclass(frozen=True)
class Bounds(Study):
    """Measure what bounds a structured step, and remedies that did not help.

    The parts are one product for primal and tangent, the paper's convolutional network, one of its
    convolutions, and the time to compile a deep network. It takes about two minutes. Run it on an
    otherwise idle machine: other load spoils the times.
    """

    name: ClassVar[str] = "bounds"

    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 15
    """Number of rounds. Each program is timed once a round."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store."""
        if self.rounds < 1:
            raise UsageError(f"--rounds {self.rounds}: at least 1 is needed.")
        return {".": self.config()}

    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Measures one part after the other."""
        from prograde.lab.studies.bounds.run import PARTS

        (store,) = stores.values()
        for name, measure in PARTS.items():
            store.once(name, lambda measure=measure: measure(self.rounds, display))

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each part in a section."""
        from prograde.lab.studies.bounds.report import report

        return report(stores)
