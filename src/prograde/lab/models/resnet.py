"""A residual network as a workload, with batch normalisation in training mode."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from prograde.lab.data import NUM_CLASSES
from prograde.lab.models.workload import Workload, as_it_is, cross_entropy, matrices

_MOMENTUM = 0.1  # of the running statistics, in PyTorch's convention


def _batch_norm(
    norm: dict[str, Array], running: dict[str, Array], x: Array
) -> tuple[Array, dict[str, Array]]:
    """Normalises by the statistics of the batch, and updates the running statistics."""
    mean = jnp.mean(x, (0, 1, 2))
    var = jnp.mean(x * x, (0, 1, 2)) - mean * mean
    gain = norm["scale"] * lax.rsqrt(var + 1e-5)
    unbiased = var * (x.size / x.shape[-1]) / (x.size / x.shape[-1] - 1)
    new = {"mean": mean, "var": unbiased}
    running = jax.tree.map(lambda old, n: (1 - _MOMENTUM) * old + _MOMENTUM * n, running, new)
    return x * gain + (norm["bias"] - mean * gain), running


def _conv(kernel: Array, x: Array, stride: int = 1) -> Array:
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def resnet(batch: int = 64, size: int = 32, width: int = 32, stages: int = 3) -> Workload:
    """A residual network: a stem, stages of two basic blocks, global mean.

    Batch normalisation is in training mode.
    """
    # name of a block -> (channels in, channels out, stride)
    blocks = {}
    for i in range(stages):
        channels = width * 2**i
        blocks[f"stage{i}a"] = (width if i == 0 else channels // 2, channels, 1 if i == 0 else 2)
        blocks[f"stage{i}b"] = (channels, channels, 1)

    def norm(channels):
        return {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}

    def running(channels):
        return {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}

    def init(key):
        last = width * 2 ** (stages - 1)
        shapes = {"stem": (3, 3, 3, width), "out": (last, NUM_CLASSES)}
        for name, (inputs, outputs, _) in blocks.items():
            shapes |= {
                f"{name}/conv1": (3, 3, inputs, outputs),
                f"{name}/conv2": (3, 3, outputs, outputs),
            }
            if inputs != outputs:
                shapes[f"{name}/shortcut"] = (1, 1, inputs, outputs)
        drawn = matrices(key, shapes)
        params: dict[str, Any] = {"stem": {"conv": drawn["stem"], "norm": norm(width)}}
        params["out"] = {"w": drawn["out"], "b": jnp.zeros(NUM_CLASSES)}
        state: dict[str, Any] = {"stem": running(width)}
        for name, (inputs, outputs, _) in blocks.items():
            kernels = ["conv1", "conv2"] + ["shortcut"] * (inputs != outputs)
            norms = [f"norm{i + 1}" for i in range(len(kernels))]
            params[name] = {k: drawn[f"{name}/{k}"] for k in kernels} | {
                n: norm(outputs) for n in norms
            }
            state[name] = {n: running(outputs) for n in norms}
        return params, state

    def block(p, s, x, stride):
        new = {}
        h, new["norm1"] = _batch_norm(p["norm1"], s["norm1"], _conv(p["conv1"], x, stride))
        h, new["norm2"] = _batch_norm(p["norm2"], s["norm2"], _conv(p["conv2"], jax.nn.relu(h)))
        if "shortcut" in p:
            x, new["norm3"] = _batch_norm(p["norm3"], s["norm3"], _conv(p["shortcut"], x, stride))
        return jax.nn.relu(h + x), new

    def build(wrap=as_it_is):
        def loss(params, state, images, labels):
            new = {}
            h, new["stem"] = _batch_norm(
                params["stem"]["norm"], state["stem"], _conv(params["stem"]["conv"], images)
            )
            h = jax.nn.relu(h)
            for name, (_, _, stride) in blocks.items():
                h, new[name] = wrap(lambda p, s, x, stride=stride: block(p, s, x, stride))(
                    params[name], state[name], h
                )
            logits = jnp.mean(h, (1, 2)) @ params["out"]["w"] + params["out"]["b"]
            return cross_entropy(logits, labels), new

        return loss

    def images_and_labels(key):
        key_x, key_y = jax.random.split(key)
        return (
            jax.random.normal(key_x, (batch, size, size, 3)),
            jax.random.randint(key_y, (batch,), 0, NUM_CLASSES),
        )

    sizes = dict(batch=batch, size=size, width=width, stages=stages)
    title = f"ResNet, {2 * stages} blocks with batch normalisation, {size} x {size} images"
    title = f"{title}, batch {batch}"
    return Workload("resnet", title, sizes, init, images_and_labels, build(), build(jax.checkpoint))
