"""Many tangents: how many run together, and a batch cut into groups with tangents of their own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from prograde._costs import live_bytes

_CHUNK_BYTES = 2**28  # memory for the tangents of a chunk, unless the parameters take more


def tangents_at_once(
    chunk: int | None,
    num_tangents: int,
    fun: Callable[..., Any],
    params: PyTree[Array],
    along_all: Callable[..., Any],
) -> int:
    """`chunk`, or the number of tangents that fit into memory together.

    Without `chunk` they may take as much memory as the parameters, or 256 MiB where that is more.

    **Arguments:**

    - `chunk`: what the user asked for, or `None`.
    - `num_tangents`: K.
    - `fun`, `params`: `fun(params)` is the run without tangents.
    - `along_all`: `along_all(indices)` is the run along tangents with these indices, an int32 array
      [K]. It is traced to count the bytes that are live at once, and not run.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde.kit import tangents_at_once
        >>> fun, params = jnp.sin, jnp.zeros(2**20)
        >>> along = jax.vmap(lambda i: jax.jvp(fun, (params,), (params + i,)))
        >>> tangents_at_once(None, 1000, fun, params, along) < 100
        True
    """
    if chunk is not None or num_tangents == 1:
        return min(chunk or 1, num_tangents)
    bare = live_bytes(jax.make_jaxpr(fun)(params).jaxpr)
    indices = jnp.arange(num_tangents, dtype=jnp.int32)
    together = live_bytes(jax.make_jaxpr(along_all)(indices).jaxpr) - bare
    budget = max(_CHUNK_BYTES, sum(w.nbytes for w in jax.tree.leaves(params)))
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
    if num_chunks > 1:

        def next_chunk(carry: PyTree, indices: Array) -> tuple[PyTree, Any]:
            carry, _, each = step(carry, indices)
            return carry, each

        carry, others = lax.scan(next_chunk, carry, chunks[1:])
        joined = lambda x, rest: jnp.concatenate([x, _merged(rest)])[:num_tangents]  # noqa: E731
        each = jax.tree.map(joined, each, others)
    return carry, shared, each


def _merged(x: Array) -> Array:
    """The first two axes as one. No -1 in the shape, as a leaf may be empty."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def in_groups(args: tuple[Any, ...], num_groups: int) -> tuple[PyTree, PyTree]:
    """(arrays, rest) of the arguments, the arrays cut into groups of examples.

    Arrays with axes have the examples along the first one, and get a leading axis for the groups:
    [batch, ...] becomes [num_groups, batch / num_groups, ...]. One group changes nothing.

    **Errors:** `ValueError` where the first axes differ, or the groups do not divide them.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import in_groups
        >>> (x, scale), rest = in_groups((jnp.ones((6, 2)), 3.0), num_groups=2)
        >>> x.shape, scale, rest
        ((2, 3, 2), None, (None, 3.0))
    """
    has_axes = lambda x: isinstance(x, jax.Array | np.ndarray) and x.ndim > 0  # noqa: E731
    arrays, rest = eqx.partition(args, has_axes)
    if num_groups == 1:
        return arrays, rest
    shapes = [x.shape for x in jax.tree.leaves(arrays)]
    lengths = {shape[0] for shape in shapes}
    batch = lengths.pop() if len(lengths) == 1 else None
    if batch is None or batch % num_groups:
        raise ValueError(
            f"num_groups={num_groups}, but the arrays in the arguments have shapes {shapes}. All "
            "need one first axis, that of the examples, which the number of groups divides. Close "
            "over what is the same for all examples, and choose num_groups accordingly."
        )
    cut = lambda x: jnp.reshape(x, (num_groups, batch // num_groups, *x.shape[1:]))  # noqa: E731
    return jax.tree.map(cut, arrays), rest
