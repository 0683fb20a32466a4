"""Labels: along which axis of a value the examples lie, and how each operation passes a label on.

A value that is labelled depends, at a position along the label's axis, on one example only. A rule
either gives the label of the output, or raises `Joined` where the operation joins examples or is
not known to keep them apart.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn, Literal

from prograde._jaxprs import CALLS, subprograms


class Along(NamedTuple):
    """The examples lie along this axis.

    An axis that was merged with others has size outer * batch * inner: the example at a position is
    (position // inner) mod batch. A negative axis is that of an enclosing loop, -1 the innermost:
    everything inside an iteration belongs to one example.
    """

    axis: int
    outer: int = 1
    inner: int = 1


ANYWHERE = Along(1_000_000)
"""The label of a value of which each position may depend on several examples.

Only walks that do not refuse use it.
"""

Label = Along | None


class Joined(Exception):
    """An operation joins examples, or is not known to keep them apart."""


def same_or_anywhere(labels: Any) -> Label:
    """As `same`; `ANYWHERE` for labels that differ."""
    found = {label for label in labels if label is not None}
    return None if not found else found.pop() if len(found) == 1 else ANYWHERE


def moved(label: Label, by: int) -> Label:
    """The label of a slice along the first axis, or of what such slices are stacked to."""
    return label if label in (None, ANYWHERE) else label._replace(axis=label.axis + by)


def inside(label: Label) -> Label:
    """The label, seen from inside one more loop."""
    return moved(label, -1) if label is not None and label.axis < 0 else label


def outside(label: Label) -> Label:
    """Undoes `_inside`."""
    return moved(label, 1) if label is not None and label.axis < 0 else label


def same(labels: Any) -> Label:
    """The one label of values that come together; raises where there are several."""
    found = {label for label in labels if label is not None}
    if len(found) > 1:
        raise Joined
    return found.pop() if found else None


_ELEMENTWISE = {
    "add", "sub", "mul", "div", "rem", "pow", "integer_pow", "max", "min", "neg", "abs", "sign",
    "exp", "exp2", "log", "log1p", "expm1", "sqrt", "rsqrt", "cbrt", "square", "sin", "cos",
    "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma", "floor", "ceil", "round",
    "is_finite", "nextafter", "select_n", "clamp", "convert_element_type", "reduce_precision",
    "copy", "copy_p", "pvary", "pcast", "add_any", "real", "imag", "complex", "conj", "eq", "ne",
    "gt", "ge", "lt", "le", "and", "or", "not", "xor", "bessel_i0e", "bessel_i1e", "igamma",
    "igammac", "polygamma", "mul_no_nan",
}  # fmt: skip
_LEADING = {
    "cholesky": 2,
    "triangular_solve": 2,
    "eigh": 2,
    "lu": 2,
    "qr": 2,
    "svd": 2,
    "top_k": 1,
}  # work on so many last axes


def propagated(eqn: JaxprEqn, given: list[Label], counts: dict[Any, Any]) -> Label:
    """The label of the outputs of an operation that noise reaches.

    Raises where it joins examples or is not known.
    """
    name, params = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]  # pyright: ignore[reportAttributeAccessIssue]
    out_shape = eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if name == "dot_general":
        return _of_product(params["dimension_numbers"], shapes, given)
    if name == "conv_general_dilated":
        numbers, (x, kernel) = params["dimension_numbers"], given
        if any(g is not None and g.axis < 0 for g in given):
            return same(given)
        if (
            kernel is not None
            or x is None
            or x.axis != numbers.lhs_spec[0]
            or params["batch_group_count"] != 1
        ):
            raise Joined
        return x._replace(axis=numbers.out_spec[0])
    if name == "gather":
        return _of_gather(eqn, given, counts)
    label = same(given)
    assert label is not None
    if label.axis < 0:  # nothing but one example's values is there
        return label
    axis, first = label.axis, next(i for i, g in enumerate(given) if g is not None)
    shape = shapes[first]
    if name in _ELEMENTWISE:
        broadcast = all(
            s == () or all(n in (1, m) for n, m in zip(s, out_shape, strict=True)) for s in shapes
        )
        along = all(
            s[axis] == out_shape[axis] for s, g in zip(shapes, given, strict=True) if g is not None
        )
        if not broadcast or not along:
            raise Joined
        return label
    if name == "transpose":
        return label._replace(axis=params["permutation"].index(axis))
    if name == "broadcast_in_dim":
        to = params["broadcast_dimensions"][axis]
        if out_shape[to] != shape[axis]:
            raise Joined
        return label._replace(axis=to)
    if name == "reshape":
        return _of_reshape(label, shape, out_shape, params.get("dimensions"))
    if name in (
        "squeeze",
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "argmax",
        "argmin",
        "reduce_and",
        "reduce_or",
    ):
        removed = params["dimensions"] if name == "squeeze" else params["axes"]
        if axis in removed:
            raise Joined
        return label._replace(axis=axis - sum(r < axis for r in removed))
    if name == "unstack":
        if axis == params["axis"]:
            raise Joined
        return label._replace(axis=axis - (params["axis"] < axis))
    if name == "stack":
        return label._replace(axis=axis + (params["axis"] <= axis))
    keeps = {
        "tile": lambda: len(params["reps"]) == len(shape) and params["reps"][axis] == 1,
        "slice": lambda: (
            out_shape[axis] == shape[axis]
            and (params["strides"] is None or params["strides"][axis] == 1)
        ),
        "dynamic_slice": lambda: first == 0 and out_shape[axis] == shape[axis],
        "dynamic_update_slice": lambda: first < 2 and shapes[0][axis] == shapes[1][axis],
        "split": lambda: params["axis"] != axis,
        "concatenate": lambda: params["dimension"] != axis,
        "pad": lambda: (
            first == 0 and params["padding_config"][axis] == (0, 0, 0) and given[1] is None
        ),
        "rev": lambda: axis not in params["dimensions"],
        "sort": lambda: params["dimension"] != axis,
        "fft": lambda: axis < len(shape) - len(params["fft_lengths"]),
    }
    if name in keeps:
        kept = keeps[name]()
    elif name.startswith("cum"):
        kept = params["axis"] != axis
    elif name.startswith("reduce_window"):
        plain = all(
            params.get(k, (1,) * len(shape))[axis] == 1
            for k in ("window_dimensions", "window_strides", "base_dilation")
        )
        kept = plain and params["padding"][axis] == (0, 0)
    elif name in _LEADING:
        kept = axis < len(shape) - _LEADING[name]
    else:
        kept = False
    if not kept:
        raise Joined
    return label


def _of_product(numbers: Any, shapes: Sequence[tuple[int, ...]], given: list[Label]) -> Label:
    (contract, batch) = numbers
    if any(g is not None and g.axis < 0 for g in given):
        return same(given)
    found: list[Label] = []
    for side, label in enumerate(given):
        if label is None:
            continue
        if label.axis in contract[side]:
            raise Joined
        if label.axis in batch[side]:
            found.append(label._replace(axis=batch[side].index(label.axis)))
            continue
        free = [i for i in range(len(shapes[side])) if i not in (*contract[side], *batch[side])]
        before = len(batch[0]) + (
            0 if side == 0 else len(shapes[0]) - len(contract[0]) - len(batch[0])
        )
        found.append(label._replace(axis=before + free.index(label.axis)))
    return same(found)


def _of_reshape(
    label: Along, shape: tuple[int, ...], out_shape: tuple[int, ...], dimensions: Any
) -> Along:
    """Row-major order is kept.

    So that an axis is found again by how many elements are before and within.
    """
    if dimensions is not None:
        raise Joined
    before = math.prod(shape[: label.axis]) * label.outer
    size = shape[label.axis] // (label.outer * label.inner)
    start = 1
    for axis, n in enumerate(out_shape):
        if start <= before and before % start == 0 and n % (before // start * size) == 0 and n > 1:
            outer = before // start
            return Along(axis, outer, n // (outer * size))
        start *= n
    raise Joined


def _of_gather(eqn: JaxprEqn, given: list[Label], counts: dict[Any, Any]) -> Label:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand_shape, label = eqn.invars[0].aval.shape, given[0]  # pyright: ignore
    if label is None or given[1] is not None:
        raise Joined
    if label.axis < 0:
        return label
    axis = label.axis
    out_ndim = len(eqn.outvars[0].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
    of_index = [
        i for i in range(out_ndim) if i not in numbers.offset_dims
    ]  # axes of the output that are those of the indices
    if axis in numbers.operand_batching_dims:
        at = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
        return label._replace(axis=of_index[at])
    if axis in numbers.collapsed_slice_dims:
        column = numbers.start_index_map.index(axis) if axis in numbers.start_index_map else -1
        counted = counts.get(eqn.invars[1])
        at = counted[column] if isinstance(counted, tuple) and column >= 0 else None
        if at is None or eqn.invars[1].aval.shape[at] != operand_shape[axis]:  # pyright: ignore
            raise Joined
        return label._replace(axis=of_index[at])
    if sizes[axis] != operand_shape[axis]:
        raise Joined
    window = [
        i
        for i in range(len(operand_shape))
        if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    return label._replace(axis=numbers.offset_dims[window.index(axis)])


def count(eqn: JaxprEqn, counts: dict[Any, Any]) -> None:
    """Follows arrays that count 0, 1, 2 ...

    along one axis (an int), and indices with such columns (a tuple of these).
    """
    if not eqn.outvars:  # such as `jax.debug.print`
        return
    name, params = eqn.primitive.name, eqn.params
    known = [counts.get(v) if not isinstance(v, Literal) else None for v in eqn.invars]
    out = eqn.outvars[0]
    shape = getattr(out.aval, "shape", ())
    result: Any = None
    if name == "iota":
        result = params["dimension"]
    elif name in ("convert_element_type", "copy") and known[0] is not None:
        result = known[0]
    elif name == "broadcast_in_dim" and isinstance(known[0], int):
        result = params["broadcast_dimensions"][known[0]]
        result = result if shape[result] == eqn.invars[0].aval.shape[known[0]] else None  # pyright: ignore
    elif name == "reshape" and isinstance(known[0], int):
        old = eqn.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        if [n for n in old if n != 1] == [n for n in shape if n != 1] and old[known[0]] != 1:
            kept = [i for i, n in enumerate(old) if n != 1].index(known[0])
            result = [i for i, n in enumerate(shape) if n != 1][kept]
    elif (
        name == "lt"
        and isinstance(known[0], int)
        and isinstance(eqn.invars[1], Literal)
        and eqn.invars[1].val == 0
    ):
        result = "never"
    elif name == "select_n" and known[0] == "never":
        result = known[1]  # what is counted from 0 is never negative
    elif name == "concatenate" and params["dimension"] == len(shape) - 1:
        result = tuple(
            column
            for v, k in zip(eqn.invars, known, strict=True)
            for column in [k if isinstance(k, int) else None] * v.aval.shape[-1]  # pyright: ignore
        )
    if result is not None:
        counts[out] = result
    for inner in subprograms(eqn) if name in CALLS else []:
        known_inside = {v: k for v, k in zip(inner.invars, known, strict=False) if k is not None}
        for step in inner.eqns:
            count(step, known_inside)
        counts.update(
            (o, known_inside[v])
            for o, v in zip(eqn.outvars, inner.outvars, strict=False)
            if v in known_inside
        )
