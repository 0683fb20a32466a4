"""Small networks on patches of an image: an MLP-mixer and a vision transformer."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from prograde.lab.data import IMAGE_SIZE, NUM_CLASSES
from prograde.lab.models.layers import (
    dense,
    layer,
    layer_norm,
    layers,
    merged_dense,
    norm,
    patches_of,
)
from prograde.lab.models.network import Network


def _on_patches(
    size: int,
    width: int,
    depth: int,
    shapes: dict[str, tuple[int, ...]],
    block: Callable[[dict[str, Any], Array], Array],
    product: Callable[[dict[str, Array], Array], Array],
) -> Network:
    """Embeds patches with their positions, applies `depth` residual blocks, classifies their mean.

    `shapes` are those of the layers of a block.
    """
    num_patches = (IMAGE_SIZE // size) ** 2

    def init(key):
        key_in, key_out, key_positions, *keys = jax.random.split(key, 3 + depth)
        return {
            "in": layer(key_in, (size * size, width)),
            "positions": 0.02 * jax.random.normal(key_positions, (num_patches, width)),
            **{
                f"block{i}": layers(k, shapes) | {"norm1": norm(width), "norm2": norm(width)}
                for i, k in enumerate(keys)
            },
            "norm": norm(width),
            "out": layer(key_out, (width, NUM_CLASSES)),
        }

    def logits(params, images):
        h = product(params["in"], patches_of(images, size)) + params["positions"]
        for i in range(depth):
            h = block(params[f"block{i}"], h)
        return dense(params["out"], jnp.mean(layer_norm(params["norm"], h), axis=1))

    return Network(init, logits)


def mixer(
    merged: bool = False,
    size: int = 7,
    width: int = 64,
    depth: int = 4,
    across: int = 64,
    hidden: int = 256,
) -> Network:
    """A small MLP-mixer (arXiv 2105.01601): each block mixes the patches, then the channels.

    With `merged`, examples and patches are one axis in products of matrices. Estimators that need
    separate examples need `merged=False`.
    """
    num_patches = (IMAGE_SIZE // size) ** 2
    product = merged_dense if merged else dense
    shapes = {
        "patches1": (num_patches, across),
        "patches2": (across, num_patches),
        "channels1": (width, hidden),
        "channels2": (hidden, width),
    }

    def block(p, h):
        z = layer_norm(p["norm1"], h).swapaxes(1, 2)
        h = h + product(p["patches2"], jax.nn.gelu(product(p["patches1"], z))).swapaxes(1, 2)
        z = layer_norm(p["norm2"], h)
        return h + product(p["channels2"], jax.nn.gelu(product(p["channels1"], z)))

    return _on_patches(size, width, depth, shapes, block, product)


def transformer(
    merged: bool = False,
    size: int = 7,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    hidden: int = 256,
) -> Network:
    """A small vision transformer (arXiv 2010.11929), pre-norm.

    The mean over patches takes the place of a class token. `merged`: as for `mixer`.
    """
    product = merged_dense if merged else dense
    shapes = {
        "qkv": (width, 3 * width),
        "mixed": (width, width),
        "up": (width, hidden),
        "down": (hidden, width),
    }

    def block(p, h):
        batch, length, _ = h.shape
        z = product(p["qkv"], layer_norm(p["norm1"], h)).reshape(
            batch, length, 3, heads, width // heads
        )
        q, k, v = z[:, :, 0], z[:, :, 1], z[:, :, 2]
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(
            batch, length, width
        )
        h = h + product(p["mixed"], mixed)
        z = layer_norm(p["norm2"], h)
        return h + product(p["down"], jax.nn.gelu(product(p["up"], z)))

    return _on_patches(size, width, depth, shapes, block, product)
