"""A Llama-family decoder, scanned over layers.

Grouped-query attention, rotary positions, RMSNorm, gated feed-forward layers.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from prograde.lm.architecture import Architecture
from prograde.lm.quantized import Quantized

Matrix = Float[Array, "*layers inputs outputs"] | Quantized


class LowRankUpdate(eqx.Module):
    """A matrix that stays as it is, plus a product of two thin matrices that are learned.

        W = base + down @ up

    **Fields:** `base`, an array or `Quantized`; `down` and `up`.

    **Cost:** (inputs + outputs) x rank multiply-adds a token in addition to those of the base. The
    product is not formed.

    **Source:** LoRA, arXiv 2106.09685.

    Examples:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from prograde.lm import Architecture, Decoder, LowRankUpdate
        >>> tiny = Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> model = Decoder.create(jax.random.key(0), tiny)
        >>> query = model.segments[0].query
        >>> update = LowRankUpdate(query, jnp.ones((2, 64, 1)), jnp.zeros((2, 1, 64)))
        >>> learned = eqx.tree_at(lambda m: m.segments[0].query, model, update)
        >>> learned(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 64)
    """

    base: Matrix
    down: Float[Array, "*layers inputs rank"]
    up: Float[Array, "*layers rank outputs"]


class Blocks(eqx.Module):
    """Layers that follow each other. Their arrays are stacked along the first axis.

    **Fields:** a norm scale, matrix or bias of all the layers each, by the names of
    `matrix_shapes`. Biases are `None` where the architecture has none.

    **Source:** arXiv 2302.13971.

    Examples:
        >>> import jax
        >>> from prograde.lm import Architecture, Decoder
        >>> tiny = Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> (blocks,) = Decoder.create(jax.random.key(0), tiny).segments
        >>> blocks.count, blocks.query.shape
        (2, (2, 64, 64))
    """

    attention_norm: Float[Array, "layers width"]
    query: Any
    key: Any
    value: Any
    output: Any
    feed_norm: Float[Array, "layers width"]
    gate: Any
    up: Any
    down: Any
    query_bias: Float[Array, "layers outputs"] | None = None
    key_bias: Float[Array, "layers outputs"] | None = None
    value_bias: Float[Array, "layers outputs"] | None = None

    @property
    def count(self) -> int:
        """The number of layers."""
        return len(self.attention_norm)

    def __getitem__(self, layers: slice) -> "Blocks":
        return jax.tree.map(lambda x: x[layers], self)


class Decoder(eqx.Module):
    """A language model, as a tree of arrays.

    **Fields:** `embedding` [vocabulary, width]; `segments`, the layers in one or several stacks
    (see `split`); `norm`; `head` [width, vocabulary], or `None` where the embedding is the head;
    `architecture`, static.

    Matrices have their inputs first, [inputs, outputs]. They may be arrays, `Quantized`, or a
    `LowRankUpdate` of either. The embedding is an array or `Quantized`.

    **Cost:** about 2 multiply-adds per weight and token, and the memory of one layer at a time.

    **Source:** arXiv 2302.13971.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde.lm import Architecture, Decoder
        >>> tiny = Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> model = Decoder.create(jax.random.key(0), tiny)
        >>> model.logits(model(jnp.zeros((1, 8), jnp.int32))).shape
        (1, 8, 256)
    """

    embedding: Any
    segments: tuple[Blocks, ...]
    norm: Float[Array, " width"]
    head: Any
    architecture: Architecture = eqx.field(static=True)

    @classmethod
    def create(
        cls, key: Key[Array, ""], architecture: Architecture, dtype: Any = jnp.float32
    ) -> "Decoder":
        """A decoder with random weights."""
        a = architecture
        shapes = matrix_shapes(a)
        keys = iter(jax.random.split(key, len(shapes) + 2))
        stack = {
            name: jax.random.normal(next(keys), (a.num_layers, *shape), dtype)
            / np.sqrt(shape[0]).astype(dtype)
            for name, shape in shapes.items()
        }
        norms = {
            name: jnp.ones((a.num_layers, a.width), dtype)
            for name in ("attention_norm", "feed_norm")
        }
        biases = {}
        if a.attention_bias:
            biases = {
                f"{name}_bias": jnp.zeros((a.num_layers, shapes[name][1]), dtype)
                for name in ("query", "key", "value")
            }
        embedding = jax.random.normal(next(keys), (a.vocab_size, a.width), dtype)
        head = (
            None
            if a.tied
            else jax.random.normal(next(keys), (a.width, a.vocab_size), dtype) / a.width**0.5
        )
        return cls(
            embedding, (Blocks(**norms, **stack, **biases),), jnp.ones(a.width, dtype), head, a
        )

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return self.norm.dtype

    def split(self, first: int, last: int) -> "Decoder":
        """The same model with the layers `first` to `last` - 1 as a stack of their own.

        Such a stack can be trained, or kept as it is, apart from the others.

        **Errors:** `ValueError` for layers the model does not have, or none.
        """
        count = self.architecture.num_layers
        if not 0 <= first < last <= count:
            raise ValueError(
                f"layers {first} to {last} of {count}: from 0 to {count}, and at least one, are "
                "allowed."
            )
        (blocks,) = self.joined().segments
        cuts = [slice(0, first), slice(first, last), slice(last, count)]
        segments = tuple(blocks[cut] for cut in cuts if cut.stop > cut.start)
        return eqx.tree_at(lambda m: m.segments, self, segments)

    def joined(self) -> "Decoder":
        """The same model with all layers in one stack.

        **Errors:** `ValueError` for stacks whose matrices are of different kinds, such as where
        only one has a `LowRankUpdate`.
        """
        if len(self.segments) == 1:
            return self
        kinds = {jax.tree.structure(blocks) for blocks in self.segments}
        if len(kinds) > 1:
            raise ValueError(
                "the segments differ in the kinds of their matrices (arrays, Quantized, "
                "LowRankUpdate), and cannot be one stack. Add each LowRankUpdate to its matrix, or "
                "keep the segments."
            )
        blocks = jax.tree.map(lambda *x: jnp.concatenate(x), *self.segments)
        return eqx.tree_at(lambda m: m.segments, self, (blocks,))

    def __call__(
        self, tokens: Int[Array, "batch length"], valid: Bool[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length width"]:
        """The residual stream after the last layer, normalised. No token attends to padding.

        `valid` is false for padding, which may be at either end.
        """
        states = self.embed(tokens)
        return self.finish(self.layers(states, valid, self.segments))

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The embeddings of tokens."""
        if isinstance(self.embedding, Quantized):
            return self.embedding.rows(tokens).astype(self.dtype)
        return self.embedding[tokens]

    def layers(
        self,
        states: Float[Array, "batch length width"],
        valid: Bool[Array, "batch length"] | None,
        segments: Sequence[Blocks],
    ) -> Float[Array, "batch length width"]:
        """The residual stream after some of the segments."""
        length = states.shape[1]
        rotation = _rotation(self.architecture, length)
        mask = jnp.tril(jnp.ones((length, length), bool))[None]
        if self.architecture.window is not None:
            mask = mask & ~jnp.tril(jnp.ones((length, length), bool), -self.architecture.window)
        if valid is not None:  # padding attends to itself so that softmax stays defined
            mask = mask & valid[:, None, :] | jnp.eye(length, dtype=bool)[None]
        for blocks in segments:
            states, _ = lax.scan(
                lambda h, block: (self._block(h, block, mask, rotation), None), states, blocks
            )
        return states

    def finish(self, states: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The input of the head: the residual stream, normalised."""
        return _rms_norm(states, self.norm, self.architecture.norm_eps)

    def logits(
        self,
        states: Float[Array, "*batch width"],
        tokens: Int[np.ndarray, " choices"] | None = None,
    ) -> Float[Array, "*batch choices"]:
        """The logits of all tokens of the vocabulary, or of those in `tokens`."""
        if tokens is not None and self.head is None:
            return states @ self.embed(jnp.asarray(tokens)).astype(states.dtype).T
        if self.head is not None:
            return _times(
                states, self.head if tokens is None else _of_outputs(self.head, jnp.asarray(tokens))
            )
        weight = (
            self.embedding.dense(states.dtype).mT
            if isinstance(self.embedding, Quantized)
            else self.embedding
        )
        return states @ weight.T

    def _block(
        self, states: Array, block: Blocks, mask: Array, rotation: tuple[Array, Array]
    ) -> Array:
        a = self.architecture
        batch, length, _ = states.shape
        x = _rms_norm(states, block.attention_norm, a.norm_eps)

        def heads(weight: Any, bias: Array | None, count: int) -> Array:
            z = _times(x, weight)
            z = z if bias is None else z + bias
            return z.reshape(batch, length, count, a.head_size)

        query = _rotated(heads(block.query, block.query_bias, a.num_heads), rotation)
        key = _rotated(heads(block.key, block.key_bias, a.num_kv_heads), rotation)
        value = heads(block.value, block.value_bias, a.num_kv_heads)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
        states = states + _times(mixed.reshape(batch, length, -1), block.output)
        x = _rms_norm(states, block.feed_norm, a.norm_eps)
        return states + _times(jax.nn.silu(_times(x, block.gate)) * _times(x, block.up), block.down)


def matrix_shapes(a: Architecture) -> dict[str, tuple[int, int]]:
    """[inputs, outputs] of the matrices of a layer, by their names in `Blocks`.

    **Source:** arXiv 2302.13971; arXiv 2305.13245 for keys and values that several heads share.

    Examples:
        >>> from prograde.lm import Architecture, matrix_shapes
        >>> tiny = Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> matrix_shapes(tiny)["key"]
        (64, 32)
    """
    queries, keys = a.num_heads * a.head_size, a.num_kv_heads * a.head_size
    return {
        "query": (a.width, queries),
        "key": (a.width, keys),
        "value": (a.width, keys),
        "output": (queries, a.width),
        "gate": (a.width, a.hidden),
        "up": (a.width, a.hidden),
        "down": (a.hidden, a.width),
    }


def _times(x: Array, weight: Any) -> Array:
    if isinstance(weight, LowRankUpdate):
        return _times(x, weight.base) + (x @ weight.down) @ weight.up
    if isinstance(weight, Quantized):
        return x @ weight.dense(x.dtype)
    return x @ weight


def _of_outputs(weight: Any, outputs: Array) -> Any:
    """Some columns of a matrix of any kind."""
    if isinstance(weight, LowRankUpdate):
        return LowRankUpdate(_of_outputs(weight.base, outputs), weight.down, weight.up[:, outputs])
    if isinstance(weight, Quantized):
        return jax.tree.map(lambda x: x[outputs], weight)
    return weight[:, outputs]


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    wide = x if x.dtype.itemsize > 4 else x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(
        x.dtype
    ) * scale


def _rotation(a: Architecture, length: int) -> tuple[Array, Array]:
    """Cosines and sines, [length, 1, head_size / 2]."""
    frequencies = a.rope_theta ** -(np.arange(0, a.head_size, 2) / a.head_size)
    if a.rope_scaling is not None:
        factor, low, high, original = a.rope_scaling
        turns = original * frequencies / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / factor)
    angles = np.arange(length)[:, None, None] * frequencies
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _rotated(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates the halves of a head's numbers against each other, as Hugging Face has them."""
    cos, sin = (part.astype(x.dtype) for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
