"""`prograde compare`: estimators beside each other on one model: cost, memory, bias, variance, and what each reaches.

Every estimator gets the same: the same batches and starts, the same optimizer, the same number of trials for a learning rate
of its own, the same steps.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import prograde as pg
from prograde.lab import costs, models, records
from prograde.lab.data import BATCH_SIZE, DataError, Dataset
from prograde.lab.display import Display
from prograde.lab.experiments import DECAY, Budget, Experiment, Reported
from prograde.lab.train import OPTIMIZERS, SEARCH_GRID, Run, Trainer, search, train

ESTIMATORS: dict[str, pg.Estimator] = {
    "backprop": pg.Backprop(),
    "checkpointed": pg.CheckpointedBackprop(),
    "weight": pg.WeightPerturbation(pg.LowRank(rank=1)),
    "weight-16": pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=16),
    "projection-16": pg.WeightPerturbation(
        pg.LowRank(rank=1), num_tangents=16, combine="projection"
    ),
    "weight-16-groups-16": pg.WeightPerturbation(
        pg.LowRank(rank=1), num_tangents=16, num_groups=16
    ),
    "groups-8": pg.WeightPerturbation(pg.LowRank(rank=1), num_groups=8),
    "dense": pg.WeightPerturbation(pg.Normal()),
    "momentum": pg.Guided("momentum"),
    "scaled-rows": pg.Scaled(scales=models.InputRMS()),
    "scaled-gradient": pg.Scaled(scales="gradient"),
    "scaled-curvature": pg.Scaled(scales="curvature"),
    "preconditioned": pg.Scaled(scales="curvature", precondition=True),
    "preconditioned-one": pg.Scaled(scales="curvature", precondition=True, limit=1.0),
    "activity": pg.ActivityPerturbation(head="exact", scale="rms"),
    "activity-4": pg.ActivityPerturbation(num_tangents=4, head="exact", scale="rms"),
    "activity-16": pg.ActivityPerturbation(num_tangents=16, head="exact", scale="rms"),
    "local": pg.LocalLosses(head="exact", scale="rms"),
    "local-4": pg.LocalLosses(num_tangents=4, head="exact", scale="rms"),
    "local-backprop": pg.Backprop(),
    "feedback": pg.LearnedFeedback(every=8),
    "feedback-tail": pg.LearnedFeedback(rate=0.5, every=8, tail=2),
    "feedback-unbiased": pg.LearnedFeedback(use="control_variate"),
    "difference": pg.CentralDifference(pg.LowRank(rank=1)),
}
DEFAULT = ("backprop", "checkpointed", "weight", "weight-16", "activity", "feedback")
# follow the sum of the network's local losses, and not its loss at the end
LOCAL = ("local", "local-4", "local-backprop")
# the same gradient at another cost: measured, but not searched and trained a second time
SAME_GRADIENT = {"checkpointed": "backprop"}

# what need not tell examples apart gets the faster network
_MERGED = (
    pg.Backprop
    | pg.CheckpointedBackprop
    | pg.WeightPerturbation
    | pg.CentralDifference
    | pg.Guided
    | pg.Scaled
)

DEFAULT_MINUTES = 2.5
POINTS = 12  # of a curve
ROUNDS = 15  # in which every step is timed
TRIALS = len(SEARCH_GRID) + 2
JUDGED = 4  # of the eight parts of a trial: a rate that is good at one moment and bad at the next is not good
LEAST_ESTIMATES = 8  # where nothing is random, and the least that `diagnose` takes
EVAL_EXAMPLES = 2000
SCHEDULES = {  # those of `train`, in words
    "exp": f"rate eta_0 exp(-{DECAY:g} t)",
    "cosine": "rate eta_0 (1 + cos(pi t / T)) / 2 over the T steps of a run",
}
_LEARNING_STEPS = 200  # for an estimator that learns, before its bias is measured
_DIAGNOSIS_SEED = 2_000_000  # apart from those of the runs and of the search
_RESERVED_SECONDS = (
    8  # of the minutes, for the report and for what the first step of each run takes
)


@dataclass(frozen=True)
class Model:
    """What can be trained: `visit` is how many steps of it are timed together, `estimates` how many gradients are drawn.

    `build(merged)`: whether examples may be merged with other axes, for estimators that do not look at them one by one.
    """

    title: str
    build: Callable[[bool], models.Network]
    visit: int
    estimates: int
    local: bool = False  # whether it has local losses


MODELS = {
    "mlp": Model("MLP 784-1024-1024-10", lambda merged: models.mlp(), visit=10, estimates=100),
    "cnn": Model("the paper's CNN", lambda merged: models.cnn(), visit=1, estimates=24),
    "mixer": Model("MLP-mixer, 4 blocks of width 64", models.mixer, visit=4, estimates=100),
    "transformer": Model(
        "vision transformer, 4 blocks of width 64", models.transformer, visit=4, estimates=100
    ),
    "local-mixer-s": Model(
        "LocalMixer S/1/1", models.local_mixer, visit=10, estimates=100, local=True
    ),
    "local-mixer-m": Model(
        "LocalMixer M/1/16",
        lambda merged: models.local_mixer(merged, width=512, groups=16),
        visit=10,
        estimates=100,
        local=True,
    ),
}


@dataclass(frozen=True)
class Entry:
    """An estimator with an optimizer: what has a learning rate of its own."""

    estimator: str
    optimizer: str

    @property
    def name(self) -> str:
        """The name of its records."""
        return f"{self.estimator}-{self.optimizer}"


@dataclass(frozen=True)
class Plan:
    """What is compared, and for how long: `steps` of each run and trial, or as many as fit into `minutes` in all.

    `rates`, one for all or one for each estimator, take the place of the search.

    **Errors:** `ValueError` for a name that is not known, or numbers that make no sense.
    """

    model: str = "mlp"
    estimators: tuple[str, ...] = DEFAULT
    optimizers: tuple[str, ...] = ("sgd",)
    minutes: float | None = None
    steps: int | None = None
    seeds: int = 3
    estimates: int | None = None
    batch_size: int = BATCH_SIZE
    schedule: str = "exp"
    eval_examples: int = EVAL_EXAMPLES
    rates: tuple[float, ...] = ()

    def __post_init__(self):
        for name, given, known in (
            ("--model", (self.model,), MODELS),
            ("--estimators", self.estimators, ESTIMATORS),
            ("--optimizers", self.optimizers, OPTIMIZERS),
            ("--schedule", (self.schedule,), SCHEDULES),
        ):
            if unknown := [x for x in given if x not in known]:
                raise ValueError(
                    f"{name} {' '.join(unknown)}: not known. Valid names: {', '.join(known)}."
                )
            if not given or len(set(given)) < len(given):
                raise ValueError(
                    f"{name} {' '.join(given)}: at least one name is needed, each once."
                )
        if not MODELS[self.model].local and (local := [x for x in self.estimators if x in LOCAL]):
            models_with = ", ".join(name for name, model in MODELS.items() if model.local)
            raise ValueError(
                f"--estimators {' '.join(local)}: {self.model} has no local losses. Models with: {models_with}."
            )
        if "scaled-rows" in self.estimators and self.model != "mlp":
            raise ValueError(
                f"--estimators scaled-rows --model {self.model}: it knows the layers of mlp only."
            )
        if self.steps is not None and self.minutes is not None:
            raise ValueError(
                f"--steps {self.steps} and --minutes {self.minutes:g}: one of them decides the length."
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"--minutes {self.minutes:g}: more than 0 are needed.")
        for name, value, least in (
            ("--steps", self.steps, 1),
            ("--seeds", self.seeds, 1),
            ("--estimates", self.estimates, LEAST_ESTIMATES),
            ("--batch-size", self.batch_size, 1),
            ("--eval-examples", self.eval_examples, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} {value}: at least {least} needed.")
        given = f"--rates {' '.join(f'{rate:g}' for rate in self.rates)}"
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"{given}: more than 0 are needed.")
        if len(self.rates) not in (0, 1, len(self.estimators)):
            raise ValueError(
                f"{given}: one for all is needed, or one for each of the {len(self.estimators)} estimators."
            )

    @staticmethod
    def every_estimator(model: str) -> tuple[str, ...]:
        """All names that apply to a model."""
        return tuple(
            name
            for name in ESTIMATORS
            if name not in LOCAL or model not in MODELS or MODELS[model].local
        )

    @property
    def entries(self) -> list[Entry]:
        """What is measured."""
        return [
            Entry(estimator, optimizer)
            for optimizer in self.optimizers
            for estimator in self.estimators
        ]

    @property
    def trained(self) -> list[Entry]:
        """What is searched for a rate and trained."""
        return [e for e in self.entries if SAME_GRADIENT.get(e.estimator) not in self.estimators]

    @property
    def trials(self) -> int:
        """How many the search of a rate has."""
        return 0 if self.rates else TRIALS

    def rate(self, entry: Entry) -> float:
        """The rate that was given for it."""
        return self.rates[self.estimators.index(entry.estimator) if len(self.rates) > 1 else 0]

    def num_estimates(self, estimator: str) -> int:
        """How many gradients are drawn for the diagnosis."""
        if isinstance(ESTIMATORS[estimator], pg.Backprop | pg.CheckpointedBackprop):
            return LEAST_ESTIMATES
        return self.estimates or MODELS[self.model].estimates

    def config(self, data: Dataset) -> dict[str, Any]:
        """The configuration that decides the numbers, as it stands in the manifest."""
        minutes = DEFAULT_MINUTES if self.steps is None and self.minutes is None else self.minutes
        return {
            "experiment": "compare",
            "model": self.model,
            "data": {"name": data.name, "sha256": data.fingerprint()},
            "estimators": {name: repr(ESTIMATORS[name]) for name in self.estimators},
            "estimates": {name: self.num_estimates(name) for name in self.estimators},
            "optimizers": list(self.optimizers),
            "schedule": SCHEDULES[self.schedule],
            "steps": self.steps,
            "minutes": minutes,
            "seeds": self.seeds,
            "trials": self.trials,
            "rates": list(self.rates),
            "judged": f"last {JUDGED} of 8 parts",
            "points": POINTS,
            "eval_examples": self.eval_examples,
            "batch_size": self.batch_size,
        }


def run(plan: Plan, data: Dataset, out: Path, resume: bool, display: Display) -> None:
    """Measures, searches and trains into `out`; what is recorded there already is not done again."""
    begin = time.monotonic()
    if plan.batch_size > len(data.train[1]):
        raise DataError(
            f"--batch-size {plan.batch_size}: {data.name} has {len(data.train[1])} examples to train on. Pass a smaller one."
        )
    records.claim({out: plan.config(data)}, resume)
    networks = {merged: MODELS[plan.model].build(merged) for merged in (False, True)}

    def trainer(estimator: str | None, optimizer: str) -> Trainer:
        found = None if estimator is None else ESTIMATORS[estimator]
        network = networks[isinstance(found, _MERGED | None)]
        # steps are dispatched one by one, for reverse mode of convolutions is slow inside a loop
        experiment = Experiment(
            plan.model,
            "",
            lambda checkpointed: network,
            (),
            Reported(),
            Budget(),
            Budget(),
            in_scan=False,
        )
        losses = "local" if estimator in LOCAL else "each"
        return Trainer(
            experiment,
            found,
            data,
            optimizer=optimizer,
            losses=losses,
            batch_size=plan.batch_size,
            schedule=plan.schedule,
        )

    trainers = {e.name: trainer(e.estimator, e.optimizer) for e in plan.entries}
    _measure_costs(plan, {"bare": trainer(None, plan.optimizers[0])} | trainers, out, display)
    seconds = {
        name: cost["seconds"]["median"]
        for name, cost in records.read_json(out / "costs.json").items()
    }
    _diagnose(plan, trainers, seconds, out, display)
    budget = Budget(
        _steps(plan, trainers, seconds, begin, out), POINTS, plan.seeds, plan.eval_examples
    )
    for each in trainers.values():
        each.length = budget.steps
    if plan.rates:
        rates = {e.name: plan.rate(e) for e in plan.trained}
    else:
        rates = _search(plan, trainers, seconds, budget, out, display)
    _train(plan, trainers, seconds, rates, budget, out, display)


def _measure_costs(plan: Plan, trainers: dict[str, Trainer], out: Path, display: Display) -> None:
    if (path := out / "costs.json").exists():
        return
    with display.stage(f"{plan.model}: time a step", ROUNDS + 1):
        measured = costs.step_seconds(
            trainers,
            ROUNDS,
            lambda i: display.advance(1, f"round {i} of {ROUNDS}" if i else "compiled"),
            MODELS[plan.model].visit,
        )
    with display.stage(f"{plan.model}: memory of a step", len(trainers)):
        for name, trainer in trainers.items():
            compiled, _, _ = costs.compiled_step(trainer)
            measured[name]["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            display.advance(1, f"{name}, {measured[name]['temp_bytes'] / 2**20:.1f} MiB")
    records.write_json(path, measured)


def _diagnose(
    plan: Plan, trainers: dict[str, Trainer], seconds: dict[str, float], out: Path, display: Display
) -> None:
    """Bias and variance at the start of the first seed, on its first batch."""
    names = {name: Entry(name, plan.optimizers[0]).name for name in plan.estimators}
    # an estimate, and a second derivative, which takes about four forward passes
    work = {
        e: plan.num_estimates(e) * (seconds[name] + 4 * seconds["bare"])
        for e, name in names.items()
    }
    with display.stage(f"{plan.model}: bias and variance", sum(work.values())):
        for estimator, name in names.items():
            path = out / "diagnosis" / f"{estimator}.json"
            if not path.exists():
                trainer = trainers[name]
                carry = trainer.start(0)
                if carry[3] is not None:  # it learns: at rate 0, so that the parameters stay
                    carry, _, _ = trainer.steps(carry, 0.0, 0, trainer.rows(0, 0, _LEARNING_STEPS))
                found = pg.diagnostics.diagnose(
                    trainer.loss,
                    ESTIMATORS[estimator],
                    jax.random.key(_DIAGNOSIS_SEED),
                    carry[0],
                    *(jnp.asarray(part[trainer.rows(0, 0, 1)[0]]) for part in trainer.data.train),
                    num_estimates=plan.num_estimates(estimator),
                    state=carry[3],
                )
                records.write_json(
                    path, dataclasses.asdict(found) | {"estimator": repr(found.estimator)}
                )
            display.advance(
                work[estimator], f"{estimator}, {plan.num_estimates(estimator)} estimates"
            )


def _steps(
    plan: Plan, trainers: dict[str, Trainer], seconds: dict[str, float], begin: float, out: Path
) -> int:
    """How many steps a run has: as given, or as many as fit into what is left of the minutes. Decided once, and recorded."""
    path = out / "length.json"
    if path.exists():
        return records.read_json(path)["steps"]
    steps, evaluations = plan.steps, 0.0
    if steps is None:
        evaluations = len(plan.trained) * _evaluation_seconds(plan, next(iter(trainers.values())))
        spent = time.monotonic() - begin + _RESERVED_SECONDS + evaluations
        left = 60 * (plan.minutes or DEFAULT_MINUTES) - spent
        a_step = sum(seconds[e.name] for e in plan.trained) * (plan.trials + plan.seeds)
        steps = POINTS * max(1, int(left / a_step / POINTS))
    records.write_json(path, {"steps": steps, "evaluation_seconds": evaluations})
    return steps


def _evaluation_seconds(plan: Plan, trainer: Trainer) -> float:
    """Time that the evaluations of an entry take: of trials on the validation part, of runs at each point of their curves."""
    params = trainer.start(0)[0]

    def measure(part: Any) -> float:
        trainer.evaluate(params, part, plan.eval_examples)  # compiles
        begin = time.monotonic()
        trainer.evaluate(params, part, plan.eval_examples)
        return time.monotonic() - begin

    point = measure(trainer.data.test) + measure(trainer.data.train)
    return (
        plan.trials * JUDGED * measure(trainer.data.validation) + plan.seeds * (POINTS + 1) * point
    )


def _search(
    plan: Plan,
    trainers: dict[str, Trainer],
    seconds: dict[str, float],
    budget: Budget,
    out: Path,
    display: Display,
) -> dict[str, float]:
    work = {e.name: budget.steps * seconds[e.name] for e in plan.trained}

    def on_trial(name: str, number: int, trial: dict[str, Any]) -> None:
        loss = "diverged" if trial["loss"] is None else f"loss {trial['loss']:.4g}"
        display.advance(
            work[name],
            f"{name}, trial {number} of {TRIALS}, rate {trial['learning_rate']:.2g}, {loss}",
        )

    rates, done = {}, 0.0
    with display.stage(
        f"{plan.model}: learning rates, {budget.steps} steps a trial", TRIALS * sum(work.values())
    ):
        for name in work:
            rates[name] = search(trainers[name], name, budget, out, on_trial, last=JUDGED)
            done += TRIALS * work[name]
            display.reach(done)
    return rates


def _train(
    plan: Plan,
    trainers: dict[str, Trainer],
    seconds: dict[str, float],
    rates: dict[str, float],
    budget: Budget,
    out: Path,
    display: Display,
) -> None:
    """All entries of a seed before the next seed, so that what is stopped early compares all the same."""
    runs = [
        (e.name, Run(e.estimator, e.optimizer, rates[e.name], seed, budget.steps))
        for seed in range(plan.seeds)
        for e in plan.trained
    ]
    names = {run.name: name for name, run in runs}

    def on_point(run: Run, point: dict[str, Any]) -> None:
        reached = "diverged" if "test_loss" not in point else f"loss {point['test_loss']:.3g}"
        accuracy = f", {point['test_accuracy']:.1%}" if "test_accuracy" in point else ""
        work = math.ceil(run.steps / POINTS) * seconds[names[run.name]]
        display.advance(work, f"{point['step']}/{run.steps}, {reached}{accuracy}, {run.name}")

    total = sum(run.steps * seconds[name] for name, run in runs)
    with display.stage(
        f"{plan.model}: training, {plan.seeds} seeds of {budget.steps} steps", total
    ):
        done = 0.0
        for name, run in runs:
            train(trainers[name], run, budget, out, on_point)
            done += run.steps * seconds[name]
            display.reach(done)
