"""Columns of a sparse matrix that share a tangent: colours, the seed of each, and reading back.

A column is known from the tangent that it shares where nothing else falls on it. A column has
entries that are needed, and entries that the tangent hits. Two columns may share a tangent unless
one hits what the other needs.
"""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from prograde._structured.derivative import Tangent
from prograde._structured.tangent import LowRankTangent
from prograde.online._sparsity import Matrix


def colour(kind: np.ndarray, needed: Matrix, hit: Matrix) -> tuple[np.ndarray, int]:
    """The colour of each column, -1 for a column of kind -1, and how many there are.

    Columns of one kind have equal entries, and each kind has a column in `needed` and `hit`. The
    first colours that are free are taken, kind by kind, in the order of the columns.
    """
    colours, count = np.full(len(kind), -1), 0
    order = np.argsort(kind, kind="stable")
    bounds = np.searchsorted(kind[order], np.arange(needed.shape[1] + 1))
    is_needed, is_hit = [0] * needed.shape[0], [0] * needed.shape[0]  # sets of colours, as bits
    for k in range(needed.shape[1]):
        members = order[bounds[k] : bounds[k + 1]]
        if not len(members):
            continue
        rows = needed.indices[needed.indptr[k] : needed.indptr[k + 1]].tolist()
        touched = hit.indices[hit.indptr[k] : hit.indptr[k + 1]].tolist()
        taken = 0
        for row in rows:
            taken |= is_hit[row]
        for row in touched:
            taken |= is_needed[row]
        free = _free(taken, len(members))
        colours[members], count = free, max(count, int(free[-1]) + 1)
        bits = _bits(free)
        for row in rows:
            is_needed[row] |= bits
        for row in touched:
            is_hit[row] |= bits
    return colours, count


def _free(taken: int, count: int) -> np.ndarray:
    """The first numbers that are not in a set."""
    size = taken.bit_length()
    whole = np.frombuffer(taken.to_bytes(size // 8 + 1, "little"), np.uint8)
    inside = np.flatnonzero(np.unpackbits(whole, bitorder="little")[:size] == 0)[:count]
    return np.concatenate([inside, np.arange(size, size + count - len(inside))])


def _bits(members: np.ndarray) -> int:
    flags = np.zeros(int(members[-1]) + 1, np.uint8)
    flags[members] = 1
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def seeds(colours: np.ndarray, count: int, shape: tuple[int, ...], dtype: jnp.dtype) -> Tangent:
    """For each colour the array of ones at the entries of that colour, in a leading axis.

    Where each of them is a product of one vector for each axis, these vectors are kept: a row of x
    times a matrix of such seeds takes as many multiply-adds as it has entries.
    """
    colours = colours.reshape(shape)
    if len(shape) > 1 and sum(shape) < colours.size:
        at = np.nonzero(colours >= 0)
        of = colours[at]
        covers = [np.zeros((count, size), bool) for size in shape]
        for cover, position in zip(covers, at, strict=True):
            cover[of, position] = True
        products = math.prod(cover.sum(1) for cover in covers)
        if np.array_equal(products, np.bincount(of, minlength=count)):
            factors = []
            for axis, cover in enumerate(covers):
                ones = [size if i == axis else 1 for i, size in enumerate(shape)]
                factors.append(jnp.asarray(cover, dtype).reshape(count, *ones, 1))
            return LowRankTangent(tuple(factors))
    of_each = np.arange(count).reshape(count, *(1,) * len(shape))
    return (jnp.asarray(colours)[None] == of_each).astype(dtype)


def take(x: Array, index: np.ndarray) -> Array:
    """`x[index]` of a vector, and zero where the index is -1.

    Where the index is regular, entries are read in their order, without a table of positions.
    """
    view = _regular(x, index)
    if view is not None:
        return view
    if np.any(index < 0):
        index = np.where(index < 0, x.size, index)
        x = jnp.concatenate([x, jnp.zeros(1, x.dtype)])
    return x[jnp.asarray(index, jnp.int32)]


def _regular(x: Array, index: np.ndarray) -> Array | None:
    """`x[index]` for an index of the form base + sum_k stride_k i_k, as slices; else `None`."""
    if index.size == 0 or np.any(index < 0):
        return None
    start, axes = int(index.flat[0]), []
    expected = np.full((1,) * index.ndim, start)
    for axis, size in enumerate(index.shape):
        if size == 1:
            continue
        stride = int(index.take(1, axis).flat[0]) - start
        steps = stride * np.arange(size)
        expected = expected + steps.reshape([-1 if i == axis else 1 for i in range(index.ndim)])
        axes.append((stride, size, axis))
    if not np.array_equal(np.broadcast_to(expected, index.shape), index):
        return None
    axes.sort(reverse=True)
    sizes, below = [], None
    for stride, _, _ in axes:
        if stride <= 0 or (below is not None and below % stride):
            return None
        sizes.append(stride)
        below = stride
    for (_, size, _), outer, inner in zip(axes[1:], sizes, sizes[1:], strict=False):
        if size * inner > outer:
            return None
    if not axes:
        return x[start].reshape(index.shape)
    most = axes[0][1] * sizes[0]
    x = x[start : start + most]
    x = jnp.pad(x, (0, most - x.size))
    x = x.reshape(axes[0][1], *(a // b for a, b in itertools.pairwise(sizes)), sizes[-1])
    x = x[(slice(None), *(slice(size) for _, size, _ in axes[1:]), 0)]
    x = x.transpose(np.argsort([axis for _, _, axis in axes]))
    return x.reshape(index.shape)
