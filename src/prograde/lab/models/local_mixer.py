"""The LocalMixer of Ren et al. (arXiv 2210.03310): a network with many local losses."""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Key

from prograde.lab.data import IMAGE_SIZE, NUM_CLASSES
from prograde.lab.models.layers import dense, merged_dense, patches_of, standardised
from prograde.lab.models.network import Network


def local_mixer(
    merged: bool = False, width: int = 256, groups: int = 1, depth: int = 1, side: int = 1
) -> Network:
    """The LocalMixer: `side` x `side` patches, `depth` blocks, a loss for each of `groups`.

    Each block mixes channels, then the channels of each group separately. From the second block on,
    it mixes patches first and adds its input. Values are standardised within their group, so that
    groups mix only in the shared layers. `local_losses` gives each patch and group of a block the
    loss of the block's own classifier, of which each changes only its own part. Derivatives of a
    block, and of the classifier at the end, stop at its input. S/1/1 has width 256 and one group,
    M/1/16 width 512 and 16 groups.
    """
    patches, size = side * side, IMAGE_SIZE // side
    product = merged_dense if merged else dense

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
        return standardised(x.reshape(*x.shape[:-1], groups, -1))

    def block(p, h, first):
        """Maps [batch, patches, groups, channels], or pixels in the first block, to that shape."""
        x = h if first else h.reshape(*h.shape[:2], width)
        if not first:
            x = jax.nn.relu(standardised(product(p["patches"], x.swapaxes(1, 2)))).swapaxes(1, 2)
        x = jax.nn.relu(grouped(product(p["shared"], x)))
        x = standardised(jnp.einsum("bpgc,gcd->bpgd", x, p["own"]["w"]) + p["own"]["b"])
        return jax.nn.relu(x if first else x + h)

    def images_of(images):
        x = patches_of(images, size)
        return (x - 0.1307) / 0.3081  # mean and deviation of MNIST

    def features(h):
        return standardised(jnp.mean(h, axis=1).reshape(len(h), width))

    def logits(params, images):
        h = images_of(images)
        for i, p in enumerate(params["blocks"]):
            h = block(p, h, i == 0)
        return dense(params["out"], features(h))

    def local_losses(params, images, labels):
        h, losses = images_of(images), []
        for i, p in enumerate(params["blocks"]):
            h = block(p, lax.stop_gradient(h), i == 0)
            parts = (
                jnp.einsum("bpgc,gck->bpgk", standardised(h), p["classifier"]["w"])
                + p["classifier"]["b"]
            )
            parts = parts / patches
            whole = parts + lax.stop_gradient(jnp.sum(parts, axis=(1, 2), keepdims=True) - parts)
            picked = jnp.broadcast_to(labels[:, None, None], whole.shape[:-1])
            losses.append(optax.softmax_cross_entropy_with_integer_labels(whole, picked))
        last = dense(params["out"], features(lax.stop_gradient(h)))
        return {
            "blocks": losses,
            "out": optax.softmax_cross_entropy_with_integer_labels(last, labels),
        }

    return Network(init, logits, local_losses)


def _kaiming(key: Key[Array, ""], shape: tuple[int, ...]) -> dict[str, Array]:
    """Draws normal weights of deviation 2/sqrt(fan-in), at most 0.1, with zero biases."""
    deviation = min(2 / math.sqrt(shape[-2]), 0.1)
    return {
        "w": deviation * jax.random.normal(key, shape),
        "b": jnp.zeros((*shape[:-2], shape[-1])),
    }
