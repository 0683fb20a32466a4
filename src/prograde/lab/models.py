"""The functions and networks of the paper, as plain functions of plain parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from prograde.lab.data import IMAGE_SIZE, NUM_CLASSES

PIXELS = IMAGE_SIZE * IMAGE_SIZE


@dataclass(frozen=True)
class Surface:
    """A function of a few variables to be minimised from one start.

    `minimum` is where its least value, 0, is; `window` is the part of the plane that is drawn, ((x, x), (y, y)).
    """

    fun: Callable[[Float[Array, " n"]], Float[Array, ""]]
    start: tuple[float, ...]
    minimum: tuple[float, ...]
    window: tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Network:
    """A classifier of images: `init(key) -> params` and `logits(params, images) -> [batch, classes]`."""

    init: Callable[[Key[Array, ""]], PyTree]
    logits: Callable[[PyTree, Float[Array, "batch 28 28"]], Float[Array, "batch classes"]]

    def loss(self, params: PyTree, images: Array, labels: Int[Array, " batch"]) -> Float[Array, ""]:
        """Mean softmax cross-entropy."""
        logits = self.logits(params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def loss_and_hits(self, params: PyTree, images: Array, labels: Array) -> tuple[Array, Array]:
        """Per-example losses, and whether each example is classified correctly."""
        logits = self.logits(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, jnp.argmax(logits, axis=-1) == labels


def _beale(p: Float[Array, " 2"]) -> Float[Array, ""]:
    x, y = p
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _rosenbrock(p: Float[Array, " n"]) -> Float[Array, ""]:
    return jnp.sum(100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2)


BEALE = Surface(_beale, start=(1.0, 1.5), minimum=(3.0, 0.5), window=((0.0, 4.0), (-1.0, 2.0)))
ROSENBROCK = Surface(_rosenbrock, start=(-1.0, 0.0), minimum=(1.0, 1.0), window=((-1.6, 1.6), (-0.6, 1.6)))


def _layer(key: Key[Array, ""], shape: tuple[int, ...]) -> dict[str, Array]:
    """Uniform in +-1/sqrt(fan-in), weights and biases, as PyTorch initialises the layers of the paper."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    key_w, key_b = jax.random.split(key)
    return {
        "w": jax.random.uniform(key_w, shape, minval=-bound, maxval=bound),
        "b": jax.random.uniform(key_b, shape[-1:], minval=-bound, maxval=bound),
    }


def _layers(key: Key[Array, ""], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    keys = jax.random.split(key, len(shapes))
    return {name: _layer(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _dense(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def _flatten(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _maybe_checkpoint(block: Callable, checkpointed: bool) -> Callable:
    return jax.checkpoint(block) if checkpointed else block


def logreg(checkpointed: bool = False) -> Network:
    """Multinomial logistic regression. It has no hidden layer, so there is nothing to checkpoint."""
    del checkpointed
    return Network(
        init=lambda key: _layers(key, {"out": (PIXELS, NUM_CLASSES)}),
        logits=lambda params, images: _dense(params["out"], _flatten(images)),
    )


def mlp(checkpointed: bool = False) -> Network:
    """784-1024-1024-10 with ReLU. `checkpointed` recomputes the hidden layers in reverse mode."""
    shapes = {"hidden1": (PIXELS, 1024), "hidden2": (1024, 1024), "out": (1024, NUM_CLASSES)}
    hidden = _maybe_checkpoint(lambda layer, h: jax.nn.relu(_dense(layer, h)), checkpointed)

    def logits(params, images):
        h = hidden(params["hidden1"], _flatten(images))
        h = hidden(params["hidden2"], h)
        return _dense(params["out"], h)

    return Network(lambda key: _layers(key, shapes), logits)


def cnn(checkpointed: bool = False) -> Network:
    """Four 3x3 convolutions of 64 channels without padding, 2x2 max-pooling after the second and fourth, 1024-1024-10.

    `checkpointed` recomputes each pair of convolutions in reverse mode.
    """
    channels = {"conv1": (3, 3, 1, 64), "conv2": (3, 3, 64, 64), "conv3": (3, 3, 64, 64), "conv4": (3, 3, 64, 64)}
    dense = {"hidden1": (1024, 1024), "hidden2": (1024, 1024), "out": (1024, NUM_CLASSES)}

    def conv(layer, x):
        z = lax.conv_general_dilated(x, layer["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(z + layer["b"])

    def pair(first, second, x):
        h = conv(second, conv(first, x))
        return lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    block = _maybe_checkpoint(pair, checkpointed)

    def logits(params, images):
        h = block(params["conv1"], params["conv2"], images[..., None])
        h = block(params["conv3"], params["conv4"], h)
        h = jax.nn.relu(_dense(params["hidden1"], _flatten(h)))
        h = jax.nn.relu(_dense(params["hidden2"], h))
        return _dense(params["out"], h)

    return Network(lambda key: _layers(key, channels | dense), logits)


def deep(depth: int, width: int = 1024, checkpointed: bool = False) -> Network:
    """`depth` layers without bias between an input and an output layer, scanned over their stacked weights.

    With `checkpointed` the layers are cut into about sqrt(depth) segments, and reverse mode stores only what enters a
    segment and recomputes the rest: the usual way to train a deep network in little memory.
    """
    segment = max(d for d in range(1, math.isqrt(depth) + 1) if depth % d == 0)

    def init(key):
        key_in, key_hidden, key_out = jax.random.split(key, 3)

        def uniform(key, shape):  # the variance that keeps activations of a ReLU network at their size
            return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * math.sqrt(6 / shape[-2])

        return {
            "in": uniform(key_in, (PIXELS, width)),
            "hidden": uniform(key_hidden, (depth, width, width)),
            "out": uniform(key_out, (width, NUM_CLASSES)),
        }

    def layer(h, w):
        return jax.nn.relu(h @ w), None

    def logits(params, images):
        h = jax.nn.relu(_flatten(images) @ params["in"])
        if checkpointed:
            stacked = params["hidden"].reshape(depth // segment, segment, width, width)
            h, _ = lax.scan(jax.checkpoint(lambda h, ws: lax.scan(layer, h, ws)), h, stacked)
        else:
            h, _ = lax.scan(layer, h, params["hidden"])
        return h @ params["out"]

    return Network(init, logits)
