"""The options of `prograde links`."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.display import Display
from prograde.lab.report import Report
from prograde.lab.store import Store
from prograde.lab.studies.links import PARTS
from prograde.lab.study import Study, UsageError


@dataclass(frozen=True)
class Links(Study):
    """Measure training steps of processes that are joined by a slow link.

    The study compares forward gradients with data-parallel backprop, over links of 10 and 100
    Mbit/s with a round trip of 50 ms, and over a link without limits. A model of the costs projects
    them to thousands of workers. It takes about fifteen minutes, and needs root, Linux, iproute2,
    /dev/net/tun and two cores.

    - prograde links: all parts
    - prograde links mlp --out DIR --resume: one more part, in the same records

    Run it on an otherwise idle machine: other load spoils the times.
    """

    name: ClassVar[str] = "links"

    parts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar=f"[{'|'.join(PARTS)} ...]")
    ] = dataclasses.field(default=("all",), metadata={"positional": True})
    """Parts to measure. Default: all."""
    note: str = ""
    """A note about the machine, which the report shows."""
    quick: bool = False
    """Take few steps, as a check that everything works."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store, to which parts can be added."""
        if unknown := [name for name in self.parts if name not in (*PARTS, "all")]:
            raise UsageError(
                f"unknown part {', '.join(unknown)}. Valid names: all, {', '.join(PARTS)}."
            )
        from prograde.lab.studies.links.network import missing

        if why := missing():
            raise UsageError(f"links cannot run here: {why}.")
        return {".": {"quick": self.quick}}

    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Measures one part after the other. The record of each is complete or absent."""
        from prograde.lab.studies.links.run import measure

        (store,) = stores.values()
        names = PARTS if "all" in self.parts or not self.parts else self.parts
        for name in names:
            store.once(name, lambda name=name: measure(name, self.quick, self.note, display))

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each part in a section, and the projection."""
        from prograde.lab.studies.links.report import report

        return report(stores)
