"""Training with a replay log, whose steps several processes can share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

import prograde as pg
from prograde.lab.training.schedules import Rate
from prograde.lab.training.trainer import Trainer


class LoggedTrainer(Trainer):
    """A `Trainer` with a replay log. The devices of a mesh share each batch.

    A step is two programs. The first computes the directional derivatives, which go to the log. The
    second computes the next parameters from them. If the log already holds the step, only the
    second runs: a resumed run begins with such steps.
    The arguments are those of `Trainer`.
    """

    def __init__(
        self,
        init,
        loss,
        estimator: pg.SeededEstimator,
        data: tuple[np.ndarray, ...],
        mesh: Mesh,
        **options: Any,
    ):
        shared = pg.distributed.Distributed(estimator, mesh, data=mesh.axis_names)
        super().__init__(init, loss, shared, data, **options)
        self.shared, self.update = shared, pg.replay.Update(estimator, self.optimizer(1.0))
        self._derivatives = jax.jit(self._derivatives_of)

    def logged_steps(
        self,
        state: pg.replay.TrainState,
        log: pg.replay.ReplayLog,
        rate: Rate,
        seed: int,
        first: int,
        rows: Int[np.ndarray, "steps batch"],
    ) -> tuple[pg.replay.TrainState, Float[np.ndarray, " steps"]]:
        """Takes steps from number `first` on; returns the new state and the losses."""
        values, seed = [], self._tangent_seed(seed)
        for step, batch in enumerate(rows, first):
            now = float(np.float32(rate.first * float(self.schedule(step, rate.length))))
            if step < len(log.records):
                value = log.records["value"][step]
                derivatives = jnp.asarray(log.records["derivatives"][step])
            else:
                key = self.update.key(seed, step)
                value, derivatives = self._derivatives(state.params, key, self.data, batch)
                log.append(step, seed, now, value, derivatives)
            values.append(value)
            state = self.update(state, step, seed, now, derivatives)
        log.flush()
        return state, np.asarray([np.asarray(value) for value in values])

    def warm_up(self, seed: int) -> None:
        """Compiles the programs of `logged_steps`."""
        state = self.update.init(self.start(seed)[0])
        rows, seed = jnp.asarray(self.rows(seed, 0, 1)[0]), self._tangent_seed(seed)
        _, derivatives = self._derivatives(state.params, self.update.key(seed, 0), self.data, rows)
        jax.block_until_ready(self.update(state, 0, seed, 0.0, derivatives))

    def _derivatives_of(
        self, params: PyTree, key: Array, data: PyTree, rows: Array
    ) -> tuple[Array, Array]:
        batch = jax.tree.map(lambda x: x[rows], data)
        value, _, derivatives = self.shared.derivatives(self.loss, key, params, *batch)
        return value, derivatives

    def _tangent_seed(self, seed: int) -> int:
        """Returns the key of the tangents as a seed of 64 bits, for a log."""
        high, low = np.asarray(jax.random.key_data(self.keys(seed)[1])).tolist()
        return high << 32 | low
