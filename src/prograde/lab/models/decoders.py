"""Text decoders as workloads: one like GPT-2, and one with the shapes of SmolLM2."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from prograde.lab.models.workload import Workload, as_it_is, cross_entropy, matrices


def _layer_norm(norm: dict[str, Array], x: Array) -> Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]


def _attention(
    q: Float[Array, "batch heads groups time head"],
    k: Float[Array, "batch heads time head"],
    v: Float[Array, "batch heads time head"],
) -> Float[Array, "batch*time width"]:
    """Causal attention. Each key and value head serves `groups` query heads."""
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

    Batch and time are flattened to one axis, so that all products are of matrices. The products of
    XLA's reverse pass then take two thirds of the time.
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
        drawn = matrices(key, shapes)
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

    def build(wrap=as_it_is, unroll=1):
        def loss(params, state, tokens):
            h = (params["tokens"][tokens[:, :-1]] + params["positions"]).reshape(-1, width)
            h, _ = lax.scan(wrap(layer), h, params["layers"], unroll=unroll)
            return cross_entropy(
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
    """A decoder with the shapes of SmolLM2-135M and random weights, fine-tuned by prompts.

    The loss is the cross-entropy of one token after each prompt, as in MeZO (arXiv 2305.17333).
    Only the last position is multiplied by the matrix of the vocabulary.
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
        stacked = matrices(key, shapes)
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

    def build(wrap=as_it_is, unroll=1):
        def loss(params, state, tokens, labels):
            h = params["embedding"][tokens].reshape(-1, width)
            h, _ = lax.scan(wrap(layer), h, params["layers"], unroll=unroll)
            last = _rms_norm(params["norm"], h.reshape(batch, length, width)[:, -1])
            return cross_entropy(last @ params["embedding"].T, labels), state

        return loss

    def tokens_and_labels(key):
        drawn = jax.random.randint(key, (batch, length + 1), 0, vocabulary)
        return drawn[:, :-1], drawn[:, -1]

    sizes = dict(layers=layers, width=width, queries=queries, keys=keys, inner=inner)
    sizes |= dict(vocabulary=vocabulary, batch=batch, length=length)
    title = f"SmolLM2-135M shapes, {batch} x {length} tokens, loss at the last position"
    losses = build(), build(jax.checkpoint), build(unroll=layers)
    return Workload("smollm2", title, sizes, init, tokens_and_labels, *losses)
