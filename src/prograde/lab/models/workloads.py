"""Training losses to measure the cost of: plain JAX functions of plain parameters, at fixed shapes.

Only cost matters here, so parameters and data are random. Sizes are arguments, so that tests can
run small versions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from prograde.lab import models
from prograde.lab.data import IMAGE_SIZE, NUM_CLASSES

Loss = Callable[..., tuple[Float[Array, ""], PyTree]]


@dataclass(frozen=True)
class Workload:
    """A loss to be trained.

    **Fields:** `init(key) -> (params, state)`: the state is what a step changes in addition to the
    parameters, which are running statistics of batch normalisation, or nothing;
    `batch(key) -> arrays`; `loss(params, state, *batch) -> (loss, state)`. Two more forms of the
    same loss are for backprop alone: `checkpointed_loss`, whose blocks are recomputed in reverse
    mode, and, where layers are scanned, `unrolled_loss`, which XLA reverses somewhat faster and
    compiles much slower. `sizes`: the arguments of the constructor, which another implementation
    of the same workload needs.
    """

    name: str
    title: str
    sizes: dict[str, int]
    init: Callable[[Key[Array, ""]], tuple[PyTree, PyTree]]
    batch: Callable[[Key[Array, ""]], tuple[Array, ...]]
    loss: Loss
    checkpointed_loss: Loss
    unrolled_loss: Loss | None = None


def _as_it_is(block: Callable) -> Callable:
    return block


def _matrices(key: Key[Array, ""], shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Draws normal entries of variance 1/fan-in for matrices, stacks of them and HWIO kernels.

    It is one draw for all, which compiles fast.
    """
    flat = jax.random.normal(key, (sum(map(math.prod, shapes.values())),))
    found, start = {}, 0
    for name, shape in shapes.items():
        fan_in = math.prod(shape[:-1]) if len(shape) == 4 else shape[-2]
        found[name] = flat[start : start + math.prod(shape)].reshape(shape) / math.sqrt(fan_in)
        start += math.prod(shape)
    return found


def _cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> Float[Array, ""]:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _network(
    name: str, title: str, network: Callable[[bool], models.Network], batch: int
) -> Workload:
    """A network of the paper as a workload."""

    def images_and_labels(key):
        key_x, key_y = jax.random.split(key)
        return (
            jax.random.uniform(key_x, (batch, IMAGE_SIZE, IMAGE_SIZE)),
            jax.random.randint(key_y, (batch,), 0, NUM_CLASSES),
        )

    def loss(checkpointed):
        return lambda params, state, images, labels: (
            network(checkpointed).loss(params, images, labels),
            state,
        )

    init = network(False).init
    return Workload(
        name,
        title,
        {"batch": batch},
        lambda key: (init(key), {}),
        images_and_labels,
        loss(False),
        loss(True),
    )


def logreg(batch: int = 64) -> Workload:
    """Multinomial logistic regression, 784-10."""
    return _network("logreg", f"Logistic regression, batch {batch}", models.logreg, batch)


def mlp(batch: int = 64) -> Workload:
    """The paper's multilayer perceptron."""
    return _network("mlp", f"MLP 784-1024-1024-10, batch {batch}", models.mlp, batch)


def mlp_large_batch(batch: int = 512) -> Workload:
    """The same MLP at a batch where the matrix products outweigh the update."""
    return _network("mlp-512", f"MLP 784-1024-1024-10, batch {batch}", models.mlp, batch)


def cnn(batch: int = 64) -> Workload:
    """The paper's convolutional network."""
    return _network("cnn", f"The paper's CNN, batch {batch}", models.cnn, batch)


def _layer_norm(norm: dict[str, Array], x: Array) -> Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]


def _attention(
    q: Float[Array, "batch heads groups time head"],
    k: Float[Array, "batch heads time head"],
    v: Float[Array, "batch heads time head"],
) -> Float[Array, "batch*time width"]:
    """Causal attention; each key and value head serves `groups` query heads."""
    batch, heads, groups, length, size = q.shape
    scores = jnp.einsum("bkgtd,bksd->bkgts", q * size**-0.5, k)
    scores += np.where(np.tril(np.ones((length, length), bool)), 0.0, -1e30).astype(scores.dtype)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", jax.nn.softmax(scores), v)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch * length, heads * groups * size)


def _heads(
    x: Float[Array, "batch*time width"], batch: int, *heads: int
) -> Float[Array, "batch *heads time head"]:
    """Splits the width of flattened tokens into heads, and brings the heads before the time."""
    split = x.reshape(batch, x.shape[0] // batch, *heads, -1)
    return jnp.moveaxis(split, 1, -2)


def transformer(
    layers: int = 6,
    width: int = 256,
    heads: int = 4,
    vocabulary: int = 256,
    batch: int = 4,
    length: int = 128,
) -> Workload:
    """A decoder like GPT-2: pre-norm, learned positions, GELU; next-token cross-entropy.

    Batch and time are flattened to one axis. With matrices, XLA's products for the reverse pass
    take two thirds of the time that they take otherwise.
    """

    def init(key):
        shapes = {
            "qkv": (layers, width, 3 * width),
            "out": (layers, width, width),
            "up": (layers, width, 4 * width),
            "down": (layers, 4 * width, width),
            "tokens": (vocabulary, width),
            "positions": (length, width),
            "head": (width, vocabulary),
        }
        drawn = _matrices(key, shapes)
        norm = {"scale": jnp.ones((layers, width)), "bias": jnp.zeros((layers, width))}
        stacked = {
            name: {"w": drawn[name], "b": jnp.zeros((layers, drawn[name].shape[-1]))}
            for name in ("qkv", "out", "up", "down")
        }
        return {
            "tokens": drawn["tokens"],
            "positions": drawn["positions"],
            "layers": {**stacked, "norm1": norm, "norm2": norm},
            "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            "head": drawn["head"],
        }, {}

    def dense(p, x):
        return x @ p["w"] + p["b"]

    def layer(h, p):
        q, k, v = jnp.split(dense(p["qkv"], _layer_norm(p["norm1"], h)), 3, axis=-1)
        mixed = _attention(
            _heads(q, batch, heads, 1), _heads(k, batch, heads), _heads(v, batch, heads)
        )
        h = h + dense(p["out"], mixed)
        return h + dense(p["down"], jax.nn.gelu(dense(p["up"], _layer_norm(p["norm2"], h)))), None

    def build(wrap=_as_it_is, unroll=1):
        def loss(params, state, tokens):
            h = (params["tokens"][tokens[:, :-1]] + params["positions"]).reshape(-1, width)
            h, _ = lax.scan(wrap(layer), h, params["layers"], unroll=unroll)
            return _cross_entropy(
                _layer_norm(params["norm"], h) @ params["head"], tokens[:, 1:].reshape(-1)
            ), state

        return loss

    sizes = dict(
        layers=layers, width=width, heads=heads, vocabulary=vocabulary, batch=batch, length=length
    )
    title = f"Transformer {layers} x {width}, {batch} x {length} tokens"

    def tokens(key):
        return (jax.random.randint(key, (batch, length + 1), 0, vocabulary),)

    losses = build(), build(jax.checkpoint), build(unroll=layers)
    return Workload("transformer", title, sizes, init, tokens, *losses)


def _rms_norm(scale: Array, x: Array) -> Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def _rotate(
    x: Float[Array, "*batch time head"], base: float = 100_000.0
) -> Float[Array, "*batch time head"]:
    """Rotary positions: the pair (i, i + head/2) turns by time / base^(2i/head)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[-2])[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def smollm2(
    layers: int = 30,
    width: int = 576,
    queries: int = 9,
    keys: int = 3,
    inner: int = 1536,
    vocabulary: int = 49152,
    batch: int = 4,
    length: int = 64,
) -> Workload:
    """The shapes of SmolLM2-135M with random weights, fine-tuned as a classifier by prompt.

    The loss is the cross-entropy of one token after each prompt, as in MeZO (arXiv 2305.17333).
    Only the last position is multiplied with the vocabulary.
    """
    head = width // queries

    def init(key):
        shapes = {
            "q": (layers, width, width),
            "k": (layers, width, keys * head),
            "v": (layers, width, keys * head),
            "o": (layers, width, width),
            "gate": (layers, width, inner),
            "up": (layers, width, inner),
            "down": (layers, inner, width),
            "embedding": (vocabulary, width),
        }
        stacked = _matrices(key, shapes)
        embedding = stacked.pop("embedding")
        stacked |= {"norm1": jnp.ones((layers, width)), "norm2": jnp.ones((layers, width))}
        return {"embedding": embedding, "layers": stacked, "norm": jnp.ones(width)}, {}

    def layer(h, p):
        x = _rms_norm(p["norm1"], h)
        q, k = (
            _rotate(_heads(x @ p["q"], batch, keys, queries // keys)),
            _rotate(_heads(x @ p["k"], batch, keys)),
        )
        h = h + _attention(q, k, _heads(x @ p["v"], batch, keys)) @ p["o"]
        x = _rms_norm(p["norm2"], h)
        return h + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

    def build(wrap=_as_it_is, unroll=1):
        def loss(params, state, tokens, labels):
            h = params["embedding"][tokens].reshape(-1, width)
            h, _ = lax.scan(wrap(layer), h, params["layers"], unroll=unroll)
            last = _rms_norm(params["norm"], h.reshape(batch, length, width)[:, -1])
            return _cross_entropy(last @ params["embedding"].T, labels), state

        return loss

    def tokens_and_labels(key):
        drawn = jax.random.randint(key, (batch, length + 1), 0, vocabulary)
        return drawn[:, :-1], drawn[:, -1]

    sizes = dict(layers=layers, width=width, queries=queries, keys=keys, inner=inner)
    sizes |= dict(vocabulary=vocabulary, batch=batch, length=length)
    title = f"SmolLM2-135M shapes, {batch} x {length} tokens, loss at the last position"
    losses = build(), build(jax.checkpoint), build(unroll=layers)
    return Workload("smollm2", title, sizes, init, tokens_and_labels, *losses)


_MOMENTUM = 0.1  # of the running statistics, as PyTorch counts it


def _batch_norm(
    norm: dict[str, Array], running: dict[str, Array], x: Array
) -> tuple[Array, dict[str, Array]]:
    """Normalises by the statistics of the batch; returns the running ones, moved towards them."""
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
        drawn = _matrices(key, shapes)
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

    def build(wrap=_as_it_is):
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
            return _cross_entropy(logits, labels), new

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


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "logreg": logreg,
    "mlp": mlp,
    "mlp-512": mlp_large_batch,
    "cnn": cnn,
    "resnet": resnet,
    "transformer": transformer,
    "smollm2": smollm2,
}
