"""The networks of the paper: logistic regression, a multilayer perceptron, a CNN, deep networks."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from prograde.lab.data import IMAGE_SIZE, NUM_CLASSES
from prograde.lab.models.layers import dense, flatten, layers
from prograde.lab.models.network import Network

PIXELS = IMAGE_SIZE * IMAGE_SIZE


def _maybe_checkpoint(block: Callable, checkpointed: bool) -> Callable:
    return jax.checkpoint(block) if checkpointed else block


def logreg(checkpointed: bool = False) -> Network:
    """Multinomial logistic regression. Without a hidden layer there is nothing to checkpoint."""
    del checkpointed
    return Network(
        init=lambda key: layers(key, {"out": (PIXELS, NUM_CLASSES)}),
        logits=lambda params, images: dense(params["out"], flatten(images)),
    )


def mlp(checkpointed: bool = False) -> Network:
    """784-1024-1024-10 with ReLU. `checkpointed` recomputes the hidden layers in reverse mode."""
    shapes = {"hidden1": (PIXELS, 1024), "hidden2": (1024, 1024), "out": (1024, NUM_CLASSES)}
    hidden = _maybe_checkpoint(lambda layer, h: jax.nn.relu(dense(layer, h)), checkpointed)

    def logits(params, images):
        h = hidden(params["hidden1"], flatten(images))
        h = hidden(params["hidden2"], h)
        return dense(params["out"], h)

    return Network(lambda key: layers(key, shapes), logits)


def cnn(checkpointed: bool = False) -> Network:
    """The CNN: four 3x3 convolutions of 64 channels without padding, then 1024-1024-10.

    A 2x2 max-pooling follows the second and the fourth. `checkpointed` recomputes each pair of
    convolutions in reverse mode.
    """
    channels = {
        "conv1": (3, 3, 1, 64),
        "conv2": (3, 3, 64, 64),
        "conv3": (3, 3, 64, 64),
        "conv4": (3, 3, 64, 64),
    }
    hidden = {"hidden1": (1024, 1024), "hidden2": (1024, 1024), "out": (1024, NUM_CLASSES)}

    def conv(layer, x):
        z = lax.conv_general_dilated(
            x, layer["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(z + layer["b"])

    def pair(first, second, x):
        h = conv(second, conv(first, x))
        return lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    block = _maybe_checkpoint(pair, checkpointed)

    def logits(params, images):
        h = block(params["conv1"], params["conv2"], images[..., None])
        h = block(params["conv3"], params["conv4"], h)
        h = jax.nn.relu(dense(params["hidden1"], flatten(h)))
        h = jax.nn.relu(dense(params["hidden2"], h))
        return dense(params["out"], h)

    return Network(lambda key: layers(key, channels | hidden), logits)


def deep(depth: int, width: int = 1024, checkpointed: bool = False) -> Network:
    """A deep network: `depth` layers without bias between an input and an output layer.

    The layers are scanned over their stacked weights. With `checkpointed` they are cut into about
    sqrt(depth) segments. Reverse mode stores only what enters a segment and recomputes the rest,
    the usual way to train a deep network in little memory.
    """
    segment = max(d for d in range(1, math.isqrt(depth) + 1) if depth % d == 0)

    def init(key):
        key_in, key_hidden, key_out = jax.random.split(key, 3)

        def uniform(key, shape):
            """The variance that keeps the activations of a ReLU network at their size."""
            draw = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
            return draw * math.sqrt(6 / shape[-2])

        return {
            "in": uniform(key_in, (PIXELS, width)),
            "hidden": uniform(key_hidden, (depth, width, width)),
            "out": uniform(key_out, (width, NUM_CLASSES)),
        }

    def layer(h, w):
        return jax.nn.relu(h @ w), None

    def logits(params, images):
        h = jax.nn.relu(flatten(images) @ params["in"])
        if checkpointed:
            stacked = params["hidden"].reshape(depth // segment, segment, width, width)
            h, _ = lax.scan(jax.checkpoint(lambda h, ws: lax.scan(layer, h, ws)), h, stacked)
        else:
            h, _ = lax.scan(layer, h, params["hidden"])
        return h @ params["out"]

    return Network(init, logits)
