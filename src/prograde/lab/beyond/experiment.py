"""What every experiment of `prograde beyond` is."""

import abc
from typing import Any, ClassVar

from matplotlib.figure import Figure

from prograde.lab.display import Display
from prograde.lab.report import Table


class Experiment(abc.ABC):
    """A problem on which forward gradients go where reverse mode does not, or not so cheaply; one file each.

    The figures are measured once, and everything that is shown is made from them.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abc.abstractmethod
    def measure(self, full: bool, display: Display) -> dict[str, Any]:
        """All figures, as what JSON holds. Quick is about a minute on two cores; `full` takes several."""

    @abc.abstractmethod
    def tables(self, record: dict[str, Any]) -> list[Table]:
        """What is shown of the figures."""

    @abc.abstractmethod
    def conclusion(self, record: dict[str, Any]) -> str:
        """What the figures say, in a few sentences; where ours loses, that too."""

    @abc.abstractmethod
    def draw(self, record: dict[str, Any], figure: Figure) -> None:
        """Draws into an empty figure, whose size it may set."""


def milliseconds(seconds: dict[str, float]) -> str:
    """The median of a measured time in ms, with half the distance between its quartiles."""
    median, half = 1e3 * seconds["median"], (seconds["high"] - seconds["low"]) / 2
    said = f"{median:.3g}" if median < 1000 else f"{median:,.0f}"
    return f"{said} ± {1e5 * half / median:.0f} %"


def size(value: float) -> str:
    """A number of bytes, for reading."""
    for unit, amount in (("MB", 1e6), ("kB", 1e3)):
        if value >= amount:
            return (
                f"{value / amount:,.3g}\u00a0{unit}"
                if value < 1000 * amount
                else f"{value / amount:,.0f}\u00a0{unit}"
            )
    return f"{value:.0f}\u00a0B"
