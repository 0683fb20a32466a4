"""The options of `prograde replay-speed`."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.display import Display
from prograde.lab.report import Report
from prograde.lab.store import Store
from prograde.lab.study import Study, UsageError


@dataclass(frozen=True)
class ReplaySpeed(Study):
    """Train the paper's MLP with a replay log, and compute the parameters again from the log.

    The study compares bits, times and sizes. Training, training in one scan and replaying take
    turns. It takes about three minutes.
    """

    name: ClassVar[str] = "replay-speed"

    steps: Annotated[int, tyro.conf.arg(metavar="N")] = 10_000
    """Number of steps of the run, a multiple of --turn."""
    turn: Annotated[int, tyro.conf.arg(metavar="N")] = 500
    """Number of steps of a turn."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store."""
        from prograde.lab.studies.replay_speed import LEAST_TURNS

        if self.turn < 1:
            raise UsageError(f"--turn {self.turn}: at least 1 is needed.")
        if self.steps % self.turn or self.steps < LEAST_TURNS * self.turn:
            raise UsageError(
                f"--steps {self.steps} must be a multiple of --turn {self.turn}, and at least "
                f"{LEAST_TURNS} times as large."
            )
        return {".": self.config()}

    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Trains and replays."""
        from prograde.lab.studies.replay_speed.run import measure

        (store,) = stores.values()
        store.once("replay", lambda: measure(self.steps, self.turn, display))

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each store in a section."""
        from prograde.lab.studies.replay_speed.report import report

        return report(stores)
