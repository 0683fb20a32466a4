"""Changes of a perturbed weight that keep its factors: views, gathers, conversions, scaling."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from prograde._inject import inject
from prograde._structured.rules import rule
from prograde._structured.tangent import LowRankTangent, PerturbedArray


@rule("transpose", 0)
def _(p: PerturbedArray, *, permutation):
    return p.map(
        lambda w: lax.transpose(w, permutation),
        lambda f: lax.transpose(f, (*permutation, len(permutation))),
    )


@rule("squeeze", 0)
def _(p: PerturbedArray, *, dimensions):
    return p.map(lambda w: lax.squeeze(w, dimensions), lambda f: lax.squeeze(f, dimensions))


@rule("rev", 0)
def _(p: PerturbedArray, *, dimensions):
    return p.map(lambda w: lax.rev(w, dimensions), lambda f: lax.rev(f, dimensions))


@rule("slice", 0)
def _(p: PerturbedArray, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * p.weight.ndim

    def sliced(f: Array) -> Array:
        for axis, (start, limit, stride) in enumerate(
            zip(start_indices, limit_indices, strides, strict=True)
        ):
            if f.shape[axis] > 1:
                f = lax.slice_in_dim(f, start, limit, stride, axis)
        return f

    return p.map(lambda w: lax.slice(w, start_indices, limit_indices, strides), sliced)


@rule("dynamic_slice", 0)
def _(p: PerturbedArray, *start_indices: ArrayLike, slice_sizes):
    def sliced(f: Array) -> Array:
        for axis, (start, size) in enumerate(zip(start_indices, slice_sizes, strict=True)):
            if f.shape[axis] > 1:
                f = lax.dynamic_slice_in_dim(f, start, size, axis)
        return f

    return p.map(lambda w: lax.dynamic_slice(w, start_indices, slice_sizes), sliced)


@rule("split", 0)
def _(p: PerturbedArray, *, sizes, axis):
    weights = lax.split(p.weight, sizes, axis)
    factors = [
        lax.split(f, sizes, axis) if f.shape[axis] > 1 else [f] * len(sizes) for f in p.factors
    ]
    return [p.replace(w, parts) for w, *parts in zip(weights, *factors, strict=True)]


@rule("broadcast_in_dim", 0)
def _(p: PerturbedArray, *dynamic: ArrayLike, shape, broadcast_dimensions, **kwargs):
    def broadcast(f: Array) -> Array:
        ones = [1] * len(shape)
        for axis, dimension in enumerate(broadcast_dimensions):
            ones[dimension] = f.shape[axis]
        return f.reshape(*ones, f.shape[-1])

    weight = lax.broadcast_in_dim_p.bind(
        p.weight, *dynamic, shape=shape, broadcast_dimensions=broadcast_dimensions, **kwargs
    )
    return p.map(lambda _: weight, broadcast)


@rule("reshape", 0)
def _(p: PerturbedArray, *dynamic: ArrayLike, new_sizes, dimensions, **kwargs):
    weight = lax.reshape_p.bind(
        p.weight, *dynamic, new_sizes=new_sizes, dimensions=dimensions, **kwargs
    )
    if dimensions is not None or dynamic or p.weight.size == 0:
        return NotImplemented
    blocks = _matching_blocks(p.weight.shape, new_sizes)
    factors = _merged_within_blocks(p.factors, [old for old, _ in blocks])
    if len(factors) == 1 < len(p.factors):
        return NotImplemented  # the whole tangent: it is better formed without an axis for the rank

    def reshaped(f: Array) -> Array:
        whole, sizes = [], []
        for old, new in blocks:
            varies = any(f.shape[i] > 1 for i in old)
            whole += [p.weight.shape[i] if varies else 1 for i in old]
            sizes += [new_sizes[i] if varies else 1 for i in new]
        return jnp.broadcast_to(f, (*whole, f.shape[-1])).reshape(*sizes, f.shape[-1])

    return p.replace(weight, [reshaped(f) for f in factors])


def _matching_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest cut of two shapes of equal size into consecutive blocks of axes of equal size."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [], []
        size_left, size_right = 1, 1
        if i < len(old):
            left.append(i)
            size_left, i = old[i], i + 1
        elif j < len(new):
            right.append(j)
            size_right, j = new[j], j + 1
        while size_left != size_right:
            if size_left < size_right:
                left.append(i)
                size_left, i = size_left * old[i], i + 1
            else:
                right.append(j)
                size_right, j = size_right * new[j], j + 1
        blocks.append((left, right))
    return blocks


def _merged_within_blocks(factors: Sequence[Array], blocks: list[list[int]]) -> list[Array]:
    """Multiplies factors together until each varies along all of a block's axes or along none."""
    factors = list(factors)
    for axes in blocks:
        partial = lambda f, axes=axes: any(f.shape[i] > 1 for i in axes)  # noqa: E731
        inside = [f for f in factors if partial(f)]
        whole = [i for i in axes if any(f.shape[i] > 1 for f in inside)]
        if len(inside) > 1 and len(whole) > 1:
            factors = [f for f in factors if not partial(f)] + [
                functools.reduce(operator.mul, inside)
            ]
    return factors


@rule("convert_element_type", 0)
def _(p: PerturbedArray, *, new_dtype, **kwargs):
    convert = lambda x: lax.convert_element_type_p.bind(x, new_dtype=new_dtype, **kwargs)  # noqa: E731
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return NotImplemented
    return p.map(convert, convert)


@rule("copy", 0)
def _(p: PerturbedArray):
    return p.map(lax.copy_p.bind, lambda f: f)


@rule("pvary", 0)
def _(p: PerturbedArray, *, axes, **_):
    return p.replace(lax.pcast(p.weight, axes, to="varying"), p.factors)


@rule("stop_gradient", 0)
def _(p: PerturbedArray):
    return lax.stop_gradient(p.weight)


@rule("neg", 0)
def _(p: PerturbedArray):
    return p.replace(-p.weight, [-p.factors[0], *p.factors[1:]])


def _scaled(p: PerturbedArray, primitive: Any, x: ArrayLike, params: dict[str, Any]) -> Any:
    """The weight times, or over, a scalar.

    The tangent of the scalar itself is carried by the weight.
    """
    if jnp.ndim(x) > 0:
        return NotImplemented
    first, *others = p.factors
    scale = jnp.asarray(x).astype(first.dtype)
    first = first * scale if primitive is lax.mul_p else first / scale
    return p.replace(primitive.bind(p.weight, x, **params), [first, *others])


@rule("mul", 0)
def _(p: PerturbedArray, x: ArrayLike, **params):
    return _scaled(p, lax.mul_p, x, params)


@rule("mul", 1)
def _(x: ArrayLike, p: PerturbedArray, **params):
    return _scaled(p, lax.mul_p, x, params)


@rule("div", 0)
def _(p: PerturbedArray, x: ArrayLike, **params):
    return _scaled(p, lax.div_p, x, params)


def _shifted(primitive: Any, x: Any, y: Any, params: dict[str, Any]) -> Any:
    """A sum or difference of a weight and a number.

    With an array it may be an activation: no weight any more.
    """
    p, other = (x, y) if isinstance(x, PerturbedArray) else (y, x)
    if jnp.ndim(other) > 0:
        return NotImplemented
    weight = primitive.bind(*(v.weight if v is p else v for v in (x, y)), **params)
    first, *others = p.factors
    return p.replace(weight, [-first if primitive is lax.sub_p and p is y else first, *others])


@rule("add", 0)
def _(p: PerturbedArray, x: ArrayLike, **params):
    return _shifted(lax.add_p, p, x, params)


@rule("add", 1)
def _(x: ArrayLike, p: PerturbedArray, **params):
    return _shifted(lax.add_p, x, p, params)


@rule("sub", 0)
def _(p: PerturbedArray, x: ArrayLike, **params):
    return _shifted(lax.sub_p, p, x, params)


@rule("sub", 1)
def _(x: ArrayLike, p: PerturbedArray, **params):
    return _shifted(lax.sub_p, x, p, params)


@rule("gather", 0)
def _(p: PerturbedArray, indices: Array, *, dimension_numbers, slice_sizes, fill_value, **params):
    numbers = dimension_numbers
    weight = lax.gather(p.weight, indices, numbers, slice_sizes, fill_value=fill_value, **params)
    varying = [[n > 1 for n in f.shape[:-1]] for f in p.factors]
    unseen = [axis for axis in numbers.start_index_map if not any(v[axis] for v in varying)]
    if numbers.operand_batching_dims or unseen or weight.size == 0:
        return NotImplemented
    extended = lax.GatherDimensionNumbers(
        offset_dims=(
            *numbers.offset_dims,
            weight.ndim,
        ),  # the rank comes along whole, as the last axis
        collapsed_slice_dims=numbers.collapsed_slice_dims,
        start_index_map=numbers.start_index_map,
    )

    def gathered(f: Array, varies: list[bool]) -> Array:
        moving = [varies[axis] for axis in numbers.start_index_map]
        at = jnp.where(
            jnp.asarray(moving), indices, 0
        )  # along its other axes a factor has one entry
        if not any(moving):
            at = at[(slice(0, 1),) * (at.ndim - 1)]
        sizes = [n if v else 1 for n, v in zip(slice_sizes, varies, strict=True)]
        # where an index is out of bounds, what is gathered is a constant, so its tangent is 0
        return lax.gather(f, at, extended, (*sizes, f.shape[-1]), fill_value=0, mode=params["mode"])

    gathered_p = p.replace(
        weight, [gathered(f, v) for f, v in zip(p.factors, varying, strict=True)]
    )
    window = [axis for axis in range(p.weight.ndim) if axis not in numbers.collapsed_slice_dims]
    if sum(any(v[axis] and slice_sizes[axis] > 1 for axis in window) for v in varying) > 1:
        return gathered_p
    # rows of an embedding: an activation, no weight any more
    direction = LowRankTangent(gathered_p.factors).dense()
    return inject(p.scalar, weight, jnp.broadcast_to(direction, weight.shape))
