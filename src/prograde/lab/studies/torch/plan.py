"""The options of `prograde torch`."""

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.display import Display
from prograde.lab.report import Report
from prograde.lab.store import Store
from prograde.lab.study import Study, UsageError

MODELS = ("mlp", "llama", "minilm")


@dataclass(frozen=True)
class Torch(Study):
    """Measure a training step of PyTorch modules: prograde.torch compared with PyTorch's backprop.

    PyTorch runs in a process of its own, and both take turns. It takes about five minutes. Run it
    on an otherwise idle machine: other load spoils the times.
    """

    name: ClassVar[str] = "torch"
    extra: ClassVar[str] = "transformers"

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{mlp,llama,minilm}")] = MODELS
    """The models to measure."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 15
    """Number of rounds. Each method is timed once a round."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store."""
        if unknown := set(self.models) - set(MODELS):
            raise UsageError(f"--models {sorted(unknown)}: choose from {', '.join(MODELS)}.")
        if self.rounds < 2:
            raise UsageError(f"--rounds {self.rounds}: at least 2 are needed.")
        for package in ("torch", "torchax", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise UsageError(
                    f"{package} is not installed. In a checkout of prograde, run: "
                    "pip install '.[lab,transformers]'"
                )
        return {".": self.config("models")}

    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Measures one model after the other."""
        from prograde.lab.studies.torch.run import measure

        (store,) = stores.values()
        for name in self.models:
            store.once(name, lambda name=name: measure(name, self.rounds, display))

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each store in a section."""
        from prograde.lab.studies.torch.report import report

        return report(stores)
