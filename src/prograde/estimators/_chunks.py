"""How many tangents to carry through a function together, and how to cut a batch into groups that get tangents of their own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from prograde._jaxprs import live_bytes

_CHUNK_BYTES = (
    2**28
)  # what the tangents of a chunk may take when `chunk` is not given; more for larger models


def tangents_at_once(
    chunk: int | None,
    num_tangents: int,
    fun: Callable[..., Any],
    params: PyTree[Array],
    along_all: Callable[..., Any],
) -> int:
    """`chunk`, or as many as fit into the memory of the parameters, or into 256 MiB where that is more.

    `along_all(indices)` is the run along all the tangents; it is traced to count what is live at once, and not run.
    """
    if chunk is not None or num_tangents == 1:
        return min(chunk or 1, num_tangents)
    bare = live_bytes(jax.make_jaxpr(fun)(params).jaxpr)
    together = (
        live_bytes(jax.make_jaxpr(along_all)(jnp.arange(num_tangents, dtype=jnp.int32)).jaxpr)
        - bare
    )
    budget = max(_CHUNK_BYTES, sum(w.nbytes for w in jax.tree.leaves(params)))
    return min(num_tangents, max(1, budget * num_tangents // max(1, together)))


def in_groups(args: tuple[Any, ...], num_groups: int) -> tuple[PyTree, PyTree]:
    """(arrays, rest) of the arguments: arrays with axes, of which the first is cut into two for the groups; and the others."""
    arrays, rest = eqx.partition(
        args, lambda x: isinstance(x, jax.Array | np.ndarray) and x.ndim > 0
    )
    if num_groups == 1:
        return arrays, rest
    shapes = [x.shape for x in jax.tree.leaves(arrays)]
    lengths = {shape[0] for shape in shapes}
    batch = lengths.pop() if len(lengths) == 1 else None
    if batch is None or batch % num_groups:
        raise ValueError(
            f"num_groups={num_groups}, but the arrays in the arguments have shapes {shapes}. All need one first axis, that of the "
            "examples, which the number of groups divides. Close over what is the same for all examples, and choose num_groups "
            "accordingly."
        )
    return jax.tree.map(
        lambda x: jnp.reshape(x, (num_groups, batch // num_groups, *x.shape[1:])), arrays
    ), rest
