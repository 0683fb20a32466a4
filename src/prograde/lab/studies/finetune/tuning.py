"""Fine-tuning a language model by any estimator: what is trained, the steps, and how a run is made again from its log."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

import prograde as pg
from prograde.lab.texts import Examples, Windows
from prograde.lm import Decoder, LowRankUpdate, Quantized, matrix_shapes

TRAIN = {
    "norm": "the scale of the last norm, one number a unit of the residual stream",
    "norms": "the scales of the norms of the layers, their biases, and the last norm",
    "attention": "the matrices of attention",
    "matrices": "all matrices of the layers",
    "all": "everything",
    "lora": "thin products beside all matrices of the layers, of which both factors are trained",
    "readout": "thin products beside the matrices that write to the residual stream, along the labels' embeddings; and the last norm",
    "subspace": "thin products along directions that are drawn anew and merged every --refresh steps (LOZO)",
}
ESTIMATORS = {
    "weight": "forward gradients along tangents of the weights, of rank one where they are matrices",
    "activity": "forward gradients along noise on pre-activations, with a derivative for each example",
    "mezo": "central differences along tangents of the weights (MeZO)",
    "spsa": "central differences, weighted by the curvature they measure (1.5-SPSA)",
    "backprop": "reverse mode",
    "checkpointed": "reverse mode that stores each layer's input only",
}
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
SCHEDULE_BLOCK = 50  # steps that have the same learning rate
_EVAL_TOKENS = 2048  # in one evaluation
_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_WRITERS = ("output", "down")  # what writes to the residual stream


@dataclass(frozen=True)
class Plan:
    """All that decides the numbers of a run."""

    train: str = "readout"
    layers: tuple[int, int] | None = None  # first, and one after the last
    rank: int = 1
    refresh: int = 50
    estimator: str = "weight"
    directions: str = "default"
    tangents: int = 1
    groups: int = 1
    optimizer: str = "adam"
    rate: float = 1e-3
    decay: bool = True
    steps: int = 1000
    batch_size: int = 16
    seed: int = 0
    difference: float = 1e-3  # of the weights, for central differences
    offsets: tuple[float, ...] | None = None  # on the logits of the labels
    label_tokens: tuple[int, ...] | None = None  # none: every next token

    def __post_init__(self):
        for name, table in (
            ("train", TRAIN),
            ("estimator", ESTIMATORS),
            ("optimizer", OPTIMIZERS),
            ("directions", {"default": None, **DIRECTIONS}),
        ):
            if getattr(self, name) not in table:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}, but one of {', '.join(table)} is needed."
                )
        for name in ("rank", "refresh", "tangents", "groups", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but at least 1 is needed.")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate={self.rate}, but a positive number is needed.")
        if self.batch_size % self.groups:
            raise ValueError(f"groups={self.groups} does not divide batch_size={self.batch_size}.")
        if self.groups > 1 and self.estimator != "weight":
            raise ValueError(
                f"groups={self.groups} with estimator={self.estimator!r}, but only 'weight' has groups."
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Plan":
        """From the JSON of a log."""
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known
        }
        return cls(**values)

    def make_estimator(self) -> pg.Estimator:
        """The estimator that the plan names."""
        thin = self.train in (
            "lora",
            "readout",
            "subspace",
            "norm",
            "norms",
        )  # a few numbers: each has its own
        default = (
            "normal" if self.estimator in ("mezo", "spsa") else "rademacher" if thin else "low-rank"
        )
        tangents = DIRECTIONS[default if self.directions == "default" else self.directions]
        count = self.tangents
        match self.estimator:
            case "weight":
                return pg.WeightPerturbation(tangents, num_tangents=count, num_groups=self.groups)
            case "activity":
                return pg.ActivityPerturbation(num_tangents=count)
            case "mezo":
                return pg.CentralDifference(tangents, num_tangents=count, step=self.difference)
            case "spsa":
                return pg.CentralDifference(
                    tangents, num_tangents=count, step=self.difference, curvature_power=0.5
                )
            case "backprop":
                return pg.Backprop()
        return pg.CheckpointedBackprop()

    def rate_of(self, step: int) -> float:
        """The learning rate of a step: constant, or a line to zero in steps of `SCHEDULE_BLOCK`."""
        left = 1 - (step // SCHEDULE_BLOCK * SCHEDULE_BLOCK) / self.steps if self.decay else 1.0
        return float(np.float32(self.rate * left))


class Tuning:
    """A model being fine-tuned: the parts that are trained, those that are not, and the step from one state to the next.

    The layers before the first that is trained have the same states at every step: `prepare` computes them once. Matrices that are trained
    are taken over from the model, whose own are then gone: two copies of them may not fit.
    """

    def __init__(self, plan: Plan, model: Decoder):
        count = model.architecture.num_layers
        first, last = plan.layers or (0, count)
        if first < 0:  # counted from the end
            first, last = count + first, count
        self.plan = plan = dataclasses.replace(plan, layers=plan.layers and (first, last))
        if plan.train == "readout" and plan.label_tokens is None:
            raise ValueError(
                "train='readout' needs labels, and a text has none. 'lora' is its like."
            )
        if plan.train == "all" and (first, last) != (0, count):
            raise ValueError(
                f"layers={plan.layers} with train='all', which is all layers and what is around them."
            )
        if plan.train == "norm":
            first = last = count
        elif not 0 <= first < last <= count:
            raise ValueError(
                f"layers={plan.layers}, but the model has {count}: from 0 to {count}, and at least one."
            )
        else:
            model = model.split(first, last)
        self.prefix = model.segments[: int(first > 0)]
        model = eqx.tree_at(lambda m: m.segments, model, model.segments[int(first > 0) :])
        self._embed = model
        model = self._with_products(model)
        params, frozen = eqx.partition(model, self._mask(model))
        self.frozen: tuple[PyTree, Array] = frozen, jnp.zeros(len(plan.label_tokens or ()))
        self.calibrate(plan.offsets)
        self.estimator = plan.make_estimator()
        self.optimizer = OPTIMIZERS[plan.optimizer]()
        self.update = None
        if isinstance(self.estimator, pg.SeededEstimator):
            self.update = pg.replay.Update(self.estimator, self.optimizer)
        if plan.train not in ("attention", "matrices", "all"):
            params = jax.tree.map(jnp.array, params)  # few
        self.state = pg.replay.TrainState(params, self.optimizer.init(params))
        self._embed = None if plan.train == "all" else self._embed
        self._steps: Any = None

    def _with_products(self, model: Decoder) -> Decoder:
        """The model with thin products beside its matrices, where the plan trains such."""
        plan = self.plan
        if plan.train not in ("lora", "readout", "subspace"):
            return model
        blocks = model.segments[0]
        names = _WRITERS if plan.train == "readout" else _MATRICES
        key = jax.random.fold_in(jax.random.key(plan.seed), 0x10A)
        for name, (inputs, outputs) in matrix_shapes(model.architecture).items():
            if name not in names:
                continue
            key, own = jax.random.split(key)
            base, layers = getattr(blocks, name), blocks.count
            down = jnp.zeros((layers, inputs, plan.rank), model.dtype)
            up = jnp.zeros((layers, plan.rank, outputs), model.dtype)
            if plan.train == "lora":
                down = jax.random.normal(own, down.shape, down.dtype) / math.sqrt(inputs)
            elif plan.train == "subspace":
                if isinstance(base, Quantized):
                    raise ValueError(
                        "train='subspace' merges into the matrices, which are quantized. Use 'lora'."
                    )
                up = _directions(own, up)
            else:
                rows = _label_directions(model, plan.label_tokens or ())
                up = jnp.broadcast_to(rows, (layers, *rows.shape)).astype(model.dtype)
                down = jnp.zeros((layers, inputs, len(rows)), model.dtype)
            blocks = eqx.tree_at(
                lambda b, n=name: getattr(b, n), blocks, LowRankUpdate(base, down, up)
            )
        return eqx.tree_at(lambda m: m.segments[0], model, blocks)

    def _mask(self, model: Decoder) -> PyTree[bool]:
        """Which arrays are trained."""
        mask = jax.tree.map(lambda _: False, model)
        train = self.plan.train
        if train == "all":
            return jax.tree.map(eqx.is_inexact_array, model)
        if train in ("norm", "norms", "readout"):
            mask = eqx.tree_at(lambda m: m.norm, mask, True)
        if train == "norm":
            return mask
        blocks = mask.segments[0]

        def chosen(blocks: Any) -> list[Any]:
            if train == "norms":
                biases = [
                    b
                    for b in (blocks.query_bias, blocks.key_bias, blocks.value_bias)
                    if b is not None
                ]
                return [blocks.attention_norm, blocks.feed_norm, *biases]
            if train == "attention":
                return [blocks.query, blocks.key, blocks.value, blocks.output]
            if train == "matrices":
                return [getattr(blocks, name) for name in _MATRICES]
            names = _WRITERS if train == "readout" else _MATRICES
            products = [getattr(blocks, name) for name in names]
            ups = [p.up for p in products] if train == "lora" else []
            return [p.down for p in products] + ups

        if train in ("attention", "matrices") and any(
            isinstance(x, Quantized) for x in chosen(model.segments[0])
        ):
            raise ValueError(
                f"train={train!r}, but these matrices are quantized. Train 'lora', 'readout' or 'norms'."
            )
        return eqx.tree_at(
            lambda m: m.segments[0], mask, eqx.tree_at(chosen, blocks, replace_fn=lambda _: True)
        )

    def calibrate(self, offsets: tuple[float, ...] | None) -> None:
        """Adds offsets to the logits of the labels from here on."""
        self.plan = dataclasses.replace(self.plan, offsets=offsets)
        if offsets is not None:
            self.frozen = self.frozen[0], jnp.asarray(offsets, jnp.float32)

    @property
    def thin(self) -> bool:
        """Whether what is trained is little, and all that changes."""
        return self.plan.train in ("norm", "norms", "lora", "readout")

    @property
    def num_trained(self) -> int:
        """How many numbers are trained."""
        return sum(x.size for x in jax.tree.leaves(self.state.params))

    @property
    def model(self) -> Decoder:
        """As it is now, whole."""
        whole = eqx.combine(self.state.params, self.frozen[0])
        return eqx.tree_at(lambda m: m.segments, whole, (*self.prefix, *whole.segments))

    # data

    def prepare(
        self, data: Examples | Windows, on_part: Callable[[int], None] = lambda _: None
    ) -> tuple[np.ndarray, ...]:
        """The arrays of which batches are rows, with the states before the first trained layer where there are such."""
        if isinstance(data, Windows):
            inputs, rest = data.tokens[:, :-1], (data.tokens[:, 1:],)
            valid = np.ones(inputs.shape, bool)
        else:
            inputs, valid, rest = data.tokens, data.valid, (data.labels,)
        if not self.prefix:
            return inputs, valid, *rest
        last_only = (
            isinstance(data, Examples) and self.plan.train == "norm"
        )  # the rest is looked at no more
        begin = self._embed
        assert begin is not None

        @jax.jit
        def before(begin: Decoder, prefix: Any, tokens: Array, valid: Array) -> Array:
            states = begin.layers(begin.embed(tokens), valid, prefix)
            return states[:, -1:] if last_only else states

        kept = []
        for rows in _chunks(len(data), inputs.shape[1]):
            kept.append(
                np.asarray(before(begin, self.prefix, *_filled(rows, inputs, valid)))[
                    : rows.stop - rows.start
                ]
            )
            on_part(rows.stop - rows.start)
        return np.concatenate(kept), valid[:, -1:] if last_only else valid, *rest

    def order(self, count: int, first: int, steps: int) -> Iterator[Int[np.ndarray, " batch"]]:
        """Which examples each step sees: every epoch its own permutation, what does not fill a batch left out."""
        size = min(self.plan.batch_size, count)
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
        """Cross-entropy of each example: of its label among the labels, or of its next tokens, on average."""
        if self.plan.label_tokens is not None:
            logits = self.label_logits(params, frozen, inputs, valid)
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return self._next_token(params, frozen, inputs, valid, wanted)[0]

    def _fun(self, frozen: tuple[PyTree, Array]) -> Callable[..., Array]:
        """The losses as a function of what is trained and a batch: all arrays in its arguments are examples."""
        return lambda params, *batch: self.losses(params, frozen, *batch)

    def _next_token(
        self,
        params: PyTree,
        frozen: tuple[PyTree, Array],
        inputs: Array,
        valid: Array,
        wanted: Array,
    ) -> tuple[Array, Array]:
        """(mean loss, mean hits) of each window; the logits of one window at a time are there."""
        model = eqx.combine(params, frozen[0])
        states = model.finish(self._hidden(model, inputs, valid))

        def of_window(_: None, window: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
            logits = model.logits(window[0]).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[1])
            return None, (
                jnp.mean(losses),
                jnp.mean((jnp.argmax(logits, -1) == window[1]).astype(jnp.float32)),
            )

        return lax.scan(of_window, None, (states, wanted))[1]

    # steps

    def derivatives(self, step: int, batch: tuple[np.ndarray, ...]) -> tuple[Array, Array]:
        """(loss, derivatives) of a step whose estimator is a seed and numbers."""
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
                value, _, found = self.estimator.derivatives(self._fun(frozen), key, params, *batch)
                return value, found.astype(jnp.float32)

            self._steps = jax.jit(derivatives)
        return self._steps

    def apply(self, step: int, derivatives: Array) -> None:
        """The update of a step, from its derivatives: in training and in replaying."""
        assert self.update is not None
        plan = self.plan
        if plan.train == "subspace" and step and step % plan.refresh == 0:
            round = np.uint32(step // plan.refresh)
            params, frozen = _refreshed(self.state.params, self.frozen[0], round, plan.seed)
            self.frozen = frozen, self.frozen[1]
            self.state = pg.replay.TrainState(params, self.optimizer.init(params))
        self.state = self.update(self.state, step, plan.seed, plan.rate_of(step), derivatives)

    def rehearse(self, batch: tuple[np.ndarray, ...], steps: int) -> float:
        """Seconds of a step, compiled; the state is as it was, for the steps have the rate zero."""
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
        self.state = pg.replay.TrainState(self.state.params, self.optimizer.init(self.state.params))
        return min(seconds[1:])

    def step(self, step: int, batch: tuple[np.ndarray, ...], rate: float | None = None) -> Array:
        """A step of any other estimator; returns the loss."""
        if self._steps is None:

            def stepped(
                params: PyTree,
                opt_state: PyTree,
                frozen: PyTree,
                key: Array,
                rate: Array,
                batch: Any,
            ) -> tuple[PyTree, PyTree, Array]:
                found = self.estimator.estimate(self._fun(frozen), key, None, params, *batch)
                updates, opt_state = self.optimizer.update(found.grads, opt_state, params)
                params = jax.tree.map(lambda w, u: (w + rate * u).astype(w.dtype), params, updates)
                return params, opt_state, found.value

            self._steps = jax.jit(stepped, donate_argnums=(0, 1))
        key = jax.random.fold_in(jax.random.key(self.plan.seed), step)
        rate = self.plan.rate_of(step) if rate is None else rate
        params, opt_state, value = self._steps(
            *self.state, self.frozen, key, np.float32(rate), batch
        )
        self.state = pg.replay.TrainState(params, opt_state)
        return value

    def temporary_bytes(self, batch: tuple[np.ndarray, ...]) -> int:
        """What XLA says that a step needs beside its arguments. Compiles, runs nothing."""
        if self.update is not None:
            key = self.update.key(0, 0)
            args: tuple[Any, ...] = self.state.params, self.frozen, key, batch
            lowered = self._compiled_derivatives.lower(*args)  # pyright: ignore[reportFunctionMemberAccess]
        else:
            stepped = lambda p, f, k, b: self.estimator.estimate(self._fun(f), k, None, p, *b).grads  # noqa: E731
            lowered = jax.jit(stepped).lower(
                self.state.params, self.frozen, jax.random.key(0), batch
            )
        analysis = lowered.compile().memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes  # not all platforms say

    def evaluate(self, data: tuple[np.ndarray, ...]) -> dict[str, Any]:
        """Figures on data that `prepare` made: loss, accuracy, and the AUC where there are two labels."""
        if self.plan.label_tokens is None:
            sums = np.zeros(2)
            for rows in _chunks(len(data[0]), data[0].shape[1]):
                found = self._window_figures(self.state.params, self.frozen, *_filled(rows, *data))
                sums += [np.asarray(x, np.float64)[: rows.stop - rows.start].sum() for x in found]
            loss, accuracy = (sums / len(data[0])).tolist()
            return {"loss": loss, "accuracy": accuracy, "perplexity": math.exp(min(loss, 700.0))}
        return figures_of(self.logits(data), data[2])

    def logits(self, data: tuple[np.ndarray, ...]) -> Float[np.ndarray, "examples labels"]:
        """The logits of the labels of all examples."""
        found = []
        for rows in _chunks(len(data[0]), data[0].shape[1]):
            logits = self._label_logits(self.state.params, self.frozen, *_filled(rows, *data[:2]))
            found.append(np.asarray(logits)[: rows.stop - rows.start])
        return np.concatenate(found)

    @property
    def _label_logits(self) -> Callable[..., Array]:
        if "_jitted_logits" not in self.__dict__:
            self._jitted_logits = jax.jit(self.label_logits)
        return self._jitted_logits

    @property
    def _window_figures(self) -> Callable[..., Any]:
        if "_jitted_figures" not in self.__dict__:
            self._jitted_figures = jax.jit(self._next_token)
        return self._jitted_figures


def figures_of(
    logits: Float[np.ndarray, "examples labels"], labels: Int[np.ndarray, " examples"]
) -> dict[str, float]:
    """Loss, accuracy, and for two labels the area under the ROC curve, which no offset changes."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    found = {
        "loss": float(loss.mean()),
        "accuracy": float((logits.argmax(axis=1) == labels).mean()),
    }
    positive, negative = (labels == 1).sum(), (labels == 0).sum()
    if logits.shape[1] == 2 and positive and negative:
        margin = logits[:, 1] - logits[:, 0]
        _, place, counts = np.unique(margin, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # ties share the mean of their ranks
        found["auc"] = float(
            (ranks[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * negative)
        )
    return found


def calibration(
    logits: Float[np.ndarray, "examples labels"], labels: Int[np.ndarray, " examples"]
) -> tuple[float, ...]:
    """The offsets of the labels' logits of least training loss, summing to zero: what a moved bias alone would reach."""

    def loss_fn(offsets: Array) -> Array:
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(
                jnp.asarray(logits) + offsets, jnp.asarray(labels)
            )
        )

    exact = pg.value_and_grad(loss_fn, pg.ForwardJacobian())

    def newton(offsets: Array, _: None) -> tuple[Array, None]:
        hessian = jax.jacfwd(lambda x: exact(jax.random.key(0), x)[1])(offsets)
        _, grads = exact(jax.random.key(0), offsets)
        # the loss does not change with the sum of the offsets, and the pseudo-inverse leaves it alone; the damping is for
        # labels that the model tells apart without a mistake
        step = jnp.linalg.pinv(hessian + 1e-4 * jnp.eye(len(grads)), hermitian=True) @ grads
        return offsets - jnp.clip(step, -2, 2), None

    found = jax.jit(lambda: lax.scan(newton, jnp.zeros(logits.shape[1]), None, length=30)[0])()
    return tuple(float(x) for x in np.asarray(found) - float(np.mean(found)))


def _label_directions(
    model: Decoder, label_tokens: tuple[int, ...]
) -> Float[np.ndarray, "labels-1 width"]:
    """Orthonormal directions in which the labels' logits differ."""
    # the logits of the unit vectors are the labels' columns of the head
    columns = np.asarray(
        model.logits(
            jnp.eye(model.architecture.width, dtype=model.dtype), np.asarray(label_tokens)
        ),
        np.float64,
    )
    q, _ = np.linalg.qr(columns[:, 1:] - columns[:, :1])
    return q.T


def _directions(key: Array, up: Array) -> Array:
    return jax.random.normal(key, up.shape, up.dtype) / math.sqrt(up.shape[-1])


@eqx.filter_jit(donate="all-except-first")
def _redrawn(seed: Array, round: Array, products: list[LowRankUpdate]) -> list[LowRankUpdate]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x10B), round)
    found = []
    for i, p in enumerate(products):
        assert isinstance(p.base, jax.Array)  # what is quantized was refused
        base = (p.base + p.down @ p.up).astype(p.base.dtype)
        found.append(
            LowRankUpdate(
                base, jnp.zeros_like(p.down), _directions(jax.random.fold_in(key, i), p.up)
            )
        )
    return found


def _refreshed(
    params: PyTree, frozen: PyTree, round: np.uint32, seed: int
) -> tuple[PyTree, PyTree]:
    """Thin products merged into their matrices, and begun again along new directions (LOZO, arXiv 2410.07698)."""
    where = lambda model: [getattr(model.segments[0], name) for name in _MATRICES]  # noqa: E731
    model = eqx.combine(params, frozen)
    mask = jax.tree.map(lambda x: x is not None, params, is_leaf=lambda x: x is None)
    model = eqx.tree_at(
        where, model, _redrawn(jnp.uint32(seed & 0xFFFFFFFF), jnp.asarray(round), where(model))
    )
    return eqx.partition(model, mask)


def _chunks(count: int, length: int) -> Iterator[slice]:
    size = max(1, _EVAL_TOKENS // length)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _filled(rows: slice, *arrays: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of arrays, the last repeated until a chunk is full, so that one program does for all."""
    size = max(1, _EVAL_TOKENS // (arrays[0].shape[1] if arrays[0].ndim > 1 else 1))
    for x in arrays:
        index = np.minimum(np.arange(rows.start, rows.start + min(size, len(x))), rows.stop - 1)
        yield x[index]
