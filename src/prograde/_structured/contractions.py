"""Products of an activation with a perturbed weight: `dot_general` and `conv_general_dilated`.

The tangent's factors are contracted with the activation one by one, so that x v costs a few vector
products.
"""

import itertools
import math
import string
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from prograde._inject import inject_product, wider
from prograde._structured.rules import rule
from prograde._structured.tangent import PerturbedArray


def _product(
    dimension_numbers: Any,
    weight_shape: tuple[int, ...],
    weight_first: bool,
    dtype: jnp.dtype,
    precision: Any,
    x: Array,
    *factors: Array,
) -> Array:
    """`dot_general` of x and a product of factors, factor by factor, the contracted axes first."""
    (contract_x, contract_p), (batch_x, batch_p) = dimension_numbers
    ndim = len(weight_shape)
    x, factors = x.astype(dtype), tuple(f.astype(dtype) for f in factors)
    letters = iter(string.ascii_letters)
    x_names: list[str] = [next(letters) for _ in range(x.ndim)]
    p_names: list[str] = [next(letters) for _ in range(ndim)]
    for i, j in zip((*contract_x, *batch_x), (*contract_p, *batch_p), strict=True):
        p_names[j] = x_names[i]
    free_x = [x_names[i] for i in range(x.ndim) if i not in (*contract_x, *batch_x)]
    free_p = [p_names[j] for j in range(ndim) if j not in (*contract_p, *batch_p)]
    out_names = [x_names[i] for i in batch_x] + (
        free_p + free_x if weight_first else free_x + free_p
    )
    sizes = dict(zip(x_names, x.shape, strict=True)) | dict(zip(p_names, weight_shape, strict=True))

    rank = factors[0].shape[-1]
    rank_name = [next(letters)] if rank > 1 else []
    terms: list[tuple[list[str], Array]] = []
    for factor in factors:
        covered = [j for j in range(ndim) if factor.shape[j] > 1]
        shape = [factor.shape[j] for j in covered] + [rank] * len(rank_name)
        terms.append(([p_names[j] for j in covered] + rank_name, factor.reshape(shape)))
    contracted = {p_names[j] for j in contract_p}
    terms.sort(
        key=lambda term: contracted.isdisjoint(term[0])
    )  # stable: what shrinks x comes first

    names, value = x_names, x
    for i, (factor_names, factor) in enumerate(terms):
        later = set(out_names).union(*(n for n, _ in terms[i + 1 :]))
        names, value = _pair(names, value, factor_names, factor, later, precision)
    if left_over := [n for n in names if n not in out_names]:  # axes that no factor varies along
        value = jnp.sum(value, axis=tuple(names.index(n) for n in left_over))
        names = [n for n in names if n in out_names]
    present = [n for n in out_names if n in names]
    value = lax.transpose(value, [names.index(n) for n in present])
    value = value.reshape([sizes[n] if n in present else 1 for n in out_names])
    return jnp.broadcast_to(value, [sizes[n] for n in out_names])


def _pair(
    x_names: list[str], x: Array, y_names: list[str], y: Array, later: set[str], precision: Any
) -> tuple[list[str], Array]:
    """The product of two arrays with named axes.

    Summed over the shared names that are not needed later.
    """
    shared = [n for n in x_names if n in y_names]
    contract, batch = [n for n in shared if n not in later], [n for n in shared if n in later]
    free_x, free_y = ([n for n in names if n not in shared] for names in (x_names, y_names))
    if contract and y_names == contract == x_names[-1:] and x.size <= _FEW:
        return x_names[:-1], _times_vector(x, y)
    if contract:
        of = lambda names, some: tuple(names.index(n) for n in some)  # noqa: E731
        numbers = (
            (of(x_names, contract), of(y_names, contract)),
            (of(x_names, batch), of(y_names, batch)),
        )
        return batch + free_x + free_y, lax.dot_general(x, y, numbers, precision=precision)
    names = x_names + free_y
    y = lax.transpose(y, [y_names.index(n) for n in names if n in y_names])
    y = y.reshape(
        [y.shape[[m for m in names if m in y_names].index(n)] if n in y_names else 1 for n in names]
    )
    return names, x.reshape(x.shape + (1,) * len(free_y)) * y


_FEW = 2**17


@jax.custom_jvp
def _times_vector(x: Array, vector: Array) -> Array:
    """The product with a vector along the last axis, as a sum of products.

    XLA compiles each dot with a vector on a CPU for 10 ms, and this once for all of a shape; it
    runs a few microseconds longer. Several vectors, under `vmap`, make a product of matrices.
    """
    return _sum_of_products(x, vector)


@_times_vector.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, vector), (xdot, vdot) = primals, tangents
    return _times_vector(x, vector), jnp.dot(xdot, vector) + jnp.dot(x, vdot)


@jax.custom_batching.custom_vmap
def _sum_of_products(x: Array, vector: Array) -> Array:
    return jnp.sum(x * vector.reshape((1,) * (x.ndim - 1) + vector.shape), axis=-1)


@_sum_of_products.def_vmap
def _(axis_size: int, in_batched: list[bool], x: Array, vector: Array) -> tuple[Array, bool]:
    del axis_size
    return jax.vmap(jnp.dot, in_axes=[0 if batched else None for batched in in_batched])(
        x, vector
    ), True


def _dot(
    x: Any, p: PerturbedArray, weight_first: bool, dimension_numbers: Any, **kwargs: Any
) -> Array:
    """`dot_general`, with `dimension_numbers` for (x, p)."""
    if weight_first:
        z = lax.dot_general(p.weight, x, _swapped(dimension_numbers), **kwargs)
    else:
        z = lax.dot_general(x, p.weight, dimension_numbers, **kwargs)
    if z.size == 0 or p.weight.size == 0:
        return z
    x = jnp.asarray(x)
    dtype = wider(x.dtype, p.weight.dtype, z.dtype)
    direction = partial(
        _product, dimension_numbers, p.weight.shape, weight_first, dtype, kwargs.get("precision")
    )
    return inject_product(p.scalar, z, direction, x, *p.factors)


@rule("dot_general", 1)
def _(x: ArrayLike, p: PerturbedArray, *, dimension_numbers, **kwargs):
    return _dot(x, p, False, dimension_numbers, **kwargs)


@rule("dot_general", 0)
def _(p: PerturbedArray, x: ArrayLike, *, dimension_numbers, **kwargs):
    return _dot(x, p, True, _swapped(dimension_numbers), **kwargs)


@rule("dot_general", 0, 1)
def _(p: PerturbedArray, q: PerturbedArray, *, dimension_numbers, **kwargs):
    # a product with one perturbed factor has a rule: the larger weight stays structured
    if p.weight.size > q.weight.size:
        return _dot(q.materialise(), p, True, _swapped(dimension_numbers), **kwargs)
    return _dot(p.materialise(), q, False, dimension_numbers, **kwargs)


def _swapped(dimension_numbers: Any) -> Any:
    contract, batch = dimension_numbers
    return contract[::-1], batch[::-1]


@rule("conv_general_dilated", 1)
def _(x: ArrayLike, p: PerturbedArray, *, dimension_numbers, batch_group_count, **kwargs):
    numbers, params = dimension_numbers, kwargs | {"batch_group_count": batch_group_count}
    out_axis, _, *spatial = numbers.rhs_spec
    varying = [{i for i in range(p.weight.ndim) if f.shape[i] > 1} for f in p.factors]
    one_output_factor = sum(out_axis in axes for axes in varying) <= 1
    if (
        batch_group_count > 1
        or not spatial
        or not one_output_factor
        or 0 in (jnp.size(x), p.weight.size)
    ):
        return NotImplemented
    z = lax.conv_general_dilated_p.bind(x, p.weight, dimension_numbers=numbers, **params)
    if z.size == 0:
        return z
    return inject_product(
        p.scalar,
        z,
        partial(_convolution, numbers, p.weight.shape, params),
        jnp.asarray(x),
        *p.factors,
    )


def _convolution(
    numbers: Any, weight_shape: tuple[int, ...], params: dict[str, Any], x: Array, *factors: Array
) -> Array:
    """`conv_general_dilated` of x and a product of factors."""
    out_axis, in_axis, *spatial = numbers.rhs_spec
    # channels last on the way in, and one axis for each role of the kernel: [*offsets, in, out,
    # rank]
    channels_last = lax.transpose(
        x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    )
    by_role = [lax.transpose(f, (*spatial, in_axis, out_axis, f.ndim - 1)) for f in factors]
    sizes = [weight_shape[i] for i in (*spatial, in_axis, out_axis)]
    direction = _rank_one_convolution(channels_last, [f[..., 0] for f in by_role], sizes, **params)
    for r in range(1, by_role[0].shape[-1]):
        direction = direction + _rank_one_convolution(
            channels_last, [f[..., r] for f in by_role], sizes, **params
        )
    spec = numbers.out_spec
    order = [0] * len(spec)
    for position, axis in enumerate((spec[0], *spec[2:], spec[1])):
        order[axis] = position
    return lax.transpose(direction, order)


def _strided(
    x: Array,
    inner: Array,
    shift: Array,
    offsets: list[int],
    groups: int,
    precision: Any,
    **window: Any,
) -> Array:
    """The convolution with what the factors make of one output channel.

    Cheaper than all offsets at every place of x.
    """
    ndim = len(offsets)
    kernel = inner * shift[(slice(None),) * ndim + (None,)]
    num_in, per_group = x.shape[-1] // groups, kernel.shape[-1]
    kernel = jnp.broadcast_to(kernel, (*offsets, num_in, groups, per_group))
    space = tuple(range(1, ndim + 1))
    numbers = lax.ConvDimensionNumbers(
        lhs_spec=(0, ndim + 1, *space),
        rhs_spec=(ndim + 1, ndim, *range(ndim)),
        out_spec=(0, ndim + 1, *space),
    )
    y = lax.conv_general_dilated(
        x,
        kernel.reshape(*offsets, num_in, groups * per_group),
        dimension_numbers=numbers,
        feature_group_count=groups,
        precision=precision,
        **window,
    )
    return y.reshape(*y.shape[:-1], groups, per_group)


def _shifted(
    x: Array,
    inner: Array,
    shift: Array,
    offsets: list[int],
    groups: int,
    precision: Any,
    **window: Any,
) -> Array:
    """The same at stride 1: channels are contracted for all offsets at once.

    And each offset adds a shifted slice.
    """
    ndim, num_in = len(offsets), x.shape[-1] // groups
    # y: [batch, *space, group, offset, out]; offset and out have size 1 unless the inner factors
    # vary along them
    *inner_offsets, _size_in, inner_groups, inner_out = inner.shape
    num_offsets = math.prod(inner_offsets)
    matrix = inner.reshape(num_offsets, -1, inner_groups, inner_out).transpose(1, 2, 0, 3)
    matrix = jnp.broadcast_to(matrix, (num_in, *matrix.shape[1:])).reshape(num_in, inner_groups, -1)
    x = x.reshape(*x.shape[:-1], groups, num_in)
    if inner_groups == 1:
        y = lax.dot_general(x, matrix[:, 0], (((ndim + 2,), (0,)), ((), ())), precision=precision)
    else:
        y = lax.dot_general(
            x, matrix, (((ndim + 2,), (0,)), ((ndim + 1,), (1,))), precision=precision
        )
        y = jnp.moveaxis(y, 0, ndim + 1)
    y = y.reshape(*x.shape[:-1], num_offsets, inner_out)

    edges = [
        (low, high, d - 1)
        for (low, high), d in zip(window["padding"], window["lhs_dilation"], strict=True)
    ]
    y = lax.pad(y, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, *[(0, 0, 0)] * 3])
    reach = [(k - 1) * d for k, d in zip(offsets, window["rhs_dilation"], strict=True)]
    total = jnp.zeros((), x.dtype)
    for offset in itertools.product(*(range(k) for k in offsets)):
        start = [o * d for o, d in zip(offset, window["rhs_dilation"], strict=True)]
        limit = [n - r + a for n, r, a in zip(y.shape[1:], reach, start, strict=False)]
        at = int(np.ravel_multi_index(offset, inner_offsets, mode="clip"))
        piece = lax.slice(
            y,
            (0, *start, 0, at, 0),
            (y.shape[0], *limit, groups, at + 1, inner_out),
            None,
        ).squeeze(ndim + 2)
        if max(shift.shape[:ndim]) > 1:
            weight = shift[tuple(min(o, n - 1) for o, n in zip(offset, shift.shape, strict=False))]
            piece = piece * weight.reshape((1,) * (ndim + 1) + weight.shape)
        total = piece if total.ndim == 0 else total + piece
    return (
        total
        if max(shift.shape[:ndim]) > 1
        else total * shift.reshape((1,) * (ndim + 1) + shift.shape[-2:])
    )


def _rank_one_convolution(
    x: Array,
    factors: list[Array],
    sizes: list[int],
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    precision: Any = None,
    **_: Any,
) -> Array:
    """The convolution of x with a product of factors, channels last.

    x is [batch, *space, channel], each factor [*offset, in, out].

    The factors that vary along the input channel contract it, at once for all offsets of the kernel
    they distinguish; each offset then adds a shifted slice; what varies along the output channel
    alone multiplies the sum.
    """
    offsets, num_out = sizes[:-2], sizes[-1]
    groups, ndim = feature_group_count, len(offsets)
    lead = (1,) * (ndim + 1)
    dtype = x.dtype
    inner, shift = jnp.ones((1,) * (ndim + 3), dtype), jnp.ones((1,) * (ndim + 2), dtype)
    outer = jnp.ones((1, 1), dtype)
    for factor in factors:
        size_in, size_out = factor.shape[ndim:]
        factor = factor.reshape(
            *factor.shape[:-1], *((groups, num_out // groups) if size_out > 1 else (1, 1))
        )
        if size_in > 1:
            inner = inner * factor
        elif max(factor.shape[:ndim]) > 1:
            shift = shift * factor.squeeze(ndim)
        else:
            outer = outer * factor.reshape(factor.shape[-2:])

    window = dict(
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
    )
    along_offsets = _shifted if max(window_strides) == 1 else _strided
    total = along_offsets(x, inner, shift, offsets, groups, precision, **window)
    total = total * outer.reshape(lead + outer.shape)
    return jnp.broadcast_to(total, (*total.shape[:-2], groups, num_out // groups)).reshape(
        *total.shape[:-2], num_out
    )
