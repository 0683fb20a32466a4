"""How many tangents to carry through a function together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from prograde._jaxprs import live_bytes

_CHUNK_BYTES = 2**28  # what the tangents of a chunk may take when `chunk` is not given; more for larger models


def tangents_at_once(
    chunk: int | None, num_tangents: int, fun: Callable[..., Any], params: PyTree[Array], along_all: Callable[..., Any]
) -> int:
    """`chunk`, or as many as fit into the memory of the parameters, or into 256 MiB where that is more.

    `along_all(indices)` is the run along all the tangents; it is traced to count what is live at once, and not run.
    """
    if chunk is not None or num_tangents == 1:
        return min(chunk or 1, num_tangents)
    bare = live_bytes(jax.make_jaxpr(fun)(params).jaxpr)
    together = live_bytes(jax.make_jaxpr(along_all)(jnp.arange(num_tangents)).jaxpr) - bare
    budget = max(_CHUNK_BYTES, sum(w.nbytes for w in jax.tree.leaves(params)))
    return min(num_tangents, max(1, budget * num_tangents // max(1, together)))
