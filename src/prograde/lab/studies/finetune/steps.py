"""The steps of a run, as the shared loop drives them: logged or not, and begun again."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

import prograde as pg
from prograde.lab.measure import memory
from prograde.lab.studies.finetune.plan import Plan
from prograde.lab.studies.finetune.tuning import Batch, Tuning
from prograde.lab.training import loop

POINTS = 20  # of a curve
PATIENCE = 6  # points without a better one, after which a run ends
_WAIT = 10  # steps: those that are dispatched must not pile up


@dataclass(frozen=True, eq=False)
class Parts:
    """What is trained on, what says where to stop, and what the figures are taken on.

    They share no example and no text. Without `validation` a run keeps its last parameters.
    """

    train: Batch
    validation: Batch | None
    held_out: Batch

    @classmethod
    def split(cls, train: Batch, held_out: Batch, validation: int) -> "Parts":
        """Keeps the last `validation` training examples apart."""
        cut = len(train[0]) - validation
        apart = tuple(x[cut:] for x in train) if validation else None
        return cls(tuple(x[:cut] for x in train), apart, held_out)


class Steps(loop.Task):
    """The steps of a run on the training part, and the figures on the other parts.

    `on_steps` is called every few steps, with how many there were and the loss.
    """

    judged = "loss"

    def __init__(
        self,
        tuning: Tuning,
        parts: Parts,
        log: pg.replay.ReplayLog | None = None,
        on_steps: Callable[[int, float], None] = lambda count, loss: None,
    ):
        self.tuning, self.parts, self.log, self.on_steps = tuning, parts, log, on_steps
        self.best: PyTree | None = None
        self.since: list[float] = []  # losses since the last point, in an earlier process

    @property
    def holds_fingerprints(self) -> bool:
        """Whether the log has a place for fingerprints of the parameters. Older ones have none."""
        return self.log is not None and "optimizer" in self.log.header

    def steps(self, first: int, count: int) -> Float[np.ndarray, " count"]:
        """Takes steps. Returns early if a loss is not finite."""
        tuning, train = self.tuning, self.parts.train
        losses: list[Any] = []
        for step, rows in enumerate(tuning.order(len(train[0]), first, count), first):
            batch = tuple(x[rows] for x in train)
            if tuning.update is None:
                value = tuning.step(step, batch)
            else:
                value, derivatives = tuning.derivatives(step, batch)
                if self.log is not None:
                    rate = tuning.rate_of(step)
                    self.log.append(step, tuning.plan.seed, rate, value, derivatives)
                tuning.apply(step, derivatives)
            losses.append(value)
            if len(losses) % _WAIT == 0 or len(losses) == count:
                latest = float(value)  # waits
                self.on_steps((len(losses) - 1) % _WAIT + 1, latest)
                if not math.isfinite(latest):
                    break
        return np.asarray([float(value) for value in losses])

    def figures(self, losses: Float[np.ndarray, " count"] | None) -> dict[str, Any]:
        """The held-out figures, the memory used so far, and the losses of the other parts."""
        found = {**self.tuning.evaluate(self.parts.held_out), "rss": peak_memory()}
        if self.parts.validation is not None:
            found["validation_loss"] = self.tuning.evaluate(self.parts.validation)["loss"]
        if losses is None:
            return found | {"train_loss": None}
        mean = float(np.mean([*self.since, *losses], dtype=np.float64))
        self.since = []
        return found | {"train_loss": mean}

    def look(self, points: list[loop.Point]) -> None:
        """Keeps the parameters, if the last point is the best so far."""
        if self.parts.validation is not None and self.kept(points) is points[-1]:
            self.best = jax.tree.map(np.array, self.tuning.state.params)

    def kept(self, points: list[loop.Point]) -> loop.Point:
        """The point whose parameters are kept: of least validation loss, or the last."""
        return points[-1] if self.parts.validation is None else loop.best(points, "validation_loss")

    def over(self, points: list[loop.Point]) -> bool:
        """Says whether patience has run out."""
        if self.parts.validation is None:
            return False
        return loop.points_since_best(points, "validation_loss") >= PATIENCE

    def restore(self) -> None:
        """Puts the best parameters back."""
        if self.best is not None:
            self.tuning.state = self.tuning.fresh(jax.tree.map(jnp.asarray, self.best))


def begin_again(
    tuning: Tuning, start: PyTree, plan: Plan, parts: Parts, points: int, on_steps: Any
) -> tuple[loop.Point, loop.End]:
    """Trains from the parameters `start` by another plan: the point that is kept, and the end.

    The plan may have another seed, rate and number of steps. No log is written, and the plan and
    parameters of `tuning` are those of before afterwards.
    """
    before = tuning.plan
    tuning.plan = dataclasses.replace(plan, offsets=before.offsets)
    tuning.state = tuning.fresh(jax.tree.map(jnp.asarray, start))
    task, progress = Steps(tuning, parts, None, on_steps), loop.Progress()
    try:
        end = loop.follow(task, plan.steps or 1, points, progress, lambda *_: None, task.over)
    finally:
        tuning.plan = before
        tuning.state = tuning.fresh(jax.tree.map(jnp.asarray, start))
    return task.kept(progress.points), end


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    return memory.peak_resident() or memory.resident()
