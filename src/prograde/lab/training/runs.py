"""Training runs in a store: recorded at every point of the curve, and resumed from there."""

import abc
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

import prograde as pg
from prograde.lab import store as files
from prograde.lab.store import RecordError, Store
from prograde.lab.training.logged import LoggedTrainer
from prograde.lab.training.loop import End, Progress, Task, follow
from prograde.lab.training.schedules import Rate
from prograde.lab.training.trainer import Trainer

_TRAJECTORY_LENGTH = 500  # maximum number of recorded steps of a trajectory

Measure = Callable[[PyTree], dict[str, float]]
"""Figures of parameters. `test_loss` is one of them."""


@dataclass(frozen=True)
class Run:
    """One training run: what its numbers depend on, in addition to the configuration."""

    method: str
    setting: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """The name of its record."""
        return f"{self.method}-{self.setting}-seed{self.seed}"

    @property
    def rate(self) -> Rate:
        """The learning rate, which a schedule may lower until the last step."""
        return Rate(self.learning_rate, self.steps)


def train(
    trainer: Trainer,
    run: Run,
    store: Store,
    points: int,
    measure: Measure,
    on_point: Callable[[Run, dict[str, Any]], None],
    mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
    """Starts or resumes a run, or reads a finished one; returns its record.

    The record has a line `run`, a line `point` for each point of the curve, and a line `end`, which
    says how the run ended, at which step, and why if it diverged.

    **Arguments:** `measure`: the figures of each point; `on_point`: called with each new point, or
    with the end of a run that diverged; `mesh`: the devices that share each batch. Their parameters
    are compared at each point. Such a run is resumed from its log. Without a log it starts again.
    """
    name, state_path = f"runs/{run.name}", store.path(f"states/{run.name}.npz")
    head = {"kind": "run", **vars(run)}
    old: list[dict[str, Any]] = []
    if name in store:
        old = store.read_lines(name)
        if old[0] != head:
            raise RecordError(f"{store.path(name)}.jsonl is the record of another run: {old[0]}.")
        if old[-1]["kind"] == "end":
            state_path.unlink(missing_ok=True)
            return old
    record: list[dict[str, Any]] = []
    progress = Progress()
    with contextlib.ExitStack() as closing:
        if isinstance(trainer, LoggedTrainer):
            log = _log(trainer, run, store.path(f"logs/{run.name}.log"))
            task = _LoggedSteps(trainer, run, measure, mesh, closing.enter_context(log))
        else:
            task = _SavedSteps(trainer, run, measure, mesh)
            if old and mesh is None and state_path.exists():
                progress = task.restore(state_path)
        # the state is saved after the record, which may therefore be a point ahead
        lines = [{k: v for k, v in line.items() if k != "kind"} for line in old[1:]]
        progress.points = [p for p in lines if p["step"] <= progress.step] if progress.step else []
        task.warm_up(points)

        def save(progress: Progress, end: End | None) -> None:
            if end is not None and isinstance(task, _LoggedSteps):
                task.log.finish(task.params)
            record[:] = [head, *({"kind": "point", **point} for point in progress.points)]
            if end is not None:
                why = {"cause": end.cause, "culprit": end.culprit}
                because = {name: said for name, said in why.items() if said is not None}
                record.append(
                    {"kind": "end", "status": end.status, "step": end.step, "seconds": end.seconds}
                    | because
                )
            store.write_lines(name, record)
            if end is not None:
                state_path.unlink(missing_ok=True)
            elif isinstance(task, _SavedSteps) and progress.step and mesh is None:
                task.save(state_path, progress)
            if progress.step or end is not None:
                diverged = end is not None and end.status == "diverged"
                on_point(run, record[-1] if diverged else progress.points[-1])

        follow(task, run.steps, points, progress, save)
    return record


class _Steps(Task, abc.ABC):
    """The steps of a run, and the figures of its points."""

    judged = "test_loss"
    trainer: Trainer

    def __init__(self, run: Run, measure: Measure, mesh: Mesh | None):
        self.run, self.mesh, self._measure = run, mesh, measure
        self._step, self._visited = 0, None

    @property
    @abc.abstractmethod
    def params(self) -> PyTree:
        """The current parameters."""

    @abc.abstractmethod
    def warm_up(self, points: int) -> None:
        """Compiles before times are taken."""

    @abc.abstractmethod
    def params_after(self, taken: int) -> PyTree:
        """Repeats the first `taken` steps since the last point; returns the parameters."""

    @abc.abstractmethod
    def batch(self, taken: int) -> tuple[Any, ...] | None:
        """The examples of the step after the first `taken`, or `None` if it was not taken."""

    def figures(self, losses: np.ndarray | None) -> dict[str, Any]:
        """The loss of the batches since the last point, the figures, and the path of the steps."""
        if self.mesh is not None and losses is not None:
            pg.distributed.check_replicas(self.params, self.mesh, self._step)
        found: dict[str, Any] = self._measure(self.params)
        if losses is None:
            return found
        found = {"batch_loss": float(losses.mean()), **found}
        if self._visited is not None:
            every = math.ceil(self.run.steps / _TRAJECTORY_LENGTH)
            kept = slice(every - 1, None, every)
            visited = np.asarray(self._visited)[kept].tolist()
            found |= {"every": every, "losses": losses[kept].tolist(), "visited": visited}
        return found

    def cause(self, taken: int) -> Literal["value", "gradient"]:
        """Distinguishes a loss that overflows from a gradient that is not finite."""
        leaves = jax.tree.leaves(self.params_after(taken))
        finite = all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in leaves)
        return "value" if finite else "gradient"

    def culprit(self, taken: int, cause: Literal["value", "gradient"] | None) -> str | None:
        """Runs the loss of the failing step equation by equation."""
        step = taken if cause == "value" else taken - 1
        batch = self.batch(step)
        if batch is None or self.mesh is not None:
            return None
        found = pg.diagnostics.first_nonfinite(self.trainer.loss, self.params_after(step), *batch)
        if found is None:
            return None
        place = found.source.rsplit("/", 1)[-1]  # a record holds no folders of a machine
        return f"{found.primitive} at {place}, whose {found.part} is not finite"


class _SavedSteps(_Steps):
    """The steps of a `Trainer`, whose state is saved at every point."""

    def __init__(self, trainer: Trainer, run: Run, measure: Measure, mesh: Mesh | None):
        super().__init__(run, measure, mesh)
        self.trainer = trainer
        self.carry: Any = trainer.start(run.seed)
        self._copy, self._before, self._rows = None, None, np.zeros((0, 0), np.int32)

    @property
    def params(self) -> PyTree:
        return self.carry[0]

    def warm_up(self, points: int) -> None:
        run, trainer = self.run, self.trainer
        interval = math.ceil(run.steps / points)
        lengths = {min(interval, run.steps), (run.steps - 1) % interval + 1}
        for length in lengths if trainer.in_scan else {1}:
            rows = trainer.rows(run.seed, 0, length)
            jax.block_until_ready(trainer.steps(trainer.start(run.seed), Rate(0.0), run.seed, rows))

    def steps(self, first: int, count: int) -> np.ndarray:
        self._rows = self.trainer.rows(self.run.seed, first, count)
        self._step, self._before = first + count, self._copy
        self.carry, losses, self._visited = self.trainer.steps(
            self.carry, self.run.rate, self.run.seed, self._rows
        )
        return np.asarray(losses)  # waits for the steps

    def figures(self, losses: np.ndarray | None) -> dict[str, Any]:
        # the next steps reuse the memory of the carry
        self._copy = jax.tree.map(np.array, self.carry)
        return super().figures(losses)

    def params_after(self, taken: int) -> PyTree:
        carry = jax.tree.map(jnp.asarray, self._before)
        if taken:
            rows = self._rows[:taken]
            carry, _, _ = self.trainer.steps(carry, self.run.rate, self.run.seed, rows)
        return carry[0]

    def batch(self, taken: int) -> tuple[Any, ...] | None:
        return _examples(self.trainer, self._rows, taken)

    def save(self, path: Path, progress: Progress) -> None:
        """Saves the state of a point."""
        files.save_state(path, {"carry": self.carry, "seconds": np.asarray(progress.seconds)})

    def restore(self, path: Path) -> Progress:
        """Restores the saved state."""
        saved = files.load_state(path, {"carry": self.carry, "seconds": np.zeros(())})
        self._copy = saved["carry"]
        self.carry = jax.tree.map(jnp.asarray, saved["carry"])
        return Progress(int(self.carry[2]), float(saved["seconds"]))


class _LoggedSteps(_Steps):
    """The steps of a `LoggedTrainer`. Steps that the log holds are replayed from it."""

    trainer: LoggedTrainer

    def __init__(
        self,
        trainer: LoggedTrainer,
        run: Run,
        measure: Measure,
        mesh: Mesh | None,
        log: pg.replay.ReplayLog,
    ):
        super().__init__(run, measure, mesh)
        self.trainer, self.log, self._first = trainer, log, 0
        self.state = self._start()

    def _start(self) -> pg.replay.TrainState:
        return self.trainer.update.init(self.trainer.start(self.run.seed)[0])

    @property
    def params(self) -> PyTree:
        return self.state.params

    def warm_up(self, points: int) -> None:
        self.trainer.warm_up(self.run.seed)

    def steps(self, first: int, count: int) -> np.ndarray:
        self._first, self._step = first, first + count
        self.state, losses = self._take(self.state, first, count)
        return losses

    def params_after(self, taken: int) -> PyTree:
        return self._take(self._start(), 0, self._first + taken)[0].params

    def batch(self, taken: int) -> tuple[Any, ...] | None:
        rows = self.trainer.rows(self.run.seed, self._first, self._step - self._first)
        return _examples(self.trainer, rows, taken)

    def _take(
        self, state: pg.replay.TrainState, first: int, count: int
    ) -> tuple[pg.replay.TrainState, np.ndarray]:
        run = self.run
        rows = self.trainer.rows(run.seed, first, count)
        return self.trainer.logged_steps(state, self.log, run.rate, run.seed, first, rows)


def _examples(trainer: Trainer, rows: np.ndarray, taken: int) -> tuple[Any, ...] | None:
    """The examples of one of these rows."""
    if not 0 <= taken < len(rows):
        return None
    return jax.tree.map(lambda x: x[rows[taken]], trainer.data)


def _log(trainer: LoggedTrainer, run: Run, path: Path) -> pg.replay.ReplayLog:
    """Opens the log of a run, or creates it."""
    base = trainer.start(run.seed)[0]
    if not path.exists():
        return pg.replay.ReplayLog.create(path, base, trainer.update, vars(run), run.steps)
    log = pg.replay.ReplayLog.open(path, append=True)
    if log.header["config"] != vars(run) or log.header["base"] != pg.replay.fingerprint(base):
        log.close()
        raise RecordError(f"{path} is the log of another run: {log.header['config']}.")
    return log
