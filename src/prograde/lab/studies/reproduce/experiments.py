"""The experiments of the paper as values: the function, the rates, and the reported figures.

"Gradients without Backpropagation" (arXiv 2202.08587) trains everything by plain SGD with the
learning rate eta_t = eta_0 exp(-1e-4 t), t in iterations, and networks on batches of 64 images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import prograde as pg
from prograde.lab import models
from prograde.lab.data import BATCH_SIZE
from prograde.lab.training.schedules import DECAY

METHODS: dict[str, pg.Estimator] = {
    "forward": pg.WeightPerturbation(pg.Normal(), num_tangents=1),
    "low-rank": pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=1),
    "backprop": pg.Backprop(),
}
METHOD_TITLES = {
    "bare": "bare forward pass",
    "forward": "forward gradient, dense normal tangent (the paper's)",
    "low-rank": "forward gradient, rank-one tangent",
    "backprop": "backprop",
    "checkpointed": "backprop, checkpointed",
}


@dataclass(frozen=True)
class Budget:
    """The size of a run.

    **Fields:** `steps` of each run, and of each trial of the search for a rate; `points` of a
    curve, where a run is evaluated and can be resumed; `seeds`: runs of each method and setting;
    `eval_examples`: maximum number of examples of a part of the data per evaluation;
    `timing_rounds`: rounds, in each of which every method is timed once; `depths` of the depth
    experiment.
    """

    steps: int = 0
    points: int = 20
    seeds: int = 1
    eval_examples: int = 10_000
    timing_rounds: int = 20
    depths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reported:
    """Figures of the paper, taken from secondary sources.

    `r_f` and `r_b`: a step divided by the bare forward pass; `t_ratio`: the time to backprop's best
    loss divided by backprop's time, for each of the paper's rates.
    """

    r_f: float | None = None
    r_b: float | None = None
    t_ratio: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    **Fields:** `subject`: the function to minimise, or how to build the network (its argument says
    whether reverse mode is checkpointed), None for the depth experiment; `paper_rates`: the paper's
    learning rates; `in_scan`: whether the steps run inside one `lax.scan` (see `Trainer`).
    """

    name: str
    title: str
    subject: models.Surface | Callable[[bool], models.Network] | None
    paper_rates: tuple[float, ...]
    reported: Reported
    quick: Budget
    full: Budget
    in_scan: bool = True
    source: str = "arXiv 2202.08587"

    def budget(self, full: bool) -> Budget:
        """Returns the budget of the full or of the quick run."""
        return self.full if full else self.quick


_SURFACE = Budget(steps=1000, points=10, seeds=5, timing_rounds=10)

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "beale",
            "Beale function",
            models.BEALE,
            (0.01,),
            Reported(),
            quick=_SURFACE,
            full=Budget(steps=1000, points=10, seeds=10, timing_rounds=10),
        ),
        Experiment(
            "rosenbrock",
            "Rosenbrock function",
            models.ROSENBROCK,
            (5e-4,),
            Reported(),
            quick=Budget(steps=2000, points=10, seeds=5, timing_rounds=10),
            full=Budget(steps=25_000, points=50, seeds=10, timing_rounds=10),
        ),
        Experiment(
            "logreg",
            "Logistic regression",
            models.logreg,
            (1e-4,),
            Reported(2.435, 4.389, (0.553,)),
            quick=Budget(steps=2000, points=20, seeds=3, timing_rounds=10),
            full=Budget(steps=25_000, points=50, seeds=3, timing_rounds=60),
        ),
        Experiment(
            "mlp",
            "Multilayer perceptron 784-1024-1024-10",
            models.mlp,
            (2e-4, 2e-5),
            Reported(2.468, 4.165, (0.211, 0.40)),
            quick=Budget(steps=240, points=8, seeds=2, timing_rounds=5),
            full=Budget(steps=3000, points=20, seeds=3, timing_rounds=40),
        ),
        Experiment(
            "cnn",
            "Convolutional network",
            models.cnn,
            (2e-4,),
            Reported(1.434, 2.211, (0.514,)),
            quick=Budget(steps=32, points=4, seeds=1, eval_examples=200, timing_rounds=3),
            full=Budget(steps=300, points=10, seeds=3, eval_examples=1000, timing_rounds=20),
            in_scan=False,
        ),
        Experiment(
            "depth",
            "Cost against depth, 1 to 100 layers of width 1024",
            None,
            (),
            Reported(
                note="R_f 3 to 4, R_b 4 to 5; R_f/R_b below 0.6 to 10 layers, above 0.8 at 100"
            ),
            quick=Budget(timing_rounds=2, depths=(1, 10, 100)),
            full=Budget(timing_rounds=9, depths=(1, 2, 5, 10, 20, 50, 100)),
        ),
    )
}


@dataclass(frozen=True)
class Setting:
    """A learning rate and where it comes from: a rate of the paper, or `tuned` by our search."""

    name: str
    learning_rate: float | None = field(default=None)


def settings(experiment: Experiment) -> list[Setting]:
    """Returns the settings of every method. The rate of `tuned` comes from the search."""
    paper = [
        Setting("paper" if i == 0 else f"paper-{rate:g}", rate)
        for i, rate in enumerate(experiment.paper_rates)
    ]
    return [*paper, Setting("tuned")]


def reported_text(experiment: Experiment) -> str:
    """Formats what the paper reports, on one line."""
    r = experiment.reported
    ratios = ", ".join(f"{t:g}" for t in r.t_ratio)
    figures = [
        f"R_f {r.r_f:g}" if r.r_f else "",
        f"R_b {r.r_b:g}" if r.r_b else "",
        f"T {ratios}" if ratios else "",
    ]
    return "; ".join(filter(None, [", ".join(filter(None, figures)), r.note]))


def describe(
    experiment: Experiment, full: bool, seeds: int | None, data: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the configuration that decides the numbers, for the manifest."""
    budget = experiment.budget(full)
    return {
        "experiment": experiment.name,
        "data": data if callable(experiment.subject) else None,
        "budget": {**vars(budget), "depths": list(budget.depths), "seeds": seeds or budget.seeds},
        "paper_rates": list(experiment.paper_rates),
        "methods": {name: repr(estimator) for name, estimator in METHODS.items()},
        "optimizer": f"SGD, rate eta_0 exp(-{DECAY:g} t)",
        "batch_size": BATCH_SIZE if not isinstance(experiment.subject, models.Surface) else None,
    }
