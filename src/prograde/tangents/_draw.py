"""Random arrays for every leaf of a tree, from one key, by few small compiled programs."""

import hashlib
import itertools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key, PyTree

from prograde._inject import wider

_SMALL = 2**16  # arrays of fewer elements are cut into blocks, and one loop draws all blocks
_BLOCK = 64


def leaf_words(params: PyTree[Array]) -> list[int]:
    """One word per leaf to fold into a key, from the leaf's path.

    A leaf's tangent therefore does not depend on its neighbours.
    """
    words: dict[int, None] = {}  # an ordered set
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name, salt = jax.tree_util.keystr(path), 0
        while (word := _word(f"{name}{salt or ''}")) in words:
            salt += 1
        words[word] = None
    return list(words)


def _word(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def draw(
    key: Key[Array, ""],
    index: int | Array,
    words: list[int],
    shapes: list[tuple[tuple[int, ...], jnp.dtype]],
    entries: Callable,
) -> list[Array]:
    """Arrays of random `entries`, each from the key folded with the index and a word of its own.

    A small array is cut into blocks, each from a key of its own, and one loop draws the blocks of
    all small arrays. Otherwise XLA compiles the generator into every use of every factor, for
    minutes where there are many leaves.
    """
    key = threefry(key)
    # 0 as data, from the key that all tangents share, so that `vmap` slices and does not gather
    zero = (jax.random.key_data(key)[0] >> 31) >> 1
    # cloned, because JAX takes the key as used up by an index that varies over devices
    key = jax.random.fold_in(jax.random.clone(key), index)
    drawn: list[Array] = [jnp.zeros(())] * len(shapes)
    small: dict[jnp.dtype, list[int]] = {}
    for i, (shape, dtype) in enumerate(shapes):
        if math.prod(shape) < _SMALL:
            small.setdefault(jnp.dtype(dtype), []).append(i)
        else:
            drawn[i] = entries(jax.random.fold_in(key, words[i]), shape, dtype)
    for dtype, members in small.items():
        sizes = [math.prod(shapes[i][0]) for i in members]
        counts = [-(-size // _BLOCK) for size in sizes]
        which = [
            (words[i], block)
            for i, count in zip(members, counts, strict=True)
            for block in range(count)
        ]
        which += [(0, 0)] * (len(which) % 2)
        blocks = _draw_blocks(key, jnp.asarray(which, jnp.uint32).reshape(-1, 2), entries, dtype)
        starts = itertools.accumulate(counts, lambda at, count: at + count * _BLOCK, initial=0)
        parts = _parts(blocks, zero, list(zip(starts, sizes, strict=False)))
        for i, part in zip(members, parts, strict=True):
            drawn[i] = part.reshape(shapes[i][0])
    return drawn


@partial(jax.jit, static_argnums=(2, 3))
def _draw_blocks(key: Key[Array, ""], which: Array, entries: Callable, dtype: jnp.dtype) -> Array:
    """A block for each (word, block number).

    The loop has two iterations: XLA keeps the result of a loop, and does not recompute it.
    """

    def one(word_and_number: Array) -> Array:
        word, number = word_and_number
        return entries(jax.random.fold_in(jax.random.fold_in(key, word), number), (_BLOCK,), dtype)

    return lax.map(jax.vmap(one), which.reshape(2, -1, 2)).reshape(-1)


def _parts(blocks: Array, zero: Array, places: list[tuple[int, int]]) -> list[Array]:
    """The parts of `blocks` at these (start, size), each in memory of its own.

    A loop of two iterations copies half of each part: XLA keeps the result of a loop. Otherwise it
    fuses the cut into every use, where it is read element by element. The starts are data to XLA,
    so that one kernel serves all parts of equal size.
    """
    starts = [(jnp.asarray([start, 1], jnp.uint32) + zero)[0] for start, _ in places]
    halves = [-(-size // 2) for _, size in places]

    def half(number: Array) -> list[Array]:
        return [
            lax.dynamic_slice(blocks, (start + number * n,), (n,))
            for start, n in zip(starts, halves, strict=True)
        ]

    copied = lax.map(half, jnp.arange(2, dtype=jnp.uint32))
    return [part.reshape(-1)[:size] for part, (_, size) in zip(copied, places, strict=True)]


def normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Standard normal numbers, drawn in float32 or wider.

    JAX's normal numbers of fewer bits have a mean that is not zero.
    """
    return jax.random.normal(key, shape, wider(dtype, jnp.float32)).astype(dtype)


def threefry(key: Key[Array, ""]) -> Key[Array, ""]:
    """A threefry key made from any key.

    Under `vmap` the draws of other kinds of keys depend on the size of the batch.
    """
    if jax.random.key_impl(key) == "threefry2x32":
        return key
    data = jax.random.key_data(key)
    key = jax.random.wrap_key_data(data[:2], impl="threefry2x32")
    for i in range(2, len(data)):
        key = jax.random.fold_in(key, data[i])
    return key


def signs(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Independent fair signs.

    A large draw takes 32 signs from each random word. A small one, such as the factor of a low-rank
    tangent, takes a word for each: XLA fuses the conversion into every use of the factor, where it
    must be one load and two bit operations.
    """
    size = math.prod(shape)
    if size < _SMALL:
        words = jax.random.bits(key, shape, jnp.uint32)
    else:
        packed = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
        shifts = jnp.arange(32, dtype=jnp.uint32)
        words = (packed[None, :] << shifts[:, None]).reshape(-1)[:size].reshape(shape)
    # the bits of +1.0 or -1.0 in float32
    signed_one = (words & jnp.uint32(0x80000000)) | jnp.uint32(0x3F800000)
    return lax.bitcast_convert_type(signed_one, jnp.float32).astype(dtype)
