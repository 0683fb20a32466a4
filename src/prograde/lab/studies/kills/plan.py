"""The options of `prograde kills`."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.display import Display
from prograde.lab.report import Report
from prograde.lab.store import Store
from prograde.lab.study import Study, UsageError


@dataclass(frozen=True)
class Kills(Study):
    """Kill workers of a training run at random moments, resume it, and check for losses.

    Two processes train a small network together. Again and again the study kills a random one of
    them with SIGKILL at a random moment. It measures the seconds until the other one ends, and
    whether the next start goes on from the last step in the log. The final parameters must equal
    those of a run without kills, bit by bit. 50 kills take about ten minutes.
    """

    name: ClassVar[str] = "kills"

    kills: Annotated[int, tyro.conf.arg(metavar="N")] = 50
    """Number of kills."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of the choice of worker and moment."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store."""
        if self.kills < 1:
            raise UsageError(f"--kills {self.kills}: at least 1 is needed.")
        return {".": self.config()}

    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Makes and records the remaining kills, and lets the run end."""
        from prograde.lab.studies.kills.run import measure

        (store,) = stores.values()
        measure(store, self.kills, self.seed, display)

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each store in a section."""
        from prograde.lab.studies.kills.report import report

        return report(stores)
