"""The tangents along single entries of the parameters.

And what is known entry by entry put together again.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from prograde._structured.derivative import Tangent
from prograde._structured.tangent import LowRankTangent


def coordinate_tangent(index: Int[Array, ""], params: PyTree[Array]) -> PyTree[Tangent]:
    """The unit tangent along entry `index` of all entries of `params`, in the order of its leaves.

    e_i e_j^T is kept as its factors where these are fewer numbers than the array: a row of x times
    it takes as many multiply-adds as it has entries, and not as many as the matrix.
    """
    leaves, treedef = jax.tree.flatten(params)
    tangents, start = [], 0
    for w in leaves:
        inside = (index >= start) & (index < start + w.size)
        if w.ndim > 1 and sum(w.shape) < w.size:
            at = jnp.unravel_index(jnp.clip(index - start, 0, w.size - 1), w.shape)
            factors = []
            for axis, (position, size) in enumerate(zip(at, w.shape, strict=True)):
                shape = [size if i == axis else 1 for i in range(w.ndim)]
                factors.append((jnp.arange(size) == position).astype(w.dtype).reshape(*shape, 1))
            tangents.append(LowRankTangent((factors[0] * inside.astype(w.dtype), *factors[1:])))
        else:
            position = jnp.arange(start, start + w.size, dtype=jnp.int32).reshape(w.shape)
            tangents.append((position == index).astype(w.dtype))
        start += w.size
    return treedef.unflatten(tangents)


def from_coordinates(values: Float[Array, " n"], params: PyTree[Array]) -> PyTree[Array]:
    """One number for each entry of `params`, in the order of `coordinate_tangent`.

    As a tree like `params`.
    """
    leaves, treedef = jax.tree.flatten(params)
    out, start = [], 0
    for w in leaves:
        out.append(values[start : start + w.size].reshape(w.shape).astype(w.dtype))
        start += w.size
    return treedef.unflatten(out)


def count(params: PyTree[Array]) -> int:
    """n, the entries of all leaves together."""
    return sum(math.prod(w.shape) for w in jax.tree.leaves(params))
