"""Along which axis the examples lie, found by tracing a program a second time with twice as many of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import PyTree
from quax._compat import unpack_scan_args

from prograde._jaxprs import source, subprograms


class ExamplesError(ValueError):
    """The examples of a batch cannot be told apart, or are not independent of each other."""


def is_traced(x: Any) -> bool:
    """Whether an argument is an input of the traced program; numbers and other objects are constants in it."""
    return isinstance(x, jax.Array | np.ndarray)


MIXED = object()  # more axes than one, or not whole examples


def axis_of(var: Any, twin: Any, batch: int) -> Any:
    """The axis of the examples: an int, `None` where the value is the same for all, `MIXED` where no axis is theirs alone."""
    shape, other = var.aval.shape, twin.aval.shape
    if shape == other:
        return None
    differing = [i for i, (n, m) in enumerate(zip(shape, other, strict=False)) if n != m]
    if len(shape) == len(other) and len(differing) == 1 and shape[differing[0]] * 2 == other[differing[0]] == 2 * batch:
        return differing[0]
    return MIXED


def doubled(of_args: Callable[..., Any], params: PyTree, args: tuple[Any, ...], batch: int) -> ClosedJaxpr:
    """The program `of_args(params, *args)` for twice as many examples: arrays of `args` whose first axis has `batch` elements."""
    arrays, rest = eqx.partition(args, is_traced)

    def double(x: Any) -> Any:
        aval = jax.typeof(x)
        return aval.update(shape=(2 * batch, *aval.shape[1:])) if aval.shape[:1] == (batch,) else aval

    try:
        traced = jax.make_jaxpr(lambda params, arrays: of_args(params, *eqx.combine(arrays, rest)))(
            params, jax.tree.map(double, arrays)
        )
    except Exception as error:
        raise ExamplesError(
            f"the function was traced a second time with {2 * batch} examples instead of {batch}, to find the axis of the "
            f"examples in every value, and that failed: {type(error).__name__}: {error}\n"
            f"Arrays among the arguments whose first axis has {batch} elements are taken as examples: take another batch size "
            "if one of them is not, and pass the batch as arguments of the function instead of closing over it."
        ) from error
    loss = traced.jaxpr.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if loss != (2 * batch,):
        raise ExamplesError(
            f"the function returned a loss of shape {loss} for {2 * batch} examples, and ({batch},) for {batch}. Pass the batch as "
            "arguments of the function, with the examples along their first axis, instead of closing over it."
        )
    return traced


def paired(jaxpr: Jaxpr, twin: Jaxpr) -> list[tuple[JaxprEqn, JaxprEqn]]:
    """The equations of a program and of its double, side by side."""
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    if names != [eqn.primitive.name for eqn in twin.eqns]:
        raise ExamplesError(
            "the function does something else for another number of examples, so the axis of the examples cannot be found. "
            "Let it not depend on the batch size, or pass per_example=False."
        )
    return list(zip(jaxpr.eqns, twin.eqns, strict=True))


def check_independent(jaxpr: Jaxpr, twin: Jaxpr, perturbed: Sequence[bool], batch: int) -> list[bool]:
    """Raises where one example's part of a perturbed value enters another's; returns which outputs are perturbed."""
    marked = {v for v, p in zip(jaxpr.invars, perturbed, strict=True) if p}
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    is_marked = lambda v: not isinstance(v, Literal) and v in marked  # noqa: E731
    for eqn, other in paired(jaxpr, twin):
        inputs = [is_marked(v) for v in eqn.invars]
        if not any(inputs):
            continue
        inner = list(zip(subprograms(eqn), subprograms(other), strict=True))
        name = eqn.primitive.name
        if name in _CALLS and len(inner) == 1 and len(inner[0][0].invars) == len(inputs):
            outputs = check_independent(*inner[0], inputs, batch)
            marked.update(v for v, p in zip(eqn.outvars, outputs, strict=True) if p)
            continue
        if name in _LOOPS_AND_BRANCHES:
            for program, double in inner:
                check_independent(program, double, [True] * len(program.invars), batch)
            mixed = name == "scan" and _runs_over_examples(eqn, other, inputs, batch)
        else:
            mixed = any(_mixes(eqn, other, i, batch, makers) for i, p in enumerate(inputs) if p)
        # a choice or a count, which has no derivative, carries nothing
        made = [v for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]  # pyright: ignore
        if mixed and made:
            raise ExamplesError(
                f"examples depend on each other: {name} at {source(eqn)} joins values of several examples, as batch "
                "normalisation does. Pass per_example=False, so that every perturbation is weighed by the loss of the whole "
                "batch (more variance, no bias), or normalise each example by itself."
            )
        marked.update(made)
    return [is_marked(v) for v in jaxpr.outvars]


def _runs_over_examples(eqn: JaxprEqn, twin: JaxprEqn, perturbed: Sequence[bool], batch: int) -> bool:
    """Whether a `scan` goes from example to example and carries something on."""
    _consts, carry, xs = unpack_scan_args(list(range(len(eqn.invars))), dict(eqn.params))
    axes = [axis_of(eqn.invars[i], twin.invars[i], batch) for i in xs if perturbed[i]]
    return len(carry) > 0 and any(axis == 0 for axis in axes)


_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}
_LOOPS_AND_BRANCHES = {"scan", "while", "cond"}
_ALONG = {
    "cumsum": "axis", "cumprod": "axis", "cummax": "axis", "cummin": "axis", "cumlogsumexp": "axis", "sort": "dimension",
    "concatenate": "dimension", "rev": "dimensions", "argsort": "dimension",
}  # fmt: skip


def _mixes(eqn: JaxprEqn, twin: JaxprEqn, position: int, batch: int, makers: dict[Any, JaxprEqn]) -> bool:
    """Whether an output's examples depend on other examples of this input."""
    axis = axis_of(eqn.invars[position], twin.invars[position], batch)
    if axis is None:
        return False
    name = eqn.primitive.name
    if axis is MIXED:  # such as examples and time steps merged into one axis
        return not _keeps_merged_axes(eqn, twin, position)
    if any(axis_of(v, w, batch) in (None, MIXED) for v, w in zip(eqn.outvars, twin.outvars, strict=True)):
        return name != "reshape"
    if name in _ALONG:
        along = eqn.params[_ALONG[name]]
        return axis in (along if isinstance(along, tuple) else (along,))
    if name == "gather":
        numbers = eqn.params["dimension_numbers"]
        indexed = axis in numbers.start_index_map and eqn.params["slice_sizes"][axis] != batch
        return position == 0 and indexed and not _counts(eqn.invars[1], numbers.start_index_map.index(axis), makers)
    if name.startswith("scatter"):
        return position == 0 and axis in eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
    if name.startswith("reduce_window") or name == "reduce_precision":
        return eqn.params.get("window_dimensions", (1,) * (axis + 1))[axis] != 1
    return False


def _keeps_merged_axes(eqn: JaxprEqn, twin: JaxprEqn, position: int) -> bool:
    """Whether an operation works on each element along the axes that hold the examples."""
    shape, other = (e.invars[position].aval.shape for e in (eqn, twin))  # pyright: ignore[reportAttributeAccessIssue]
    held = {i for i, (n, m) in enumerate(zip(shape, other, strict=True)) if n != m}
    name = eqn.primitive.name
    if name in ("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims"):
        return True
    if name == "dot_general":
        return held.isdisjoint(eqn.params["dimension_numbers"][0][position])
    if name.startswith(("reduce_", "arg")):
        return held.isdisjoint(eqn.params["axes"])
    return all(v.aval.shape in (shape, ()) for v in (*eqn.invars, *eqn.outvars)) and name not in _ALONG  # pyright: ignore


def _counts(index: Any, column: int, makers: dict[Any, JaxprEqn]) -> bool:
    """Whether a column of an index is made from nothing but a count 0, 1, 2 ..., as in `x[arange(n), label]`."""
    maker = makers.get(index)
    if (
        maker is not None
        and maker.primitive.name == "concatenate"
        and maker.params["dimension"] == len(index.aval.shape) - 1
    ):
        widths = [math.prod(v.aval.shape[-1:]) for v in maker.invars]  # pyright: ignore[reportAttributeAccessIssue]
        ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        return _is_constant(maker.invars[next(i for i, end in enumerate(ends) if column < end)], makers)
    return _is_constant(index, makers)


def _is_constant(var: Any, makers: dict[Any, JaxprEqn]) -> bool:
    if isinstance(var, Literal):
        return True
    return (
        var in makers
        and makers[var].primitive.name in _COUNTING
        and all(_is_constant(v, makers) for v in makers[var].invars)
    )


_COUNTING = {"iota", "broadcast_in_dim", "reshape", "convert_element_type", "lt", "add", "select_n"}
