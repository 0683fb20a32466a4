"""Along which axis the examples lie.

Found by tracing a program a second time with twice as many of them.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import PyTree

from prograde._sites.labels import Along


class ExamplesError(ValueError):
    """The examples of a batch cannot be told apart, or are not independent of each other."""


def is_traced(x: Any) -> bool:
    """Whether an argument is an input of the traced program.

    Numbers and other objects are constants in it.
    """
    return isinstance(x, jax.Array | np.ndarray)


MIXED = object()  # more axes than one, or not whole examples


def where(var: Any, twin: Any, batch: int, merged: Along | None = None) -> Any:
    """Where the examples lie in a value, from its shape and that of its double.

    **Returns:** `Along`; `None` where the value is the same for all examples; `MIXED` where no axis
    is theirs. `merged` is what `layout_of` found, for an axis that they share with others.
    """
    shape, other = var.aval.shape, twin.aval.shape
    if shape == other:
        return None
    differing = [i for i, (n, m) in enumerate(zip(shape, other, strict=False)) if n != m]
    if len(shape) != len(other) or len(differing) != 1:
        return MIXED
    (axis,) = differing
    if 2 * shape[axis] != other[axis]:
        return MIXED
    if shape[axis] == batch:
        return Along(axis)
    if merged is not None and merged.axis == axis:
        return merged if merged.outer * batch * merged.inner == shape[axis] else MIXED
    return MIXED


def doubled(
    of_args: Callable[..., Any], params: PyTree, args: tuple[Any, ...], batch: int, num_losses: int
) -> ClosedJaxpr:
    """The program `of_args(params, *args)` for twice as many examples.

    Arrays of `args` whose first axis has `batch` elements.
    """
    arrays, rest = eqx.partition(args, is_traced)

    def double(x: Any) -> Any:
        aval = jax.typeof(x)
        return (
            aval.update(shape=(2 * batch, *aval.shape[1:])) if aval.shape[:1] == (batch,) else aval
        )

    try:
        traced = jax.make_jaxpr(lambda params, arrays: of_args(params, *eqx.combine(arrays, rest)))(
            params, jax.tree.map(double, arrays)
        )
    except Exception as error:
        raise ExamplesError(
            f"the function was traced a second time with {2 * batch} examples instead of {batch}, "
            "to find the axis of the "
            f"examples in every value, and that failed: {type(error).__name__}: {error}\n"
            f"Arrays among the arguments whose first axis has {batch} elements are taken as "
            "examples: take another batch size "
            "if one of them is not, and pass the batch as arguments of the function instead of "
            "closing over it."
        ) from error
    for loss in (v.aval.shape for v in traced.jaxpr.outvars[:num_losses]):  # pyright: ignore
        if loss[:1] != (2 * batch,):
            raise ExamplesError(
                f"the function returned a loss of shape {loss} for {2 * batch} examples, and "
                f"{(batch, *loss[1:])} for {batch}. Pass "
                "the batch by position, as arrays with the examples along their first axis, "
                "instead of closing over it or by keyword."
            )
    return traced


def twins_of(jaxpr: Jaxpr, twin: Jaxpr | None) -> dict[int, JaxprEqn]:
    """For each equation of a program, by its `id`, the same equation of the double.

    Empty without a double.
    """
    if twin is None:
        return {}
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    if names != [eqn.primitive.name for eqn in twin.eqns]:
        raise ExamplesError(
            "the function does something else for another number of examples, so the axis of the "
            "examples cannot "
            "be found. Let it not depend on the batch size, or pass per_example=False."
        )
    return {id(eqn): other for eqn, other in zip(jaxpr.eqns, twin.eqns, strict=True)}
