"""The options of `prograde bench`."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from prograde.lab.display import Display
from prograde.lab.report import Report, Table
from prograde.lab.store import Store
from prograde.lab.studies.bench import MODELS
from prograde.lab.study import Study, UsageError


@dataclass(frozen=True)
class Bench(Study):
    """Measure what a training step costs by each method: time, memory and compilation.

    The methods are forward gradients with 1, 4 and 16 tangents, backprop (plain, checkpointed,
    unrolled), a dense tangent through jax.jvp, and MeZO. Each is one plain SGD step, and all take
    turns in one run. Where PyTorch is installed, its forward pass, its backprop (eager and
    compiled) and torch.func.jvp take turns with them.

    - prograde bench: all models, which takes most of an hour
    - prograde bench mlp cnn --rounds 5 --no-memory: first results in minutes
    - prograde bench resnet --out DIR --resume: one more model, in the same records

    Run it on an otherwise idle machine: other load spoils the times.
    """

    name: ClassVar[str] = "bench"

    models: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar=f"[{'|'.join(MODELS)} ...]")
    ] = dataclasses.field(default=("all",), metadata={"positional": True})
    """Names of models. Default: all."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Number of rounds. Each method is timed once a round."""
    no_memory: bool = False
    """Do not measure resident memory, which needs a process for each method."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store, to which models can be added."""
        if unknown := [name for name in self.models if name not in (*MODELS, "all")]:
            raise UsageError(
                f"unknown model {', '.join(unknown)}. Valid names: all, {', '.join(MODELS)}."
            )
        if self.rounds < 1:
            raise UsageError(f"--rounds {self.rounds}: at least 1 is needed.")
        return {".": {"rounds": self.rounds, "memory": not self.no_memory}}

    def prepare(self) -> None:
        """Makes the C library keep freed memory, which helps backprop most."""
        from prograde.lab.measure.memory import keep_freed_memory

        keep_freed_memory()

    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Measures one model after the other. The record of each is complete or absent."""
        from prograde.lab.studies.bench.run import measure

        (store,) = stores.values()
        names = MODELS if "all" in self.models or not self.models else self.models
        for name in names:
            store.once(
                name, lambda name=name: measure(name, self.rounds, not self.no_memory, display)
            )

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each directory in an overview and a section for each model."""
        from prograde.lab.studies.bench.report import report

        return report(stores)

    @classmethod
    def choices(cls) -> list[Table]:
        """The models and the methods."""
        from prograde.lab.models.workloads import WORKLOADS
        from prograde.lab.studies.bench.report import methods_table

        rows = [[name, make().title] for name, make in WORKLOADS.items()]
        models = Table("Models of prograde bench", ["name", "model"], rows, unbroken=1)
        return [models, methods_table()]
