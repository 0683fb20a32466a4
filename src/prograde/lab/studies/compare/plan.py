"""The options of `prograde compare`."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from prograde.lab.report import Report, Table
from prograde.lab.store import Store
from prograde.lab.study import Study, UsageError

if TYPE_CHECKING:
    from prograde.lab.data import Dataset
    from prograde.lab.studies.compare.estimators import Entry

DEFAULT_MINUTES = 2.5
POINTS = 12  # of a curve
JUDGED = 4  # of the eight parts of a trial, so that a rate is not judged at one moment alone
LEAST_ESTIMATES = 8  # for estimators without randomness; also the minimum of `diagnose`
SCHEDULES = {  # those of `training.schedules`, in words
    "exp": "rate eta_0 exp(-0.0001 t)",
    "cosine": "rate eta_0 (1 + cos(pi t / T)) / 2 over the T steps of a run",
}
_DURATION = tyro.conf.create_mutex_group(required=False, title="duration")
_MODELS = "mlp|cnn|mixer|transformer|local-mixer-s|local-mixer-m"


@dataclass(frozen=True)
class Compare(Study):
    """Compare gradient estimators on one model, each with a learning rate of its own.

    - prograde compare: an MLP on digits, a few minutes
    - prograde compare --model transformer --estimators backprop weight dense
    - prograde compare --model cnn --data mnist --optimizers sgd adam --minutes 240

    The study times all estimators in turns, and measures the memory of a step and the bias and
    variance of the estimate at the start. It searches a learning rate for each with the same
    budget, and trains with several seeds. The report has held-out losses at equal steps and at
    equal time, and the frontiers of loss against time and against memory.
    """

    name: ClassVar[str] = "compare"

    model: Annotated[str, tyro.conf.arg(metavar=_MODELS)] = "mlp"
    """The model to train."""
    data: Annotated[str, tyro.conf.arg(metavar="digits|mnist|DIR")] = "digits"
    """digits (comes with the package), mnist, or a directory of idx files."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the MNIST files. Default: PROGRADE_DATA_DIR, the cache, the public mirrors."""
    estimators: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Names of estimators, which `prograde list` shows, or all. Default: backprop and some
    perturbations."""
    optimizers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[sgd|adam ...]")] = ("sgd",)
    """Optimizers. With both, each estimator is tuned and trained with each."""
    rates: Annotated[tuple[float, ...], tyro.conf.arg(metavar="[RATE ...]")] = ()
    """Learning rates, one for all or one for each estimator. Default: a search finds them."""
    minutes: Annotated[float | None, _DURATION, tyro.conf.arg(metavar="M")] = None
    """Total time, which decides the length of runs and trials. Default: 2.5."""
    steps: Annotated[int | None, _DURATION, tyro.conf.arg(metavar="N")] = None
    """Number of steps of each run and of each trial of the search."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Number of runs of each estimator."""
    estimates: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of gradients that bias and variance are measured with. Default: 100; CNN: 24."""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    """Number of examples in each batch."""
    schedule: Annotated[str, tyro.conf.arg(metavar="exp|cosine")] = "exp"
    """How the rate falls: by exp(-1e-4 t), as in the paper, or along a cosine to zero at the end of
    a run."""
    eval_examples: Annotated[int, tyro.conf.arg(metavar="N")] = 2000
    """Maximum number of images per evaluation, of the test part and of the validation part."""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The estimators that are compared."""
        from prograde.lab.studies.compare.estimators import DEFAULT, ESTIMATORS, LOCAL, MODELS

        if "all" not in self.estimators:
            return self.estimators or DEFAULT
        local = self.model in MODELS and MODELS[self.model].local
        return tuple(name for name in ESTIMATORS if local or name not in LOCAL)

    @functools.cached_property
    def dataset(self) -> "Dataset":
        """The data."""
        from prograde.lab.data import load

        return load(self.data, self.data_dir)

    @property
    def entries(self) -> "list[Entry]":
        """The entries that are measured."""
        from prograde.lab.studies.compare.estimators import Entry

        return [Entry(name, optimizer) for optimizer in self.optimizers for name in self.names]

    @property
    def trained(self) -> "list[Entry]":
        """The entries that get a search for a rate and are trained."""
        from prograde.lab.studies.compare.estimators import SAME_GRADIENT

        return [e for e in self.entries if SAME_GRADIENT.get(e.estimator) not in self.names]

    @property
    def trials(self) -> int:
        """The number of trials of the search for a rate."""
        from prograde.lab.training.search import TRIALS

        return 0 if self.rates else TRIALS

    def rate(self, entry: "Entry") -> float:
        """The rate that was given for an entry."""
        return self.rates[self.names.index(entry.estimator) if len(self.rates) > 1 else 0]

    def num_estimates(self, estimator: str) -> int:
        """The number of gradients that are drawn for the diagnosis."""
        import prograde as pg
        from prograde.lab.studies.compare.estimators import ESTIMATORS, MODELS

        if isinstance(ESTIMATORS[estimator], pg.Backprop | pg.CheckpointedBackprop):
            return LEAST_ESTIMATES
        return self.estimates or MODELS[self.model].estimates

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store. Raises `UsageError` for invalid names and numbers."""
        from prograde.lab.studies.compare.estimators import ESTIMATORS

        self._check()
        data = self.dataset
        if self.batch_size > (count := len(data.train[1])):
            raise UsageError(
                f"--batch-size {self.batch_size}: {data.name} has {count} examples to train on. "
                "Pass a smaller one."
            )
        short = DEFAULT_MINUTES if self.steps is None and self.minutes is None else self.minutes
        config = {
            "experiment": "compare",
            "model": self.model,
            "data": {"name": data.name, "sha256": data.fingerprint()},
            "estimators": {name: repr(ESTIMATORS[name]) for name in self.names},
            "estimates": {name: self.num_estimates(name) for name in self.names},
            "optimizers": list(self.optimizers),
            "schedule": SCHEDULES[self.schedule],
            "steps": self.steps,
            "minutes": short,
            "seeds": self.seeds,
            "trials": self.trials,
            "rates": list(self.rates),
            "judged": f"last {JUDGED} of 8 parts",
            "points": POINTS,
            "eval_examples": self.eval_examples,
            "batch_size": self.batch_size,
        }
        return {".": config}

    def _check(self) -> None:
        from prograde.lab.studies.compare.estimators import ESTIMATORS, LOCAL, MODELS
        from prograde.lab.training.schedules import OPTIMIZERS

        for name, given, known in (
            ("--model", (self.model,), MODELS),
            ("--estimators", self.names, ESTIMATORS),
            ("--optimizers", self.optimizers, OPTIMIZERS),
            ("--schedule", (self.schedule,), SCHEDULES),
        ):
            words = f"{name} {' '.join(given)}"
            if any(x not in known for x in given):
                unknown = " ".join(x for x in given if x not in known)
                raise UsageError(f"{name} {unknown}: not known. Valid names: {', '.join(known)}.")
            if not given or len(set(given)) < len(given):
                raise UsageError(f"{words}: at least one name is needed, each once.")
        if not MODELS[self.model].local and (local := [x for x in self.names if x in LOCAL]):
            others = ", ".join(name for name, model in MODELS.items() if model.local)
            raise UsageError(
                f"--estimators {' '.join(local)}: {self.model} has no local losses. "
                f"Models with local losses: {others}."
            )
        if "scaled-rows" in self.names and self.model != "mlp":
            raise UsageError(
                f"--estimators scaled-rows --model {self.model}: it knows the layers of mlp only."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise UsageError(
                f"--steps {self.steps} and --minutes {self.minutes:g}: "
                "only one of them can decide the length."
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"--minutes {self.minutes:g}: more than 0 are needed.")
        for name, value, least in (
            ("--steps", self.steps, 1),
            ("--seeds", self.seeds, 1),
            ("--estimates", self.estimates, LEAST_ESTIMATES),
            ("--batch-size", self.batch_size, 1),
            ("--eval-examples", self.eval_examples, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} {value}: at least {least} needed.")
        given = f"--rates {' '.join(f'{rate:g}' for rate in self.rates)}"
        if not all(0 < rate < math.inf for rate in self.rates):
            raise UsageError(f"{given}: more than 0 are needed.")
        if len(self.rates) not in (0, 1, len(self.names)):
            raise UsageError(
                f"{given}: one for all is needed, or one for each of the "
                f"{len(self.names)} estimators."
            )

    @property
    def label(self) -> str:
        """The model and the data."""
        return f"compare-{self.model}-{self.dataset.name}"

    def run(self, stores: dict[str, Store], display: Any) -> None:
        """Measures, searches and trains."""
        from prograde.lab.studies.compare.run import run

        run(self, stores["."], display)

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each comparison in a section."""
        from prograde.lab.studies.compare.report import report

        return report(stores)

    @classmethod
    def choices(cls) -> list[Table]:
        """The models and the estimators."""
        from prograde.lab.studies.compare.estimators import MODELS, TITLES

        return [
            Table(
                "Models of prograde compare",
                ["name", "model"],
                [[name, model.title] for name, model in MODELS.items()],
                unbroken=1,
            ),
            Table(
                "Estimators of prograde compare",
                ["name", "estimator"],
                [[name, title] for name, title in TITLES.items()],
                unbroken=1,
            ),
        ]
