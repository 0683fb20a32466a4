"""Whether the noise of one example can reach the loss of another: a rule for each operation, and refusal of all others.

A value that noise has reached is labelled with the axis along which the examples lie: a position along it depends on the
noise of one example only. Values without noise (data, and weights that were perturbed as a whole) have no label and may be mixed.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from quax._compat import unpack_scan_args

from prograde._jaxprs import bind, source, subprograms
from prograde._sites.examples import MIXED, ExamplesError, axis_of, paired


class Along(NamedTuple):
    """The examples lie along this axis; merged with others, example = (position // inner) mod batch, and `outer` times over.

    A negative axis is that of an enclosing loop, -1 the innermost: what is inside an iteration is one example's.
    """

    axis: int
    outer: int = 1
    inner: int = 1


ANYWHERE = Along(1_000_000)  # reached by noise, of any example; never seen by `check_independent`

Label = Along | None


class _Joined(Exception):
    """An operation joins examples, or is not known."""


def check_independent(jaxpr: Jaxpr, twin: Jaxpr, weights: Sequence[bool], batch: int) -> None:
    """Raises unless the loss of an example depends on the noise of that example alone. `weights` says which inputs are weights."""
    for loss in Walk(batch).run(jaxpr, twin, [None] * len(weights), list(weights))[0]:
        if loss not in (None, Along(0)):
            raise ExamplesError(
                f"the examples do not lie along the first axis of the loss, but along {loss}."
            )


class Walk:
    """Follows labels through a program, and refuses what joins examples."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.path: tuple[int, ...] = ()  # the calls and loops that the walk is inside
        self.in_rule = False  # inside a hand-made derivative, where others are not looked at
        self.derivatives: dict[Any, Jaxpr] = {}  # of functions with a hand-made one

    def enters(self, eqn: JaxprEqn) -> bool:
        """Whether something begins inside an operation that no label has reached."""
        return False

    def began(self, var: Any, label: Label) -> Label:
        """The label of a variable, given that of what it was computed from."""
        return label

    def joined(self, eqn: JaxprEqn) -> list[Label]:
        """The labels of the outputs of an operation that joins examples, or is not known to keep them apart."""
        raise ExamplesError(
            f"examples depend on each other, or cannot be told apart, after {eqn.primitive.name} at {source(eqn)}: it joins "
            "values of several examples, as batch normalisation does, or is not known to keep them apart. Pass "
            "per_example=False, so that every perturbation is weighed by the loss of the whole batch (more variance, no "
            "bias), or write it for each example by itself."
        )

    def passed_on(self, label: Label) -> Label:
        """The label, in the next iteration of a loop, of what an iteration hands on."""
        if label is not None and label.axis == -1:
            raise _Joined  # something goes on from example to example
        return label

    def same(self, labels: Any) -> Label:
        """The one label of values that come together."""
        return _same(labels)

    def run(
        self, jaxpr: Jaxpr, twin: Jaxpr | None, labels: Sequence[Label], weights: Sequence[bool]
    ) -> tuple[list[Label], list[bool]]:
        """The labels of the outputs, and which are functions of weights that noise has not reached."""
        label: dict[Any, Label] = {
            v: self.began(v, given) for v, given in zip(jaxpr.invars, labels, strict=True)
        }
        label |= {v: self.began(v, None) for v in jaxpr.constvars}
        weight: dict[Any, bool] = dict(zip(jaxpr.invars, weights, strict=True))
        counts: dict[Any, Any] = {}
        of = lambda v: None if isinstance(v, Literal) else label.get(v)  # noqa: E731
        is_weight = lambda v: not isinstance(v, Literal) and weight.get(v, False)  # noqa: E731
        pairs = paired(jaxpr, twin) if twin is not None else [(eqn, None) for eqn in jaxpr.eqns]
        for eqn, other in pairs:
            _count(eqn, counts)
            given, from_weights = [of(v) for v in eqn.invars], [is_weight(v) for v in eqn.invars]
            out: list[Label] = [None] * len(eqn.outvars)
            out_weights = [False] * len(eqn.outvars)
            if any(g is not None for g in given) or any(from_weights) or self.enters(eqn):
                outside, self.path = self.path, (*self.path, id(eqn))
                try:
                    out, out_weights = self.equation(eqn, other, given, from_weights, counts)
                except _Joined:
                    out = self.joined(eqn)
                finally:
                    self.path = outside
            for var, new, from_weight in zip(eqn.outvars, out, out_weights, strict=True):
                differentiable = jnp.issubdtype(var.aval.dtype, jnp.inexact)  # pyright: ignore[reportAttributeAccessIssue]
                label[var], weight[var] = (new, from_weight) if differentiable else (None, False)
                label[var] = self.began(var, label[var])
        return [of(v) for v in jaxpr.outvars], [is_weight(v) for v in jaxpr.outvars]

    def equation(
        self,
        eqn: JaxprEqn,
        twin: JaxprEqn | None,
        given: list[Label],
        weights: list[bool],
        counts: dict[Any, Any],
    ) -> tuple[list[Label], list[bool]]:
        name = eqn.primitive.name
        doubles = [None] * len(subprograms(eqn)) if twin is None else subprograms(twin)
        if name in _CALLS:
            return self.run(subprograms(eqn)[0], doubles[0], given, weights)
        if name == "custom_jvp_call":
            labels, from_weights = self.run(subprograms(eqn)[0], doubles[0], given, weights)
            if not self.in_rule:
                by_rule = self.custom_rule(eqn, given)
                labels = [self.same(both) for both in zip(labels, by_rule, strict=True)]
            return labels, from_weights
        if name == "scan":
            return self.scan(eqn, doubles[0], given, weights)
        if name == "while":
            return self.loop(eqn, doubles, given, weights)
        if name == "cond":
            branches = [
                self.run(b, d, given[1:], weights[1:])
                for b, d in zip(subprograms(eqn), doubles, strict=True)
            ]
            labels = [
                self.same(branch[0][i] for branch in branches) for i in range(len(eqn.outvars))
            ]
            return labels, [
                any(branch[1][i] for branch in branches) for i in range(len(eqn.outvars))
            ]
        if name == "stop_gradient":
            return [None] * len(eqn.outvars), [False] * len(eqn.outvars)
        if any(g is not None for g in given):
            label = self.propagated(eqn, given, counts)
            # where more noise is injected it must lie along the same axis
            if twin is not None and any(weights) and label is not None and label.axis >= 0:
                axes = [
                    axis_of(v, w, self.batch)
                    for v, w in zip(eqn.outvars, twin.outvars, strict=True)
                ]
                if any(isinstance(axis, int) and axis != label.axis for axis in axes):
                    raise _Joined
            return [label] * len(eqn.outvars), [False] * len(eqn.outvars)
        # weights meet the examples: there noise may be injected, along the axis that grows with them
        axes: list[Any] = [None] * len(eqn.outvars)
        if twin is not None:
            axes = [
                axis_of(v, w, self.batch) for v, w in zip(eqn.outvars, twin.outvars, strict=True)
            ]
        labels = [None if axis is None or axis is MIXED else Along(axis) for axis in axes]
        return labels, [
            label is None and axis is None for label, axis in zip(labels, axes, strict=True)
        ]

    def propagated(self, eqn: JaxprEqn, given: list[Label], counts: dict[Any, Any]) -> Label:
        """The label of the outputs of an operation that noise reaches."""
        return _propagated(eqn, given, counts)

    def custom_rule(self, eqn: JaxprEqn, given: list[Label]) -> list[Label]:
        """A hand-made derivative must keep the examples apart as well: the labels of the outputs by it."""
        moved = [i for i, g in enumerate(given) if g is not None]
        if not moved:
            return [None] * len(eqn.outvars)
        avals = [v.aval for v in eqn.invars]

        def derivative(values: list[Any], tangents: list[Any]) -> Any:
            def of_moved(*some: Any) -> Any:
                complete = list(values)
                for i, value in zip(moved, some, strict=True):
                    complete[i] = value
                return bind(eqn, complete)

            return jax.jvp(of_moved, [values[i] for i in moved], tangents)[1]

        known = id(eqn), tuple(moved)
        if known not in self.derivatives:
            self.derivatives[known] = jax.make_jaxpr(derivative)(
                avals, [avals[i] for i in moved]
            ).jaxpr
        jaxpr = self.derivatives[known]
        labels = [*given, *(given[i] for i in moved)]
        self.in_rule = True
        try:
            return self.run(jaxpr, None, labels, [False] * len(labels))[0]
        finally:
            self.in_rule = False

    def scan(
        self, eqn: JaxprEqn, double: Any, given: list[Label], weights: list[bool]
    ) -> tuple[list[Label], list[bool]]:
        consts, carry, xs = unpack_scan_args(
            list(zip(given, weights, strict=True)), dict(eqn.params)
        )
        consts, carry = (
            [(_inside(label), weight) for label, weight in part] for part in (consts, carry)
        )
        slices = [(_moved(label, -1), weight) for label, weight in xs]
        for _ in range(len(carry) + 2):
            inputs = [*consts, *carry, *slices]
            labels, from_weights = self.run(
                subprograms(eqn)[0], double, [i[0] for i in inputs], [i[1] for i in inputs]
            )
            new = [
                (self.same([old, self.passed_on(label)]), old_weight or weight)
                for (old, old_weight), label, weight in zip(
                    carry, labels, from_weights, strict=False
                )
            ]
            if new == carry:
                break
            carry = new
        stacked = [_moved(label, 1) for label in labels[len(carry) :]]
        return [_outside(label) for label, _ in carry] + stacked, [
            w for _, w in carry
        ] + from_weights[len(carry) :]

    def loop(
        self, eqn: JaxprEqn, doubles: Any, given: list[Label], weights: list[bool]
    ) -> tuple[list[Label], list[bool]]:
        skipped, num_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        inputs = list(zip(given, weights, strict=True))[skipped:]
        consts, carry = inputs[:num_consts], inputs[num_consts:]
        at = subprograms(eqn).index(eqn.params["body_jaxpr"].jaxpr)
        for _ in range(len(carry) + 2):
            every = [*consts, *carry]
            labels, from_weights = self.run(
                eqn.params["body_jaxpr"].jaxpr,
                doubles[at],
                [i[0] for i in every],
                [i[1] for i in every],
            )
            new = [
                (self.same([c[0], label]), c[1] or w)
                for c, label, w in zip(carry, labels, from_weights, strict=True)
            ]
            if new == carry:
                break
            carry = new
        return [c[0] for c in carry], [c[1] for c in carry]


def _moved(label: Label, by: int) -> Label:
    """The label of a slice along the first axis, or of what such slices are stacked to."""
    return label if label in (None, ANYWHERE) else label._replace(axis=label.axis + by)


def _inside(label: Label) -> Label:
    """The label, seen from inside one more loop."""
    return _moved(label, -1) if label is not None and label.axis < 0 else label


def _outside(label: Label) -> Label:
    """Undoes `_inside`."""
    return _moved(label, 1) if label is not None and label.axis < 0 else label


def _same(labels: Any) -> Label:
    found = {label for label in labels if label is not None}
    if len(found) > 1:
        raise _Joined
    return found.pop() if found else None


_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_vjp_call"}
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "rem", "pow", "integer_pow", "max", "min", "neg", "abs", "sign", "exp", "exp2", "log", "log1p",
    "expm1", "sqrt", "rsqrt", "cbrt", "square", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh",
    "acosh", "atanh", "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma", "floor", "ceil", "round", "is_finite", "nextafter",
    "select_n", "clamp", "convert_element_type", "reduce_precision", "copy", "copy_p", "pvary", "pcast", "add_any", "real", "imag",
    "complex", "conj", "eq", "ne", "gt", "ge", "lt", "le", "and", "or", "not", "xor", "bessel_i0e", "bessel_i1e", "igamma", "igammac",
    "polygamma", "mul_no_nan",
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


def _propagated(eqn: JaxprEqn, given: list[Label], counts: dict[Any, Any]) -> Label:
    """The label of the outputs of an operation that noise reaches; raises where it joins examples or is not known."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]  # pyright: ignore[reportAttributeAccessIssue]
    out_shape = eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if name == "dot_general":
        return _of_product(params["dimension_numbers"], shapes, given)
    if name == "conv_general_dilated":
        numbers, (x, kernel) = params["dimension_numbers"], given
        if any(g is not None and g.axis < 0 for g in given):
            return _same(given)
        if (
            kernel is not None
            or x is None
            or x.axis != numbers.lhs_spec[0]
            or params["batch_group_count"] != 1
        ):
            raise _Joined
        return x._replace(axis=numbers.out_spec[0])
    if name == "gather":
        return _of_gather(eqn, given, counts)
    label = _same(given)
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
            raise _Joined
        return label
    if name == "transpose":
        return label._replace(axis=params["permutation"].index(axis))
    if name == "broadcast_in_dim":
        to = params["broadcast_dimensions"][axis]
        if out_shape[to] != shape[axis]:
            raise _Joined
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
            raise _Joined
        return label._replace(axis=axis - sum(r < axis for r in removed))
    if name == "unstack":
        if axis == params["axis"]:
            raise _Joined
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
        raise _Joined
    return label


def _of_product(numbers: Any, shapes: Sequence[tuple[int, ...]], given: list[Label]) -> Label:
    (contract, batch) = numbers
    if any(g is not None and g.axis < 0 for g in given):
        return _same(given)
    found: list[Label] = []
    for side, label in enumerate(given):
        if label is None:
            continue
        if label.axis in contract[side]:
            raise _Joined
        if label.axis in batch[side]:
            found.append(label._replace(axis=batch[side].index(label.axis)))
            continue
        free = [i for i in range(len(shapes[side])) if i not in (*contract[side], *batch[side])]
        before = len(batch[0]) + (
            0 if side == 0 else len(shapes[0]) - len(contract[0]) - len(batch[0])
        )
        found.append(label._replace(axis=before + free.index(label.axis)))
    return _same(found)


def _of_reshape(
    label: Along, shape: tuple[int, ...], out_shape: tuple[int, ...], dimensions: Any
) -> Along:
    """Row-major order is kept, so that an axis is found again by how many elements are before and within."""
    if dimensions is not None:
        raise _Joined
    before = math.prod(shape[: label.axis]) * label.outer
    size = shape[label.axis] // (label.outer * label.inner)
    start = 1
    for axis, n in enumerate(out_shape):
        if start <= before and before % start == 0 and n % (before // start * size) == 0 and n > 1:
            outer = before // start
            return Along(axis, outer, n // (outer * size))
        start *= n
    raise _Joined


def _of_gather(eqn: JaxprEqn, given: list[Label], counts: dict[Any, Any]) -> Label:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand_shape, label = eqn.invars[0].aval.shape, given[0]  # pyright: ignore[reportAttributeAccessIssue]
    if label is None or given[1] is not None:
        raise _Joined
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
            raise _Joined
        return label._replace(axis=of_index[at])
    if sizes[axis] != operand_shape[axis]:
        raise _Joined
    window = [
        i
        for i in range(len(operand_shape))
        if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    return label._replace(axis=numbers.offset_dims[window.index(axis)])


def _count(eqn: JaxprEqn, counts: dict[Any, Any]) -> None:
    """Follows arrays that count 0, 1, 2 ... along one axis (an int), and indices with such columns (a tuple of these)."""
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
    for inner in subprograms(eqn) if name in _CALLS else []:
        inside = {v: k for v, k in zip(inner.invars, known, strict=False) if k is not None}
        for step in inner.eqns:
            _count(step, inside)
        counts.update(
            (o, inside[v]) for o, v in zip(eqn.outvars, inner.outvars, strict=False) if v in inside
        )
