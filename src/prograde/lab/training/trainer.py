"""Trains one loss by one estimator: compiles the step, and decides which examples it gets."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

import prograde as pg
from prograde.lab.data import BATCH_SIZE
from prograde.lab.training.schedules import OPTIMIZERS, SCHEDULES, Rate

Carry = tuple[PyTree, PyTree, Array, PyTree]
"""Parameters, state of the optimizer, step, state of the estimator."""


class Trainer:
    """Trains one loss by one estimator; compiles once for all rates and seeds.

    The order of the data and the keys derive from seed and step. A resumed run is bit-identical to
    an uninterrupted one.

    **Arguments:**

    - `init(key) -> params`, and `loss(params, *batch)`, which returns what the estimator takes.
    - `estimator`: None evaluates the loss on the same batches and changes nothing: the bare forward
      pass.
    - `data`: the training examples, arrays of one length; () for a loss without data.
    - `optimizer`, `schedule`: names in `OPTIMIZERS` and `SCHEDULES`.
    - `in_scan`: run the steps inside one `lax.scan`. On a CPU, XLA's reverse pass of a convolution
      is slow inside a loop; such steps are dispatched one by one.
    - `traced`: `steps` also returns the parameters before each step, for losses with few of them.
    """

    def __init__(
        self,
        init: Callable[[Key[Array, ""]], PyTree],
        loss: Callable[..., Any],
        estimator: pg.Estimator | None,
        data: tuple[np.ndarray, ...] = (),
        *,
        optimizer: str = "sgd",
        schedule: str = "exp",
        batch_size: int = BATCH_SIZE,
        in_scan: bool = True,
        traced: bool = False,
    ):
        self.loss, self.estimator, self.in_scan = loss, estimator, in_scan
        self.data = jax.tree.map(jnp.asarray, data)
        self.optimizer, self.schedule = OPTIMIZERS[optimizer], SCHEDULES[schedule]
        blocks = isinstance(getattr(estimator, "tangents", None), pg.Blocks)
        self._in_blocks = (
            optimizer == "sgd" and blocks and isinstance(estimator, pg.SeededEstimator)
        )
        self._init, self._traced, self._batch_size = jax.jit(init), traced, batch_size
        self.program = jax.jit(self._scan if in_scan else self.step, donate_argnums=0)

    def start(self, seed: int) -> Carry:
        """Returns the state before the first step."""
        key, _ = self.keys(seed)
        params = self._init(key)
        estimator_state = None
        if self.estimator is not None:
            batch = jax.tree.map(lambda x: x[self.rows(seed, 0, 1)[0]], self.data)
            estimator_state = self.estimator.init(self.loss, params, *batch)
        optimizer_state = self._scheduled(Rate(0.0, 1.0)).init(params)
        return params, optimizer_state, jnp.zeros((), jnp.int32), estimator_state

    def steps(
        self, carry: Carry, rate: Rate, seed: int, rows: Int[np.ndarray, "steps batch"]
    ) -> tuple[Carry, Float[Array, " steps"], PyTree]:
        """Takes a step for each row; returns the new state, the losses, the parameters visited.

        The carry is donated. The parameters visited are None unless the trainer is `traced`.
        """
        arguments = self.arguments(rate, seed)
        if self.in_scan:
            return self.program(carry, *arguments, jnp.asarray(rows))
        losses = []
        for batch in jnp.asarray(rows):  # asynchronous: does not wait for the result of a step
            carry, (loss, _) = self.program(carry, *arguments, batch)
            losses.append(loss)
        return carry, jnp.stack(losses), None

    def arguments(self, rate: Rate, seed: int) -> tuple[Rate, Key[Array, ""], PyTree]:
        """Returns the arguments of `step` between the carry and the rows."""
        as_arrays = Rate(jnp.float32(rate.first), jnp.float32(rate.length))
        return as_arrays, self.keys(seed)[1], self.data

    def step(
        self,
        carry: Carry,
        rate: Rate,
        key: Key[Array, ""],
        data: PyTree,
        rows: Int[Array, " batch"],
    ) -> tuple[Carry, tuple[Array, PyTree]]:
        """Takes one step; returns the new state, and the loss and the parameters before it."""
        params, optimizer_state, step, estimator_state = carry
        batch = jax.tree.map(lambda x: x[rows], data)
        if self.estimator is None:
            value = jnp.mean(self.loss(params, *batch))
            return (params, optimizer_state, step + 1, estimator_state), (value, None)
        if self._in_blocks:
            return self._step_in_block(carry, rate, jax.random.fold_in(key, step), batch)
        found = self.estimator.estimate(
            self.loss, jax.random.fold_in(key, step), estimator_state, params, *batch
        )
        updates, optimizer_state = self._scheduled(rate).update(
            found.grads, optimizer_state, params
        )
        visited = params if self._traced else None
        carry = (optax.apply_updates(params, updates), optimizer_state, step + 1, found.state)
        return carry, (found.value, visited)

    def _step_in_block(
        self, carry: Carry, rate: Rate, key: Key[Array, ""], batch: PyTree
    ) -> tuple[Carry, tuple[Array, PyTree]]:
        """Takes a step of SGD that writes nothing but the block that its tangents are in."""
        params, optimizer_state, step, state = carry
        estimator: Any = self.estimator
        value, _, derivatives = estimator.derivatives(self.loss, key, params, *batch)
        eta = rate.first * self.schedule(step, rate.length)
        moved = estimator.descend(key, params, derivatives, eta)
        carry = (moved, optimizer_state, step + 1, state)
        return carry, (value, params if self._traced else None)

    def rows(self, seed: int, first: int, count: int) -> Int[np.ndarray, "count batch"]:
        """Returns the indices of the examples of the steps first, first + 1, ...

        Each epoch has its own permutation. Examples that do not fill a batch are left out.
        """
        if not self.data or not count:
            return np.zeros((count, self._batch_size if self.data else 0), np.int32)
        examples, size = len(self.data[0]), self._batch_size
        per_epoch = examples // size
        steps = range(first, first + count)
        orders = [_epoch_order(seed, t // per_epoch, examples, size) for t in steps]
        return np.stack([order[t % per_epoch] for order, t in zip(orders, steps, strict=True)])

    @staticmethod
    def keys(seed: int) -> tuple[Key[Array, ""], Key[Array, ""]]:
        """Returns the keys of the initial parameters and of the tangents."""
        key_init, key_tangents = jax.random.split(jax.random.key(seed))
        return key_init, key_tangents

    def compiled_step(self) -> tuple[Any, Carry, tuple[Any, ...]]:
        """Compiles a single step: `carry, _ = compiled(carry, *arguments)`.

        Returns `compiled`, a carry and the arguments, with a rate of 0.
        """
        carry, rows = self.start(0), jnp.asarray(self.rows(0, 0, 1)[0])
        arguments = (*self.arguments(Rate(0.0), 0), rows)
        step = jax.jit(self.step, donate_argnums=0)
        return step.lower(carry, *arguments).compile(), carry, arguments

    def _scan(self, carry, rate, key, data, rows):
        carry, (losses, visited) = lax.scan(
            lambda c, r: self.step(c, rate, key, data, r), carry, rows
        )
        return carry, losses, visited

    def _scheduled(self, rate: Rate) -> optax.GradientTransformation:
        return self.optimizer(lambda t: rate.first * self.schedule(t, rate.length))


@functools.lru_cache(maxsize=4)
def _epoch_order(
    seed: int, epoch: int, examples: int, size: int
) -> Int[np.ndarray, "batches batch"]:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples)
    return order[: examples // size * size].reshape(-1, size).astype(np.int32)
