"""A language model being fine-tuned by any estimator: its state, its steps, and its evaluation."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

import prograde as pg
from prograde.lab.data.texts import Examples, Windows
from prograde.lab.studies.finetune import parts
from prograde.lab.studies.finetune.figures import figures_of
from prograde.lab.studies.finetune.plan import SCHEDULE_BLOCK, THIN, Plan
from prograde.lm import Decoder

DIRECTIONS: dict[str, pg.TangentDistribution] = {
    "normal": pg.Normal(),
    "rademacher": pg.Rademacher(),
    "low-rank": pg.LowRank(rank=1),
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1.0),
    "momentum": lambda: optax.chain(optax.ema(0.9, debias=True), optax.sgd(1.0)),
    "adam": lambda: optax.adam(1.0),
}
_EVAL_TOKENS = 2048  # in one evaluation

Batch = tuple[np.ndarray, ...]
"""Rows of the arrays that `Tuning.prepare` makes."""


def make_estimator(plan: Plan) -> pg.Estimator:
    """The estimator that the plan names."""
    small = plan.train in ("lora", "readout", "subspace", "norm", "norms")
    usual = "rademacher" if small else "low-rank"
    if plan.estimator in ("mezo", "spsa"):
        usual = "normal"
    tangents = DIRECTIONS[usual if plan.directions == "default" else plan.directions]
    count = plan.tangents or 1
    match plan.estimator:
        case "weight":
            return pg.WeightPerturbation(tangents, num_tangents=count, num_groups=plan.groups)
        case "activity":
            return pg.ActivityPerturbation(num_tangents=count)
        case "mezo":
            return pg.CentralDifference(tangents, num_tangents=count, step=plan.difference)
        case "spsa":
            return pg.CentralDifference(
                tangents, num_tangents=count, step=plan.difference, curvature_power=0.5
            )
        case "backprop":
            return pg.Backprop()
    return pg.CheckpointedBackprop()


def rate_of(plan: Plan, step: int) -> float:
    """The learning rate of a step: constant, or a line to zero in stairs of `SCHEDULE_BLOCK`."""
    if plan.rate is None or plan.steps is None:
        raise ValueError(f"rate={plan.rate} and steps={plan.steps}: both are needed for steps.")
    fallen = 0.0 if plan.constant_rate else step // SCHEDULE_BLOCK * SCHEDULE_BLOCK / plan.steps
    return float(np.float32(plan.rate * (1 - fallen)))


class Tuning:
    """A model being fine-tuned: what is trained, what is not, and the step between two states.

    The layers before the first one that is trained give the same states at every step: `prepare`
    computes them once. Matrices that are trained are taken over from the model, whose own are then
    gone: two copies may not fit.
    """

    def __init__(self, plan: Plan, model: Decoder):
        self.plan = plan = plan.resolved()
        count = model.architecture.num_layers
        first, last = plan.layer_range(count)
        if plan.train == "readout" and plan.label_tokens is None:
            raise ValueError("--train readout needs labels, and a text has none. Use lora.")
        if plan.train == "all" and (first, last) != (0, count):
            raise ValueError(f"--layers {plan.layers}: --train all trains all layers.")
        if plan.train == "norm":
            first = last = count
        elif not 0 <= first < last <= count:
            raise ValueError(f"--layers {plan.layers}: the model has the layers 0 to {count - 1}.")
        else:
            model = model.split(first, last)
        self.prefix = model.segments[: int(first > 0)]
        model = eqx.tree_at(lambda m: m.segments, model, model.segments[int(first > 0) :])
        self._embed = model
        model = parts.with_updates(model, plan)
        params, frozen = eqx.partition(model, parts.mask(model, plan.train))
        self.frozen: tuple[PyTree, Array] = frozen, jnp.zeros(len(plan.label_tokens or ()))
        self.calibrate(plan.offsets)
        self.estimator = make_estimator(plan)
        self.optimizer = OPTIMIZERS[plan.optimizer]()
        self.update = None
        if isinstance(self.estimator, pg.SeededEstimator):
            self.update = pg.replay.Update(self.estimator, self.optimizer)
        if plan.train not in ("attention", "matrices", "all"):
            params = jax.tree.map(jnp.array, params)  # small
        self.state = self.fresh(params)
        self._embed = None if plan.train == "all" else self._embed
        self._steps: Any = None

    def fresh(self, params: PyTree) -> pg.replay.TrainState:
        """The state before the first step from these parameters."""
        return pg.replay.TrainState(params, self.optimizer.init(params))

    def rate_of(self, step: int) -> float:
        """The learning rate of a step."""
        return rate_of(self.plan, step)

    def calibrate(self, offsets: tuple[float, ...] | None) -> None:
        """Adds offsets to the logits of the labels from here on."""
        self.plan = dataclasses.replace(self.plan, offsets=offsets)
        if offsets is not None:
            self.frozen = self.frozen[0], jnp.asarray(offsets, jnp.float32)

    @property
    def thin(self) -> bool:
        """Whether what is trained is little, and all that changes."""
        return self.plan.train in THIN

    @property
    def num_trained(self) -> int:
        """The number of trained numbers."""
        return sum(x.size for x in jax.tree.leaves(self.state.params))

    @property
    def model(self) -> Decoder:
        """The whole model as it is."""
        whole = eqx.combine(self.state.params, self.frozen[0])
        return eqx.tree_at(lambda m: m.segments, whole, (*self.prefix, *whole.segments))

    @property
    def changed(self) -> PyTree:
        """All arrays that steps change: a log holds their fingerprint."""
        return self.state.params if self.thin else self.model

    # data

    def prepare(
        self, data: Examples | Windows, on_part: Callable[[int], None] = lambda _: None
    ) -> Batch:
        """The arrays of which batches are rows: states before the first trained layer, or tokens.

        Calls `on_part` with the number of examples whose states were computed.
        """
        if isinstance(data, Windows):
            inputs, rest = data.tokens[:, :-1], (data.tokens[:, 1:],)
            valid = np.ones(inputs.shape, bool)
        else:
            inputs, valid, rest = data.tokens, data.valid, (data.labels,)
        if not self.prefix:
            return inputs, valid, *rest
        last_only = self._last_only(data)
        kept = []
        for rows in _chunks(len(data), inputs.shape[1]):
            states = self._before(last_only, *_filled(rows, inputs, valid))
            kept.append(np.asarray(states)[: rows.stop - rows.start])
            on_part(rows.stop - rows.start)
        return np.concatenate(kept), valid[:, -1:] if last_only else valid, *rest

    def seconds_of_states(self, data: Examples | Windows) -> float:
        """The seconds that `prepare` will take for an example, by a trial."""
        if not self.prefix:
            return 0.0
        tokens = data.tokens if isinstance(data, Examples) else data.tokens[:, :-1]
        rows = next(_chunks(len(data), tokens.shape[1]))
        valid = data.valid if isinstance(data, Examples) else np.ones(tokens.shape, bool)
        seconds = []
        for _ in range(2):  # the first one compiles
            begin = time.perf_counter()
            states = self._before(self._last_only(data), *_filled(rows, tokens, valid))
            jax.block_until_ready(states)
            seconds.append(time.perf_counter() - begin)
        return seconds[1] / (rows.stop - rows.start)

    def _last_only(self, data: Examples | Windows) -> bool:
        """Whether the states of the last token alone are looked at from here on."""
        return isinstance(data, Examples) and self.plan.train == "norm"

    def _before(self, last_only: bool, tokens: np.ndarray, valid: np.ndarray) -> Array:
        """The states before the first trained layer."""
        if "_jitted_before" not in self.__dict__:

            def before(
                begin: Decoder, prefix: Any, tokens: Array, valid: Array, last_only: bool
            ) -> Array:
                states = begin.layers(begin.embed(tokens), valid, prefix)
                return states[:, -1:] if last_only else states

            self._jitted_before = jax.jit(before, static_argnums=4)
        assert self._embed is not None
        return self._jitted_before(self._embed, self.prefix, tokens, valid, last_only)

    def order(self, count: int, first: int, steps: int) -> Iterator[Int[np.ndarray, " batch"]]:
        """The rows that each step sees.

        Every epoch has a permutation of its own; rows that do not fill a batch are left out.
        """
        size = min(self.plan.batch_size or 1, count)
        per_epoch = count // size
        for step in range(first, first + steps):
            key = [self.plan.seed, step // per_epoch]
            permutation = np.random.Generator(np.random.Philox(key=key)).permutation(count)
            yield permutation[step % per_epoch * size :][:size]

    # the objective

    def _hidden(self, model: Decoder, inputs: Array, valid: Array) -> Array:
        states = inputs if self.prefix else model.embed(inputs)
        return model.layers(states, valid, model.segments)

    def label_logits(
        self, params: PyTree, frozen: tuple[PyTree, Array], inputs: Array, valid: Array
    ) -> Float[Array, "batch labels"]:
        """The logits of the labels, with their offsets."""
        model = eqx.combine(params, frozen[0])
        states = model.finish(self._hidden(model, inputs, valid)[:, -1])
        logits = model.logits(states, np.asarray(self.plan.label_tokens)).astype(jnp.float32)
        return logits + frozen[1]

    def losses(
        self,
        params: PyTree,
        frozen: tuple[PyTree, Array],
        inputs: Array,
        valid: Array,
        wanted: Array,
    ) -> Float[Array, " batch"]:
        """The cross-entropy of each example: of its label, or the mean of its next tokens."""
        if self.plan.label_tokens is not None:
            logits = self.label_logits(params, frozen, inputs, valid)
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return self._next_token(params, frozen, inputs, valid, wanted)[0]

    def loss_fn(self, frozen: tuple[PyTree, Array]) -> Callable[..., Array]:
        """The losses as a function of what is trained and a batch: all its arrays are examples."""
        return lambda params, *batch: self.losses(params, frozen, *batch)

    def _next_token(
        self,
        params: PyTree,
        frozen: tuple[PyTree, Array],
        inputs: Array,
        valid: Array,
        wanted: Array,
    ) -> tuple[Array, Array]:
        """(mean loss, mean hits) of each window. Holds the logits of one window at a time."""
        model = eqx.combine(params, frozen[0])
        states = model.finish(self._hidden(model, inputs, valid))

        def of_window(_: None, window: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
            logits = model.logits(window[0]).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[1])
            hits = (jnp.argmax(logits, -1) == window[1]).astype(jnp.float32)
            return None, (jnp.mean(losses), jnp.mean(hits))

        return lax.scan(of_window, None, (states, wanted))[1]

    # steps

    def derivatives(self, step: int, batch: Batch) -> tuple[Array, Array]:
        """(loss, derivatives) of a step whose estimate is a seed and a few numbers."""
        assert self.update is not None
        key = self.update.key(self.plan.seed, step)
        return self._compiled_derivatives(self.state.params, self.frozen, key, batch)

    @property
    def _compiled_derivatives(self) -> Callable[..., tuple[Array, Array]]:
        if self._steps is None:

            def derivatives(
                params: PyTree, frozen: PyTree, key: Array, batch: Any
            ) -> tuple[Array, Array]:
                assert isinstance(self.estimator, pg.SeededEstimator)
                loss_fn = self.loss_fn(frozen)
                value, _, found = self.estimator.derivatives(loss_fn, key, params, *batch)
                return value, found.astype(jnp.float32)

            self._steps = jax.jit(derivatives)
        return self._steps

    def apply(self, step: int, derivatives: Array) -> None:
        """Updates the parameters, from the derivatives of a step: in training and in replaying."""
        assert self.update is not None
        plan = self.plan
        if plan.train == "subspace" and step and step % plan.refresh == 0:
            round = np.uint32(step // plan.refresh)
            params, frozen = parts.refreshed(self.state.params, self.frozen[0], round, plan.seed)
            self.frozen = frozen, self.frozen[1]
            self.state = self.fresh(params)
        self.state = self.update(self.state, step, plan.seed, self.rate_of(step), derivatives)

    def step(self, step: int, batch: Batch, rate: float | None = None) -> Array:
        """Takes a step of an estimator whose estimate is no seed and numbers; returns the loss."""
        if self._steps is None:

            def stepped(
                params: PyTree,
                opt_state: PyTree,
                frozen: PyTree,
                key: Array,
                rate: Array,
                batch: Any,
            ) -> tuple[PyTree, PyTree, Array]:
                found = self.estimator.estimate(self.loss_fn(frozen), key, None, params, *batch)
                updates, opt_state = self.optimizer.update(found.grads, opt_state, params)
                params = jax.tree.map(lambda w, u: (w + rate * u).astype(w.dtype), params, updates)
                return params, opt_state, found.value

            self._steps = jax.jit(stepped, donate_argnums=(0, 1))
        key = jax.random.fold_in(jax.random.key(self.plan.seed), step)
        rate = self.rate_of(step) if rate is None else rate
        params, opt_state, value = self._steps(
            *self.state, self.frozen, key, np.float32(rate), batch
        )
        self.state = pg.replay.TrainState(params, opt_state)
        return value

    def rehearse(self, batch: Batch, steps: int) -> float:
        """The seconds of a step, compiled. The rate is zero: the state stays as it was."""
        seconds = []
        for _ in range(steps + 1):
            begin = time.perf_counter()
            if self.update is not None:
                derivatives = self.derivatives(0, batch)[1]
                self.state = self.update(self.state, 0, self.plan.seed, 0.0, derivatives)
            else:
                self.step(0, batch, rate=0.0)
            jax.block_until_ready(self.state.params)
            seconds.append(time.perf_counter() - begin)
        self.state = self.fresh(self.state.params)
        return min(seconds[1:])

    def temporary_bytes(self, batch: Batch) -> int:
        """The memory that a step needs in addition to its arguments, by XLA. Runs nothing."""
        if self.update is not None:
            key = self.update.key(0, 0)
            args: tuple[Any, ...] = self.state.params, self.frozen, key, batch
            lowered = self._compiled_derivatives.lower(*args)  # pyright: ignore[reportFunctionMemberAccess]
        else:
            estimate = self.estimator.estimate
            stepped = lambda p, f, k, b: estimate(self.loss_fn(f), k, None, p, *b).grads  # noqa: E731
            key = jax.random.key(0)
            lowered = jax.jit(stepped).lower(self.state.params, self.frozen, key, batch)
        analysis = lowered.compile().memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes  # not all platforms say

    # evaluation

    def evaluate(self, data: Batch) -> dict[str, Any]:
        """Loss, accuracy, and the AUC or the perplexity, on data that `prepare` made."""
        if self.plan.label_tokens is not None:
            return figures_of(self.logits(data), data[2])
        if "_jitted_figures" not in self.__dict__:
            self._jitted_figures = jax.jit(self._next_token)
        sums = np.zeros(2)
        for rows in _chunks(len(data[0]), data[0].shape[1]):
            found = self._jitted_figures(self.state.params, self.frozen, *_filled(rows, *data))
            sums += [np.asarray(x, np.float64)[: rows.stop - rows.start].sum() for x in found]
        loss, accuracy = (sums / len(data[0])).tolist()
        return {"loss": loss, "accuracy": accuracy, "perplexity": math.exp(min(loss, 700.0))}

    def logits(self, data: Batch) -> Float[np.ndarray, "examples labels"]:
        """The logits of the labels of all examples."""
        if "_jitted_logits" not in self.__dict__:
            self._jitted_logits = jax.jit(self.label_logits)
        found = []
        for rows in _chunks(len(data[0]), data[0].shape[1]):
            logits = self._jitted_logits(self.state.params, self.frozen, *_filled(rows, *data[:2]))
            found.append(np.asarray(logits)[: rows.stop - rows.start])
        return np.concatenate(found)


def _chunks(count: int, length: int) -> Iterator[slice]:
    size = max(1, _EVAL_TOKENS // length)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _filled(rows: slice, *arrays: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of arrays. The last one is repeated to fill a chunk: one program does for all chunks."""
    size = max(1, _EVAL_TOKENS // (arrays[0].shape[1] if arrays[0].ndim > 1 else 1))
    for x in arrays:
        index = np.minimum(np.arange(rows.start, rows.start + min(size, len(x))), rows.stop - 1)
        yield x[index]
