"""The functions and networks of the paper, and small networks of other kinds, as plain functions of plain parameters."""

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
    """A classifier of images: `init(key) -> params` and `logits(params, images) -> [batch, classes]`.

    Some have `local_losses(params, images, labels)` as well: many losses of each example, for `LocalLosses`.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    logits: Callable[[PyTree, Float[Array, "batch 28 28"]], Float[Array, "batch classes"]]
    local_losses: Callable[[PyTree, Array, Int[Array, " batch"]], PyTree[Array]] | None = None

    def loss(self, params: PyTree, images: Array, labels: Int[Array, " batch"]) -> Float[Array, ""]:
        """Mean softmax cross-entropy."""
        return jnp.mean(self.losses(params, images, labels))

    def losses(
        self, params: PyTree, images: Array, labels: Int[Array, " batch"]
    ) -> Float[Array, " batch"]:
        """Softmax cross-entropy of each example, for estimators that look at examples one by one."""
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(params, images), labels)

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
ROSENBROCK = Surface(
    _rosenbrock, start=(-1.0, 0.0), minimum=(1.0, 1.0), window=((-1.6, 1.6), (-0.6, 1.6))
)


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


def _merged_dense(layer: dict[str, Array], x: Array) -> Array:
    """The same, with all axes but the last taken as one: faster on a CPU, in reverse mode above all."""
    return _dense(layer, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


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


@dataclass(frozen=True)
class InputRMS:
    """For each row of the weights of `mlp` a scale of rms^-1/2, with the root mean square of its input on the batch at hand.

    A row's gradient is about as large as its input, so that these have about the least second moment: `Scaled`, "gradient",
    row by row. Inputs below `floor` times the root mean square of the layer's are taken as that.

    **Errors:** `ValueError` for parameters of another model.
    """

    floor: float = 0.1

    def __call__(self, params: PyTree, images: Array, labels: Array) -> PyTree:
        del labels
        if list(params) != ["hidden1", "hidden2", "out"]:
            raise ValueError(
                f"InputRMS knows the layers hidden1, hidden2 and out of mlp, but these are {', '.join(params)}."
            )
        h, scales = _flatten(images), {}
        for name, layer in params.items():
            squares = jnp.mean(jnp.square(h), axis=0)
            rms = jnp.sqrt(jnp.maximum(squares, self.floor**2 * jnp.mean(squares)))
            scales[name] = {"w": lax.rsqrt(rms)[:, None], "b": jnp.ones(())}
            h = jax.nn.relu(_dense(layer, h))
        return scales


def cnn(checkpointed: bool = False) -> Network:
    """Four 3x3 convolutions of 64 channels without padding, 2x2 max-pooling after the second and fourth, 1024-1024-10.

    `checkpointed` recomputes each pair of convolutions in reverse mode.
    """
    channels = {
        "conv1": (3, 3, 1, 64),
        "conv2": (3, 3, 64, 64),
        "conv3": (3, 3, 64, 64),
        "conv4": (3, 3, 64, 64),
    }
    dense = {"hidden1": (1024, 1024), "hidden2": (1024, 1024), "out": (1024, NUM_CLASSES)}

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

        def uniform(
            key, shape
        ):  # the variance that keeps activations of a ReLU network at their size
            return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * math.sqrt(
                6 / shape[-2]
            )

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


def _patches(
    images: Float[Array, "batch 28 28"], size: int
) -> Float[Array, "batch patches pixels"]:
    """The image cut into squares of `size` x `size`, row by row."""
    batch, n = images.shape[0], IMAGE_SIZE // size
    return images.reshape(batch, n, size, n, size).swapaxes(2, 3).reshape(batch, n * n, size * size)


def _norm(width: int) -> dict[str, Array]:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _standardised(x: Array) -> Array:
    """Mean 0 and mean square 1 along the last axis."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def _layer_norm(norm: dict[str, Array], x: Array) -> Array:
    return _standardised(x) * norm["scale"] + norm["bias"]


def _on_patches(
    size: int,
    width: int,
    depth: int,
    shapes: dict[str, tuple[int, ...]],
    block: Callable[[dict[str, Any], Array], Array],
    dense: Callable[[dict[str, Array], Array], Array],
) -> Network:
    """Patches embedded with their positions, `depth` residual blocks of layers of these shapes, the mean over patches."""
    num_patches = (IMAGE_SIZE // size) ** 2

    def init(key):
        key_in, key_out, key_positions, *keys = jax.random.split(key, 3 + depth)
        return {
            "in": _layer(key_in, (size * size, width)),
            "positions": 0.02 * jax.random.normal(key_positions, (num_patches, width)),
            **{
                f"block{i}": _layers(k, shapes) | {"norm1": _norm(width), "norm2": _norm(width)}
                for i, k in enumerate(keys)
            },
            "norm": _norm(width),
            "out": _layer(key_out, (width, NUM_CLASSES)),
        }

    def logits(params, images):
        h = dense(params["in"], _patches(images, size)) + params["positions"]
        for i in range(depth):
            h = block(params[f"block{i}"], h)
        return _dense(params["out"], jnp.mean(_layer_norm(params["norm"], h), axis=1))

    return Network(init, logits)


def mixer(
    merged: bool = False,
    size: int = 7,
    width: int = 64,
    depth: int = 4,
    across: int = 64,
    hidden: int = 256,
) -> Network:
    """A small MLP-mixer (arXiv 2105.01601): in each block an MLP across the patches, then one across the channels.

    With `merged`, examples and patches are one axis in products of matrices. Estimators that look at examples one by one
    need them apart.
    """
    num_patches = (IMAGE_SIZE // size) ** 2
    dense = _merged_dense if merged else _dense
    shapes = {
        "patches1": (num_patches, across),
        "patches2": (across, num_patches),
        "channels1": (width, hidden),
        "channels2": (hidden, width),
    }

    def block(p, h):
        z = _layer_norm(p["norm1"], h).swapaxes(1, 2)
        h = h + dense(p["patches2"], jax.nn.gelu(dense(p["patches1"], z))).swapaxes(1, 2)
        z = _layer_norm(p["norm2"], h)
        return h + dense(p["channels2"], jax.nn.gelu(dense(p["channels1"], z)))

    return _on_patches(size, width, depth, shapes, block, dense)


def transformer(
    merged: bool = False,
    size: int = 7,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    hidden: int = 256,
) -> Network:
    """A small vision transformer (arXiv 2010.11929), pre-norm, with the mean over patches in place of a class token.

    `merged`: as for `mixer`.
    """
    dense = _merged_dense if merged else _dense
    shapes = {
        "qkv": (width, 3 * width),
        "mixed": (width, width),
        "up": (width, hidden),
        "down": (hidden, width),
    }

    def block(p, h):
        batch, length, _ = h.shape
        z = dense(p["qkv"], _layer_norm(p["norm1"], h)).reshape(
            batch, length, 3, heads, width // heads
        )
        q, k, v = z[:, :, 0], z[:, :, 1], z[:, :, 2]
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(
            batch, length, width
        )
        h = h + dense(p["mixed"], mixed)
        z = _layer_norm(p["norm2"], h)
        return h + dense(p["down"], jax.nn.gelu(dense(p["up"], z)))

    return _on_patches(size, width, depth, shapes, block, dense)


def local_mixer(
    merged: bool = False, width: int = 256, groups: int = 1, depth: int = 1, side: int = 1
) -> Network:
    """LocalMixer of Ren et al. (arXiv 2210.03310): `side` x `side` patches, `depth` blocks, channels in `groups`, a loss for each.

    Each block mixes channels, then those of each group by themselves; from the second on it mixes patches first and adds its
    input. Everything is standardised within its group, so that groups meet in the shared layers alone. `local_losses` gives each
    patch and group of a block the loss of the block's own classifier, of which it moves its own part only; blocks and the
    classifier at the end do not reach back. S/1/1 is width 256 and one group, M/1/16 width 512 and 16 groups.
    """
    patches, size = side * side, IMAGE_SIZE // side
    dense = _merged_dense if merged else _dense

    def init(key):
        key_out, *keys = jax.random.split(key, 1 + depth)
        blocks = []
        for i, (key_patches, key_shared, key_own, key_classifier) in enumerate(
            jax.random.split(k, 4) for k in keys
        ):
            block = {
                "shared": _kaiming(key_shared, (width if i else size * size, width)),
                "own": _kaiming(key_own, (groups, width // groups, width // groups)),
                "classifier": _kaiming(key_classifier, (groups, width // groups, NUM_CLASSES)),
            }
            blocks.append(
                block | ({"patches": _kaiming(key_patches, (patches, patches))} if i else {})
            )
        return {"blocks": blocks, "out": _kaiming(key_out, (width, NUM_CLASSES))}

    def grouped(x):
        return _standardised(x.reshape(*x.shape[:-1], groups, -1))

    def block(p, h, first):
        """[batch, patches, groups, channels of a group], from the same or, in the first block, from pixels."""
        x = h if first else h.reshape(*h.shape[:2], width)
        if not first:
            x = jax.nn.relu(_standardised(dense(p["patches"], x.swapaxes(1, 2)))).swapaxes(1, 2)
        x = jax.nn.relu(grouped(dense(p["shared"], x)))
        x = _standardised(jnp.einsum("bpgc,gcd->bpgd", x, p["own"]["w"]) + p["own"]["b"])
        return jax.nn.relu(x if first else x + h)

    def images_of(images):
        x = _patches(images, size)
        return (x - 0.1307) / 0.3081  # mean and deviation of MNIST

    def features(h):
        return _standardised(jnp.mean(h, axis=1).reshape(len(h), width))

    def logits(params, images):
        h = images_of(images)
        for i, p in enumerate(params["blocks"]):
            h = block(p, h, i == 0)
        return _dense(params["out"], features(h))

    def local_losses(params, images, labels):
        h, losses = images_of(images), []
        for i, p in enumerate(params["blocks"]):
            h = block(p, lax.stop_gradient(h), i == 0)
            parts = (
                jnp.einsum("bpgc,gck->bpgk", _standardised(h), p["classifier"]["w"])
                + p["classifier"]["b"]
            )
            parts = parts / patches
            whole = parts + lax.stop_gradient(jnp.sum(parts, axis=(1, 2), keepdims=True) - parts)
            picked = jnp.broadcast_to(labels[:, None, None], whole.shape[:-1])
            losses.append(optax.softmax_cross_entropy_with_integer_labels(whole, picked))
        last = _dense(params["out"], features(lax.stop_gradient(h)))
        return {
            "blocks": losses,
            "out": optax.softmax_cross_entropy_with_integer_labels(last, labels),
        }

    return Network(init, logits, local_losses)


def _kaiming(key: Key[Array, ""], shape: tuple[int, ...]) -> dict[str, Array]:
    """Normal with deviation 2/sqrt(fan-in), at most 0.1, as the LocalMixer is initialised; biases zero."""
    deviation = min(2 / math.sqrt(shape[-2]), 0.1)
    return {
        "w": deviation * jax.random.normal(key, shape),
        "b": jnp.zeros((*shape[:-2], shape[-1])),
    }
