"""The one training loop, with the estimator as a value, and the search of learning rates on top of it."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

import prograde as pg
from prograde.lab import records
from prograde.lab.data import BATCH_SIZE, Dataset
from prograde.lab.experiments import DECAY, Budget, Experiment
from prograde.lab.models import Network, Surface

SEARCH_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0)
_EVAL_CHUNK = 500
_TRAJECTORY_LENGTH = 500  # steps of a trajectory that are recorded, at most
_SEARCH_SEED = 1_000_000  # seeds of the search are apart from those of the runs


@dataclass(frozen=True)
class Run:
    """One training run: everything that its numbers depend on, given the configuration."""

    method: str
    setting: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """The name of its record."""
        return f"{self.method}-{self.setting}-seed{self.seed}"


OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": optax.adam,
}

Losses = Literal["mean", "each", "local"]

# the rate at step t of a run of `length` steps, over that at its start
SCHEDULES: dict[str, Callable[[Any, Any], Any]] = {
    "exp": lambda t, length: jnp.exp(-DECAY * t),
    "cosine": lambda t, length: 0.5 * (1 + jnp.cos(math.pi * jnp.minimum(t / length, 1))),
}

Carry = tuple[
    PyTree, PyTree, Array, PyTree
]  # parameters, state of the optimizer, step, state of the estimator


class Rate(NamedTuple):
    """The learning rate of the first step, and the steps of the run, over which it may fall."""

    first: float | Array
    length: float | Array


class Trainer:
    """Trains one subject by one estimator; compiled once, for all rates and seeds.

    Data order and keys derive from seed and step, so that a resumed run repeats the bits of an uninterrupted one.
    `estimator=None` evaluates the loss on the same batches and changes nothing: the bare forward pass. `losses` is what estimators
    are handed: the mean loss, that of each example, or the network's many local losses; on a `mesh` its devices share each batch; `optimizer` is a name in `OPTIMIZERS`,
    `schedule` one in `SCHEDULES`. `length`, the steps of a run, may be set any time before training: only some schedules look at it.
    """

    def __init__(
        self,
        experiment: Experiment,
        estimator: pg.Estimator | None,
        data: Dataset | None,
        checkpointed: bool = False,
        optimizer: str = "sgd",
        losses: Losses = "mean",
        batch_size: int = BATCH_SIZE,
        schedule: str = "exp",
        mesh: Mesh | None = None,
    ):
        self.surface = experiment.subject if isinstance(experiment.subject, Surface) else None
        self.in_scan = experiment.in_scan
        if self.surface is not None:
            self.loss, self.train_data = self.surface.fun, ()
        else:
            assert callable(experiment.subject)
            assert data is not None
            self.network = experiment.subject(checkpointed)
            self.loss = self._losses(losses, estimator)
            self.data = data
            self.train_data = jax.tree.map(jnp.asarray, data.train)
        self.mesh = mesh
        self._estimator, self.update = estimator, None
        if mesh is not None and estimator is not None:
            self._estimator = pg.distributed.Distributed(estimator, mesh, data=mesh.axis_names)
            if isinstance(estimator, pg.SeededEstimator):
                self.update = pg.replay.Update(estimator, OPTIMIZERS[optimizer](1.0))
        self._derivatives = jax.jit(self._derivatives_of)
        self._batch_size = batch_size
        self._optimizer = OPTIMIZERS[optimizer]
        self._schedule = SCHEDULES[schedule]
        self.length = 1
        self._jitted = jax.jit(self._scan if self.in_scan else self._step, donate_argnums=0)

    def _losses(self, which: Losses, estimator: pg.Estimator | None) -> Callable[..., Any]:
        if which != "local":
            return self.network.losses if which == "each" else self.network.loss
        if self.network.local_losses is None:
            raise ValueError(
                "this network has no local losses, which the estimator needs. Take the local mixer."
            )
        local = self.network.local_losses
        return local if isinstance(estimator, pg.LocalLosses) else pg.total_loss(local)

    def start(self, seed: int) -> Carry:
        """The state before the first step."""
        key, _ = self._keys(seed)
        params = (
            jax.jit(self.network.init)(key)
            if self.surface is None
            else jnp.asarray(self.surface.start)
        )
        estimator_state = None
        if self._estimator is not None:
            batch = jax.tree.map(lambda x: x[self.rows(seed, 0, 1)[0]], self.train_data)
            estimator_state = self._estimator.init(self.loss, params, *batch)
        return (
            params,
            self._scheduled(Rate(0.0, 1.0)).init(params),
            jnp.zeros((), jnp.int32),
            estimator_state,
        )

    def steps(
        self, carry: Carry, learning_rate: float, seed: int, rows: Int[np.ndarray, "steps batch"]
    ) -> tuple[Carry, Float[Array, " steps"], PyTree]:
        """As many steps as there are rows: the new state, the loss of each step, the parameters where they are few."""
        _, key = self._keys(seed)
        rate = Rate(jnp.float32(learning_rate), jnp.float32(self.length))
        if self.in_scan:
            return self._jitted(carry, rate, key, self.train_data, jnp.asarray(rows))
        losses = []
        for batch in jnp.asarray(rows):  # dispatched ahead: nothing waits for the result of a step
            carry, (loss, _) = self._jitted(carry, rate, key, self.train_data, batch)
            losses.append(loss)
        return carry, jnp.stack(losses), None

    def logged_steps(
        self,
        state: pg.replay.TrainState,
        log: pg.replay.ReplayLog,
        learning_rate: float,
        seed: int,
        first: int,
        rows: Int[np.ndarray, "steps batch"],
    ) -> tuple[pg.replay.TrainState, Float[np.ndarray, " steps"]]:
        """The steps from `first` on, each in two programs with the log between them: (state, losses).

        Of a step that the log holds, only the second runs. A resumed run is one that begins with such steps.
        """
        assert self.update is not None
        values, seed = [], self._tangent_seed(seed)
        for step, batch in enumerate(rows, first):
            rate = float(np.float32(learning_rate * float(self._schedule(step, self.length))))
            if step < len(log.records):
                value, derivatives = (
                    log.records["value"][step],
                    jnp.asarray(log.records["derivatives"][step]),
                )
            else:
                key = self.update.key(seed, step)
                value, derivatives = self._derivatives(state.params, key, self.train_data, batch)
                log.append(step, seed, rate, value, derivatives)
            values.append(value)
            state = self.update(state, step, seed, rate, derivatives)
        log.flush()
        return state, np.asarray([np.asarray(value) for value in values])

    def warm_up(self, seed: int) -> None:
        """Compiles the programs of `logged_steps`."""
        assert self.update is not None
        state = self.update.init(self.start(seed)[0])
        rows, seed = jnp.asarray(self.rows(seed, 0, 1)[0]), self._tangent_seed(seed)
        _, derivatives = self._derivatives(
            state.params, self.update.key(seed, 0), self.train_data, rows
        )
        jax.block_until_ready(self.update(state, 0, seed, 0.0, derivatives))

    def _derivatives_of(
        self, params: PyTree, key: Array, train_data: PyTree, rows: Array
    ) -> tuple[Array, Array]:
        assert isinstance(self._estimator, pg.distributed.Distributed)
        batch = jax.tree.map(lambda x: x[rows], train_data)
        value, _, derivatives = self._estimator.derivatives(self.loss, key, params, *batch)
        return value, derivatives

    def rows(self, seed: int, first: int, count: int) -> Int[np.ndarray, "count batch"]:
        """Which examples steps first, first + 1, ... see: every epoch its own permutation, what does not fill a batch left out."""
        if self.surface is not None:
            return np.zeros((count, 0), np.int32)
        num_examples, size = len(self.data.train[1]), self._batch_size
        per_epoch = num_examples // size
        return np.stack(
            [
                _epoch_order(seed, t // per_epoch, num_examples, size)[t % per_epoch]
                for t in range(first, first + count)
            ]
        )

    def evaluate(
        self, params: PyTree, part: tuple[np.ndarray, np.ndarray], limit: int
    ) -> tuple[float, float]:
        """Mean loss and accuracy on the first `limit` examples of a part of the data."""
        images, labels = part[0][:limit], part[1][:limit]
        sums = np.zeros(2)
        for i in range(0, len(labels), _EVAL_CHUNK):
            losses, hits = self._evaluate(
                params, images[i : i + _EVAL_CHUNK], labels[i : i + _EVAL_CHUNK]
            )
            sums += [np.asarray(losses, np.float64).sum(), np.asarray(hits).sum()]
        return tuple((sums / len(labels)).tolist())

    @property
    def _evaluate(self) -> Callable:
        return _evaluator(self.network)

    @staticmethod
    def _keys(seed: int) -> tuple[Array, Array]:
        key_init, key_tangents = jax.random.split(jax.random.key(seed))
        return key_init, key_tangents

    def _tangent_seed(self, seed: int) -> int:
        """The key of the tangents as a seed of 64 bits, for a log."""
        high, low = np.asarray(jax.random.key_data(self._keys(seed)[1])).tolist()
        return high << 32 | low

    def _scan(self, carry, rate, key, train_data, rows):
        carry, (losses, visited) = lax.scan(
            lambda c, r: self._step(c, rate, key, train_data, r), carry, rows
        )
        return carry, losses, visited

    def _step(self, carry, rate, key, train_data, rows):
        params, opt_state, step, estimator_state = carry
        batch = jax.tree.map(lambda x: x[rows], train_data)
        if self._estimator is None:
            return (params, opt_state, step + 1, estimator_state), (
                jnp.mean(self.loss(params, *batch)),
                None,
            )
        found = self._estimator.estimate(
            self.loss, jax.random.fold_in(key, step), estimator_state, params, *batch
        )
        updates, opt_state = self._scheduled(rate).update(found.grads, opt_state, params)
        visited = params if self.surface is not None else None
        return (optax.apply_updates(params, updates), opt_state, step + 1, found.state), (
            found.value,
            visited,
        )

    def _scheduled(self, rate: Rate) -> optax.GradientTransformation:
        return self._optimizer(lambda t: rate.first * self._schedule(t, rate.length))


@functools.lru_cache(maxsize=8)
def _evaluator(network: Network) -> Callable:
    """Compiled once for all trainers of one network."""
    return jax.jit(network.loss_and_hits)


@functools.lru_cache(maxsize=4)
def _epoch_order(
    seed: int, epoch: int, num_examples: int, size: int
) -> Int[np.ndarray, "batches batch"]:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_examples)
    return order[: num_examples // size * size].reshape(-1, size).astype(np.int32)


def train(
    trainer: Trainer,
    run: Run,
    budget: Budget,
    directory: Path,
    on_point: Callable[[Run, dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Runs, or resumes, or just reads a finished run; returns its record.

    A run is recorded and can be resumed at every point of its curve. `seconds` counts the steps alone: compilation and
    evaluation are left out. A loss that is not finite ends the run, and the record says at which step.
    """
    record_path, state_path = (
        directory / "runs" / f"{run.name}.jsonl",
        directory / "states" / f"{run.name}.npz",
    )
    record: list[dict[str, Any]] = [{"kind": "run", **vars(run)}]
    if record_path.exists():
        record = records.read_lines(record_path)
        if record[0] != {"kind": "run", **vars(run)}:
            raise records.RecordError(f"{record_path} is the record of another run: {record[0]}.")
        if record[-1]["kind"] == "end":
            state_path.unlink(missing_ok=True)
            return record
    carry: Any = trainer.start(run.seed)
    seconds = 0.0
    log = None
    if trainer.update is not None:
        log = _log(trainer.update, run, carry[0], directory / "logs" / f"{run.name}.log")
        carry = trainer.update.init(carry[0])
    elif state_path.exists():
        saved = records.load_state(state_path, {"carry": carry, "seconds": np.zeros(())})
        carry, seconds = jax.tree.map(jnp.asarray, saved["carry"]), float(saved["seconds"])
    step = 0 if log is not None else int(carry[2])
    if step == 0:
        record = [
            record[0],
            {"kind": "point", "step": 0, "seconds": 0.0, **_measure(trainer, carry[0], budget)},
        ]
    else:  # the state is saved after the record, so the record may be one point ahead of it
        record = [line for line in record if line["kind"] == "run" or line["step"] <= step]
    interval = math.ceil(run.steps / budget.points)
    _warm_up(trainer, run, {min(interval, run.steps), (run.steps - 1) % interval + 1})
    status = "completed"
    with contextlib.nullcontext() if log is None else log:
        while step < run.steps and status == "completed":
            rows = trainer.rows(run.seed, step, min(interval, run.steps - step))
            begin = time.perf_counter()
            if log is None:
                carry, losses, visited = trainer.steps(carry, run.learning_rate, run.seed, rows)
            else:
                carry, losses = trainer.logged_steps(
                    carry, log, run.learning_rate, run.seed, step, rows
                )
                visited = None
            losses = np.asarray(losses)  # waits for the steps
            seconds += time.perf_counter() - begin
            if trainer.mesh is not None:
                pg.distributed.check_replicas(carry[0], trainer.mesh, step + len(rows))
            finite = np.isfinite(losses)
            point = {
                "kind": "point",
                "step": step + len(rows),
                "seconds": seconds,
                "batch_loss": float(losses.mean()),
            }
            if finite.all():
                point |= _measure(trainer, carry[0], budget)
            if not finite.all():
                status, step = "diverged", step + int(np.argmin(finite))
            elif not math.isfinite(
                point["test_loss"]
            ):  # the last step left parameters that are not
                status, step = "diverged", step + len(rows)
            else:
                step += len(rows)
                if visited is not None:
                    every = math.ceil(run.steps / _TRAJECTORY_LENGTH)
                    kept = slice(every - 1, None, every)
                    point |= {
                        "every": every,
                        "losses": losses[kept].tolist(),
                        "visited": np.asarray(visited)[kept].tolist(),
                    }
                record.append(point)
            if status == "diverged" or step == run.steps:
                record.append({"kind": "end", "status": status, "step": step, "seconds": seconds})
            records.write_lines(record_path, record)
            if record[-1]["kind"] == "end":
                state_path.unlink(missing_ok=True)
            elif (
                trainer.mesh is None
            ):  # the log is what a shared run goes on from, and without one it begins again
                records.save_state(state_path, {"carry": carry, "seconds": np.asarray(seconds)})
            on_point(run, record[-1] if status == "diverged" else point)
    return record


def _log(update: pg.replay.Update, run: Run, base: PyTree, path: Path) -> pg.replay.ReplayLog:
    """The log of a run, begun or continued."""
    if not path.exists():
        return pg.replay.ReplayLog.create(path, base, update, vars(run))
    log = pg.replay.ReplayLog.open(path, append=True)
    if log.header["config"] != vars(run) or log.header["base"] != pg.replay.fingerprint(base):
        log.close()
        raise records.RecordError(f"{path} is the log of another run: {log.header['config']}.")
    return log


def _warm_up(trainer: Trainer, run: Run, lengths: set[int]) -> None:
    """Compiles before the clock runs."""
    if trainer.update is not None:
        trainer.warm_up(run.seed)
        return
    for length in lengths if trainer.in_scan else {1}:
        jax.block_until_ready(
            trainer.steps(trainer.start(run.seed), 0.0, run.seed, trainer.rows(run.seed, 0, length))
        )


def _measure(trainer: Trainer, params: PyTree, budget: Budget) -> dict[str, float]:
    if trainer.surface is not None:
        return {"test_loss": float(trainer.surface.fun(params))}
    test_loss, test_accuracy = trainer.evaluate(params, trainer.data.test, budget.eval_examples)
    train_loss, train_accuracy = trainer.evaluate(params, trainer.data.train, budget.eval_examples)
    return {
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
    }


def search(
    trainer: Trainer,
    method: str,
    budget: Budget,
    directory: Path,
    on_trial: Callable[[str, int, dict[str, Any]], None],
    last: int = 1,
) -> float:
    """The learning rate of least loss after `budget.steps`, the length of a run: the same budget for every method.

    Shorter trials would choose rates that diverge later: a forward gradient goes wrong by chance, and late. A grid over five decades, then two more candidates half a decade to either side of its best. Networks are judged on
    the validation part, by one seed; test functions by the mean of five seeds. A trial that diverges loses.
    What counts is the mean loss after the `last` of the eight parts of a trial.
    """
    path = directory / "search" / f"{method}.json"
    found: dict[str, Any] = (
        records.read_json(path) if path.exists() else {"steps": budget.steps, "trials": []}
    )
    trials: list[dict[str, Any]] = found["trials"]

    def best() -> float:
        return min(trials, key=lambda trial: math.inf if trial["loss"] is None else trial["loss"])[
            "learning_rate"
        ]

    while len(trials) < len(SEARCH_GRID) + 2:
        if len(trials) < len(SEARCH_GRID):
            rate = SEARCH_GRID[len(trials)]
        else:
            centre = min(
                trials[: len(SEARCH_GRID)],
                key=lambda t: math.inf if t["loss"] is None else t["loss"],
            )["learning_rate"]
            rate = centre * 10 ** (-0.5 if len(trials) == len(SEARCH_GRID) else 0.5)
        trials.append({"learning_rate": rate, "loss": _trial(trainer, rate, budget, last)})
        records.write_json(path, {**found, "best": best()})
        on_trial(method, len(trials), trials[-1])
    return best()


def _trial(trainer: Trainer, learning_rate: float, budget: Budget, last: int) -> float | None:
    finals = []
    for seed in range(_SEARCH_SEED, _SEARCH_SEED + (5 if trainer.surface is not None else 1)):
        carry, found = trainer.start(seed), []
        chunk = math.ceil(budget.steps / 8)  # so that divergence ends a trial early
        parts = range(0, budget.steps, chunk)
        for first in parts:
            rows = trainer.rows(seed, first, min(chunk, budget.steps - first))
            carry, losses, _ = trainer.steps(carry, learning_rate, seed, rows)
            if not np.isfinite(np.asarray(losses)).all():
                found = [math.inf]
                break
            if first not in parts[-last:]:
                continue
            if trainer.surface is not None:
                found.append(float(trainer.surface.fun(carry[0])))
            else:
                found.append(
                    trainer.evaluate(carry[0], trainer.data.validation, budget.eval_examples)[0]
                )
        finals.append(float(np.mean(found)))
    mean = float(np.mean(finals))  # one seed that diverges loses the trial
    return mean if math.isfinite(mean) else None
