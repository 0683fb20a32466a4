"""What every problem of `prograde beyond` is."""

import abc
from typing import Any, ClassVar

from matplotlib.figure import Figure as Canvas

from prograde.lab.display import Display
from prograde.lab.report import Table


class Problem(abc.ABC):
    """A problem on which forward gradients go where reverse mode does not, or not so cheaply.

    `measure` takes all figures once. Everything that is shown is made from them.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abc.abstractmethod
    def measure(self, full: bool, display: Display) -> dict[str, Any]:
        """Takes all figures, as JSON holds them. Quick is about a minute on two cores."""

    @abc.abstractmethod
    def tables(self, record: dict[str, Any]) -> list[Table]:
        """Makes the tables of the figures."""

    @abc.abstractmethod
    def conclusion(self, record: dict[str, Any]) -> str:
        """Says in a few sentences what the figures show, and where ours loses."""

    @abc.abstractmethod
    def draw(self, record: dict[str, Any], canvas: Canvas) -> None:
        """Draws the figures on an empty canvas, whose size it may set."""
