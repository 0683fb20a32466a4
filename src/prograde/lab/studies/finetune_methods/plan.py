"""The options of `prograde finetune-methods`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.report import Report
from prograde.lab.store import Store
from prograde.lab.studies.finetune_methods.methods import CURVES
from prograde.lab.study import Study, UsageError

PARTS = ("steps", "curves")


@dataclass(frozen=True)
class FinetuneMethods(Study):
    """Compare methods of fine-tuning SmolLM2-135M: time and memory of a step, and what they reach.

    - prograde finetune-methods steps: all weights, 4 x 64 tokens. The methods take turns; the
      memory of each is measured in a process of its own
    - prograde finetune-methods curves --data movie_snippets.tsv: sentiment of short snippets, 1,000
      training examples, the methods at given rates, three seeds
    """

    name: ClassVar[str] = "finetune-methods"
    extra: ClassVar[str] = "lm"

    parts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[steps|curves ...]")
    ] = ("steps",)
    """What is measured. Default: steps."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 12
    """Number of times that each method is timed."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE.tsv")] = None
    """Table for the curves, with the columns text and label (positive, negative)."""
    minutes: Annotated[float, tyro.conf.arg(metavar="M")] = 1.0
    """Minutes of steps in each run of a method that has no number of steps."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Number of runs of each method, on other splits of the data."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Measure the curves of these methods only. Default: all."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store for each part."""
        parts = list(dict.fromkeys(self.parts)) or list(PARTS)
        if unknown := [part for part in parts if part not in PARTS]:
            raise UsageError(f"unknown part {', '.join(unknown)}. Valid: {', '.join(PARTS)}.")
        if unknown := [method for method in self.methods if method not in CURVES]:
            raise UsageError(
                f"--methods {', '.join(unknown)}: unknown. Valid: {'; '.join(CURVES)}."
            )
        for name in ("rounds", "minutes", "seeds"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} {getattr(self, name)}: more than 0 is needed.")
        if "curves" in parts and (self.data is None or not self.data.is_file()):
            raise UsageError(f"--data {self.data}: the curves need a table of labelled texts.")
        found = {
            "steps": {"part": "steps", "rounds": self.rounds},
            "curves": {
                "part": "curves",
                "data": self.data and self.data.name,
                "minutes": self.minutes,
            },
        }
        return {part: found[part] for part in parts}

    def run(self, stores: dict[str, Store], display: Any) -> None:
        """Measures the parts."""
        from prograde.lab.studies.finetune_methods import curves, steps

        if "steps" in stores:
            steps.measure(stores["steps"], self.rounds, display)
        if "curves" in stores:
            assert self.data is not None
            chosen = {n: s for n, s in CURVES.items() if n in (self.methods or CURVES)}
            curves.measure(stores["curves"], self.data, chosen, self.minutes, self.seeds, display)

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each part in a section."""
        from prograde.lab.studies.finetune_methods.report import report

        return report(stores)
