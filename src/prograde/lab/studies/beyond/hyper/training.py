"""Training runs as functions of hyperparameters.

`Classifier` has a few hyperparameters of the optimizer. `Cleaning` has a weight for each example.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prograde.lab import data
from prograde.lab.studies.beyond.horizon.loops import straight

_SIDE = 7  # pixels of a side: the digits at a quarter of their size
_RATE_KNOTS = 4
CENTRE = {"rate": [-3.0] * _RATE_KNOTS, "momentum": 0.0, "head": 0.0, "decay": [-7.0, -7.0]}
SPREAD = {
    "rate": 1.5,
    "momentum": 1.5,
    "head": 1.0,
    "decay": 2.0,
}  # of the prior that starts and random search draw from


@functools.cache
def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns rows of 50 numbers, of which the last is 1, and labels, by part.

    The parts are `train`, `validation` and `test`. No hyperparameter depends on `test`.
    """
    with jax.ensure_compile_time_eval():  # also called while a run is traced
        loaded, small = data.load("digits"), {}
    for part in ("train", "validation", "test"):
        images, labels = getattr(loaded, part)
        pooled = (
            images.reshape(len(labels), _SIDE, 4, _SIDE, 4).mean((2, 4)).reshape(len(labels), -1)
        )
        small[part] = (np.hstack([pooled, np.ones((len(labels), 1), np.float32)]), labels)
    return small


def _part(name: str, count: int | None = None) -> tuple[jax.Array, jax.Array]:
    rows, labels = digits()[name]
    return jnp.asarray(rows[:count], jnp.result_type(float)), jax.nn.one_hot(
        labels[:count], data.NUM_CLASSES
    )


def _cross_entropy(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    return -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=1)


def _accuracy(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    return jnp.mean(logits.argmax(1) == wanted.argmax(1))


def centre() -> dict[str, jax.Array]:
    """The hyperparameters of the first start, and the centre of the prior."""
    return {name: jnp.asarray(value, jnp.result_type(float)) for name, value in CENTRE.items()}


def prior(key: jax.Array) -> dict[str, jax.Array]:
    """Draws hyperparameters from the prior around `centre`."""
    keys = dict(zip(CENTRE, jax.random.split(key, len(CENTRE)), strict=True))
    return {
        k: v + SPREAD[k] * jax.random.normal(keys[k], v.shape, v.dtype) for k, v in centre().items()
    }


@dataclass(frozen=True)
class Classifier:
    """Trains a network of one hidden layer by SGD with momentum, on batches in a fixed order.

    The hyperparameters are eight numbers: `rate`, log learning rates at four knots of a piecewise
    linear schedule; `momentum`, its logit; `head`, the log of the last layer's rate over the first
    layer's; `decay`, the log weight decay of each layer.
    """

    steps: int
    units: int = 8
    examples: int = 256
    batch: int = 32

    def outcome(
        self, hyper: dict[str, jax.Array], loop: Callable = straight
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Trains; returns (held-out loss, figures of the test part). `loop` runs the steps."""
        rows, wanted = _part("train", self.examples)
        dtype, generator = rows.dtype, np.random.default_rng(0)
        shapes = ((rows.shape[1], self.units), (self.units, data.NUM_CLASSES))
        start = [
            jnp.asarray(generator.normal(size=shape) / np.sqrt(shape[0]), dtype) for shape in shapes
        ]
        momentum, decay = jax.nn.sigmoid(hyper["momentum"]), jnp.exp(hyper["decay"])
        of_layer = jnp.exp(jnp.stack([jnp.zeros((), dtype), hyper["head"]]))

        def logits(weights: list[jax.Array], rows: jax.Array) -> jax.Array:
            return jnp.tanh(rows @ weights[0]) @ weights[1]

        def step(carry: tuple) -> tuple:
            t, weights, velocities = carry
            at = t * self.batch % self.examples
            x, y = (jax.lax.dynamic_slice_in_dim(part, at, self.batch) for part in (rows, wanted))
            grads = jax.grad(lambda w: jnp.mean(_cross_entropy(logits(w, x), y)))(weights)
            knot = t * ((_RATE_KNOTS - 1) / (self.steps - 1))
            near = jnp.maximum(0, 1 - jnp.abs(knot - jnp.arange(_RATE_KNOTS)))
            rate = jnp.exp(jnp.sum(near * hyper["rate"]))
            velocities = [
                momentum * v + g + decay[i] * w
                for i, (v, g, w) in enumerate(zip(velocities, grads, weights, strict=True))
            ]
            moved = [
                w - rate * of_layer[i] * v
                for i, (w, v) in enumerate(zip(weights, velocities, strict=True))
            ]
            return t + 1, moved, velocities

        _, weights, _ = loop(
            step, (jnp.int32(0), start, [jnp.zeros_like(w) for w in start]), self.steps, 1
        )
        rows, wanted = _part("validation")
        loss = jnp.mean(_cross_entropy(logits(weights, rows), wanted))
        rows, wanted = _part("test")
        of_test = logits(weights, rows)
        test = {
            "loss": jnp.mean(_cross_entropy(of_test, wanted)),
            "accuracy": _accuracy(of_test, wanted),
        }
        return loss, test


@dataclass(frozen=True)
class Cleaning:
    """Trains a linear softmax classifier by gradient descent on weighted examples.

    A part of the labels is wrong. The hyperparameters are one number for each example, whose
    sigmoid is its weight. The held-out loss is that of clean examples.
    """

    steps: int = 100
    examples: int = 256
    wrong_part: float = 0.3
    rate: float = 2.0

    @functools.cached_property
    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the labels, and for each whether it is wrong."""
        generator = np.random.default_rng(1)
        labels = digits()["train"][1][: self.examples]
        wrong = np.zeros(self.examples, bool)
        wrong[generator.permutation(self.examples)[: round(self.wrong_part * self.examples)]] = True
        other = (labels + generator.integers(1, data.NUM_CLASSES, self.examples)) % data.NUM_CLASSES
        return np.where(wrong, other, labels), wrong

    def start(self) -> jax.Array:
        """The hyperparameters of equal weights."""
        return jnp.zeros(self.examples)

    def outcome(
        self, hyper: jax.Array, loop: Callable = straight
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Trains; returns (held-out loss, figures of the test part). `loop` runs the steps."""
        rows, _ = _part("train", self.examples)
        given, weight = jax.nn.one_hot(self.labels[0], data.NUM_CLASSES), jax.nn.sigmoid(hyper)
        weight = weight / jnp.mean(weight)

        def step(w: jax.Array) -> jax.Array:
            # the gradient of the weighted mean of cross entropies
            return (
                w
                - self.rate
                * rows.T
                @ (weight[:, None] * (jax.nn.softmax(rows @ w) - given))
                / self.examples
            )

        w = loop(step, jnp.zeros((rows.shape[1], data.NUM_CLASSES), rows.dtype), self.steps, 1)
        rows, wanted = _part("validation")
        loss = jnp.mean(_cross_entropy(rows @ w, wanted))
        rows, wanted = _part("test")
        of_test = rows @ w
        return loss, {
            "loss": jnp.mean(_cross_entropy(of_test, wanted)),
            "accuracy": _accuracy(of_test, wanted),
        }

    def found(self, hyper: Any) -> dict[str, float]:
        """Measures how well small weights identify wrong labels.

        "auc" is the area under the ROC curve. "precision" is the share of wrong labels among the
        smallest weights, of which it takes as many as there are wrong labels.
        """
        wrong, hyper = self.labels[1], np.asarray(hyper)
        below = hyper[wrong][:, None] - hyper[~wrong][None]
        least = np.argsort(hyper, kind="stable")[: wrong.sum()]
        return {
            "auc": float(np.mean((below < 0) + 0.5 * (below == 0))),
            "precision": float(wrong[least].mean()),
        }
