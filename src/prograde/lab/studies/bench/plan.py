"""The options of `prograde bench`."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from prograde.lab.display import Display
from prograde.lab.report import Report, Table
from prograde.lab.store import Store
from prograde.lab.studies.bench import GPU_METHODS, MODELS, ON_GPU, WIDE
from prograde.lab.study import Study, UsageError


@dataclass(frozen=True)
class Bench(Study):
    """Measure what a training step costs by each method: time, memory and compilation.

    The methods are forward gradients with 1, 4 and 16 tangents, in all parameters and in one block
    a step, backprop (plain, checkpointed,
    unrolled), a dense tangent through jax.jvp, and MeZO. Each is one plain SGD step, and all take
    turns in one run. Where PyTorch is installed, its forward pass, its backprop (eager and
    compiled) and torch.func.jvp take turns with them.

    - prograde bench: all models, which takes most of an hour
    - prograde bench mlp cnn --rounds 5 --no-memory: first results in minutes
    - prograde bench --device gpu: a choice of models and methods, in bfloat16, in minutes
    - prograde bench resnet --out DIR --resume: one more model, in the same records

    Run it on an otherwise idle machine: other load spoils the times.
    """

    name: ClassVar[str] = "bench"

    models: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar=f"[{'|'.join(MODELS)} ...]")
    ] = dataclasses.field(default=("all",), metadata={"positional": True})
    """Names of models. Default: all."""
    rounds: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of rounds. Each method is timed once a round. Default: 20, or 5 on a GPU."""
    device: Literal["cpu", "gpu"] = "cpu"
    """gpu: a choice of models and methods in bfloat16 that takes minutes, on JAX's first GPU."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Names of methods, which `prograde list` shows. Default: all. The bare pass, one tangent and a
    backprop are needed."""
    no_memory: bool = False
    """Do not measure resident memory, which needs a process for each method."""

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store, to which models can be added."""
        names = (*MODELS, *WIDE)
        if unknown := [name for name in self.models if name not in (*names, "all")]:
            raise UsageError(
                f"unknown model {', '.join(unknown)}. Valid names: all, {', '.join(names)}."
            )
        if self.rounds is not None and self.rounds < 1:
            raise UsageError(f"--rounds {self.rounds}: at least 1 is needed.")
        on_gpu = self.device == "gpu"
        config: dict[str, Any] = {
            "rounds": self.rounds or (5 if on_gpu else 20),
            "memory": not self.no_memory and not on_gpu,
        }
        if on_gpu:
            config["device"] = "gpu"
        if self.methods:
            from prograde.lab.studies.bench.methods import METHODS

            if unknown := [name for name in self.methods if name not in METHODS]:
                raise UsageError(
                    f"unknown method {', '.join(unknown)}. Valid names: {', '.join(METHODS)}."
                )
            if missing := {"bare", "prograde-1", "backprop"} - set(self.methods):
                raise UsageError(
                    f"--methods leaves out {', '.join(sorted(missing))}, which the ratios need."
                )
            config["methods"] = list(self.methods)
        return {".": config}

    def prepare(self) -> None:
        """Makes the C library keep freed memory, which helps backprop most; looks for the GPU."""
        from prograde.lab.measure.memory import keep_freed_memory

        keep_freed_memory()
        if self.device == "gpu":
            import jax

            if jax.default_backend() != "gpu":
                raise UsageError(
                    f"--device gpu, but JAX runs on {jax.default_backend()} here. Install JAX for "
                    "the GPU, such as jax[cuda13]."
                )

    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Measures one model after the other. The record of each is complete or absent."""
        from prograde.lab.studies.bench.run import measure

        (store,) = stores.values()
        config, all_models = self.configs()["."], ON_GPU if self.device == "gpu" else MODELS
        methods = self.methods or (GPU_METHODS if self.device == "gpu" else ())
        names = all_models if "all" in self.models or not self.models else self.models
        for name in names:
            store.once(
                name,
                lambda name=name: measure(
                    name, config["rounds"], config["memory"], display, methods, self.device
                ),
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
