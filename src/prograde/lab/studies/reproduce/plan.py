"""The options of `prograde reproduce`."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from prograde.lab.report import Report, Table
from prograde.lab.store import Store
from prograde.lab.study import Study, UsageError

if TYPE_CHECKING:
    from prograde.lab.data import Dataset
    from prograde.lab.studies.reproduce.experiments import Experiment

_LENGTH = tyro.conf.create_mutex_group(required=False, title="length")


@dataclass(frozen=True)
class Reproduce(Study):
    """Run the experiments of "Gradients without Backpropagation" again.

    - prograde reproduce: all six, in minutes, on digits that come with the package
    - prograde reproduce beale rosenbrock: only these two
    - prograde reproduce --data mnist --full: in full length, on MNIST; hours

    Every experiment measures the cost of a step and searches a learning rate for each method, with
    the same budget for all. Then it trains by the paper's estimator, by rank-one forward gradients
    and by backprop, at the paper's rate and at the rate of the search.
    """

    name: ClassVar[str] = "reproduce"

    experiments: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")
    ] = dataclasses.field(default=("all",), metadata={"positional": True})
    """Names of experiments, which `prograde list` shows. Default: all."""
    data: Annotated[str, tyro.conf.arg(metavar="digits|mnist|DIR")] = "digits"
    """digits (comes with the package), mnist, or a directory of idx files."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the MNIST files. Default: PROGRADE_DATA_DIR, the cache, the public mirrors."""
    quick: Annotated[bool, _LENGTH] = False
    """Minutes. This is the default."""
    full: Annotated[bool, _LENGTH] = False
    """Long runs, several seeds, many rounds of timing: most of an hour or more."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of runs of each method and setting. Default: depends on --quick or --full."""
    distributed: bool = False
    """Share each batch with the other processes of a group, found at JAX_COORDINATOR_ADDRESS. See
    `prograde launch`."""

    @functools.cached_property
    def chosen(self) -> "list[Experiment]":
        """The experiments that run. Raises `UsageError` for invalid options."""
        from prograde.lab.studies.reproduce.experiments import EXPERIMENTS

        possible = [
            n for n, e in EXPERIMENTS.items() if callable(e.subject) or not self.distributed
        ]
        names = list(dict.fromkeys(self.experiments)) or ["all"]
        if unknown := [name for name in names if name not in EXPERIMENTS and name != "all"]:
            raise UsageError(
                f"unknown experiment {', '.join(unknown)}. "
                f"Valid names: all, {', '.join(EXPERIMENTS)}."
            )
        if alone := [name for name in names if name not in possible and name != "all"]:
            raise UsageError(
                f"{', '.join(alone)} has no batch that --distributed could share. "
                f"Valid names: all, {', '.join(possible)}."
            )
        if self.seeds is not None and self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: at least 1 is needed.")
        return [EXPERIMENTS[name] for name in (possible if "all" in names else names)]

    @functools.cached_property
    def dataset(self) -> "Dataset | None":
        """The data, or None if no chosen experiment needs any."""
        from prograde.lab.data import load

        needed = any(callable(experiment.subject) for experiment in self.chosen)
        return load(self.data, self.data_dir) if needed else None

    def join(self) -> int:
        """With --distributed, joins the other processes; returns the number of this one."""
        if not self.distributed:
            return 0
        self.chosen  # noqa: B018  # refuses invalid options before any process waits
        from prograde.lab.processes.workers import join

        return join()

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store for each experiment."""
        from prograde.lab.studies.reproduce.experiments import describe

        chosen, data = self.chosen, self.dataset
        facts = None if data is None else {"name": data.name, "sha256": data.fingerprint()}
        configs = {e.name: describe(e, self.full, self.seeds, facts) for e in chosen}
        if self.distributed:
            from prograde.lab.processes.workers import agree

            mesh = agree({"the configuration": configs})
            configs = {name: config | {"workers": mesh.size} for name, config in configs.items()}
        return configs

    @property
    def label(self) -> str:
        """The data and the length."""
        data = "functions" if self.dataset is None else self.dataset.name
        return f"{data}-{'full' if self.full else 'quick'}"

    def run(self, stores: dict[str, Store], display: Any) -> None:
        """Runs the experiments one after the other."""
        from prograde.lab.processes.workers import devices, share_files
        from prograde.lab.studies.reproduce.run import run

        mesh = devices() if self.distributed else None
        if mesh is not None:
            for store in stores.values():
                share_files(store.directory)
        for i, experiment in enumerate(self.chosen):
            title = f"{experiment.name} ({i + 1} of {len(self.chosen)})"
            budget = experiment.budget(self.full)
            budget = dataclasses.replace(budget, seeds=self.seeds or budget.seeds)
            run(title, experiment, self.dataset, budget, stores[experiment.name], display, mesh)

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each experiment in a section."""
        from prograde.lab.studies.reproduce.report import report

        return report(stores)

    @classmethod
    def choices(cls) -> list[Table]:
        """The experiments with what the paper reports, and the methods."""
        from prograde.lab.studies.reproduce.experiments import (
            EXPERIMENTS,
            METHOD_TITLES,
            reported_text,
        )

        experiments = [
            [e.name, e.title, ", ".join(f"{rate:g}" for rate in e.paper_rates), reported_text(e)]
            for e in EXPERIMENTS.values()
        ]
        return [
            Table(
                "Experiments of prograde reproduce. R_f, R_b: a forward-gradient and a backprop "
                "step over a bare forward pass. T: time to backprop's best held-out loss, over "
                "backprop's. The paper's figures are at second hand.",
                ["name", "experiment", "rate", "reported by the paper"],
                experiments,
                unbroken=1,
            ),
            Table(
                "Methods of prograde reproduce",
                ["name", "method"],
                [[name, title] for name, title in METHOD_TITLES.items()],
                unbroken=1,
            ),
        ]
