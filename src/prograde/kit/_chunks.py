"""Many tangents: how many run through a function together, and the loop over chunks of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from prograde._costs import live_bytes

_CHUNK_BYTES = 2**28  # for a chunk, unless the parameters take more
_UNCOUNTED = 16  # tangents of a chunk where memory cannot be counted


def tangents_at_once(
    chunk: int | None,
    num_tangents: int,
    fun: Callable[..., Any],
    params: PyTree[Array],
    along_all: Callable[..., Any],
    least: int = _CHUNK_BYTES,
) -> int:
    """`chunk`, or the number of tangents that fit into memory together.

    Without `chunk` they may take as much memory as the parameters, or 256 MiB where that is more.
    It is 16 for a function that branches on the values of arrays, which cannot be traced to count.

    **Arguments:**

    - `chunk`: what the user asked for, or `None`.
    - `num_tangents`: K.
    - `fun`, `params`: `fun(params)` is the run without tangents.
    - `along_all`: `along_all(indices)` is the run along tangents with these indices, an int32 array
      [K]. It is traced to count the bytes that are live at once, and not run.
    - `least`: bytes that a chunk may always take. If it is less than 256 MiB, a chunk may take more
      only as far as the run without tangents takes as much for its own intermediate results.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde.kit import tangents_at_once
        >>> fun, params = jnp.sin, jnp.zeros(2**23)
        >>> along = jax.vmap(lambda i: jax.jvp(fun, (params,), (params + i,)))
        >>> tangents_at_once(None, 1000, fun, params, along) < 10
        True
    """
    if chunk is not None or num_tangents == 1:
        return min(chunk or 1, num_tangents)
    indices = jnp.arange(num_tangents, dtype=jnp.int32)
    try:
        bare = live_bytes(jax.make_jaxpr(fun)(params).jaxpr)
        together = live_bytes(jax.make_jaxpr(along_all)(indices).jaxpr) - bare
    except jax.errors.ConcretizationTypeError:
        return min(_UNCOUNTED, num_tangents)
    budget = max(
        min(max(bare, least), _CHUNK_BYTES), sum(w.nbytes for w in jax.tree.leaves(params))
    )
    return min(num_tangents, max(1, budget * num_tangents // max(1, together)))


def in_chunks(
    step: Callable[[PyTree, Int[Array, " size"]], tuple[PyTree, PyTree, Any]],
    start: PyTree,
    num_tangents: int,
    size: int,
    first: int | Array = 0,
) -> tuple[PyTree, PyTree, Any]:
    """Runs `step` on the indices of K tangents, about `size` of them at a time.

        carry, shared, each = step(carry, indices)

    `shared` is what all tangents have in common, such as the value of the loss: the first chunk's
    is returned. `each` is a tree of arrays with a leading axis for the tangents: those of all
    chunks are concatenated, and cut to K.

    **Arguments:**

    - `step`: a function of (carry, indices [size]), int32. All chunks have the same size. The last
      one may therefore contain padding, indices of `first + num_tangents` and above, whose part in
      the carry `step` has to leave out.
    - `start`: the first carry.
    - `num_tangents`: K.
    - `size`: the most tangents that run together.
    - `first`: the index of the first tangent; may be traced.

    **Returns:** (last carry, shared, each).

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import in_chunks
        >>> def step(total, indices):
        ...     return total + jnp.sum(jnp.where(indices < 5, indices, 0)), "shared", indices**2
        >>> total, shared, squares = in_chunks(step, 0, num_tangents=5, size=2)
        >>> int(total), shared, squares.tolist()
        (10, 'shared', [0, 1, 4, 9, 16])
    """
    num_chunks = -(-num_tangents // size)
    size = -(-num_tangents // num_chunks)
    chunks = first + jnp.arange(num_chunks * size, dtype=jnp.int32).reshape(num_chunks, size)
    # The first chunk is not in the loop: it alone returns what is shared, and inside `shard_map`
    # the start varies along other axes than what is added to it.
    carry, shared, each = step(start, chunks[0])

    def next_chunk(carry: PyTree, indices: Array) -> tuple[PyTree, Any]:
        carry, _, each = step(carry, indices)
        return carry, each

    if num_chunks > 1:
        try:
            carry, others = lax.scan(next_chunk, carry, chunks[1:])
        except jax.errors.ConcretizationTypeError:
            # The function branches on the value of an array, which it may outside of a loop.
            found = []
            for indices in chunks[1:]:
                carry, other = next_chunk(carry, indices)
                found.append(other)
            others = jax.tree.map(lambda *x: jnp.stack(x), *found)
        joined = lambda x, rest: jnp.concatenate([x, _merged(rest)])[:num_tangents]  # noqa: E731
        each = jax.tree.map(joined, each, others)
    return carry, shared, each


def _merged(x: Array) -> Array:
    """The first two axes as one. No -1 in the shape, as a leaf may be empty."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
