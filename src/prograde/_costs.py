"""What a traced program costs: multiply-adds, and the bytes that are live at once."""

import math
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var

from prograde._jaxprs import equations, subprograms


def multiply_adds(jaxpr: Jaxpr) -> int:
    """The multiply-adds of a program.

    Products and convolutions count theirs, other operations one for each element that they make.

    A random word counts 40. A loop of unknown length counts as one iteration, and a decision as its
    most expensive branch. Moving data (reshape, transpose, slices) counts nothing.
    """
    return sum(multiply_adds_of(eqn) for eqn in jaxpr.eqns)


_MOVES = {
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "slice", "dynamic_slice",
    "concatenate", "convert_element_type", "copy", "pad", "gather", "split", "rev", "iota",
    "expand_dims", "stop_gradient", "bitcast_convert_type", "pvary", "pcast",
}  # fmt: skip


_PER_RANDOM_WORD = 40  # operations of threefry


def multiply_adds_of(eqn: JaxprEqn) -> int:
    """`multiply_adds` of one equation."""
    name, inner = eqn.primitive.name, [multiply_adds(program) for program in subprograms(eqn)]
    out = sum(math.prod(v.aval.shape) for v in eqn.outvars)  # pyright: ignore
    if name == "scan":
        return eqn.params["length"] * sum(inner)
    if name == "cond":
        return max(inner, default=0)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return inner[0]  # the function itself, not its rules
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)  # pyright: ignore
    if name == "ragged_dot_general":
        (contract, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        return out * math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)  # pyright: ignore
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        return (
            out * math.prod(kernel) // max(1, kernel[eqn.params["dimension_numbers"].rhs_spec[0]])
        )
    if name.startswith("reduce_window"):
        return out * math.prod(eqn.params["window_dimensions"])
    if inner and not name.startswith(("reduce", "scatter", "sort")):  # calls, while_loop
        return sum(inner)
    if name == "random_bits":
        return _PER_RANDOM_WORD * out
    if name in _MOVES or name.startswith("random_"):
        return 0
    if name.startswith(("reduce", "arg", "cum")):
        return sum(math.prod(v.aval.shape) for v in eqn.invars)  # pyright: ignore
    return out


def largest_array(jaxpr: Jaxpr) -> tuple[int, tuple[int, ...], str]:
    """(bytes, shape, operation) of the largest array that an equation makes, at any depth.

    Results that only repeat or convert others are left out: a compiler reads them where they are
    used.
    """
    found = [(0, (), "")]
    for eqn in equations(jaxpr):
        if eqn.primitive.name not in _MOVES and not subprograms(eqn):
            found += [(_bytes(v), v.aval.shape, eqn.primitive.name) for v in eqn.outvars]  # pyright: ignore
    return max(found, key=lambda entry: entry[0])


def live_bytes(jaxpr: Jaxpr) -> int:
    """The most bytes of intermediate results that are live at once.

    Every equation is taken to run as it stands.

    A compiler that fuses operations needs less.
    """
    last_use: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last_use.update((v, i) for v in eqn.invars if isinstance(v, Var))
    kept = {v for v in jaxpr.outvars if isinstance(v, Var)}
    made: dict[Any, int] = {}
    live = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        outputs = {v: _bytes(v) for v in eqn.outvars if v in last_use or v in kept}
        inside = max((live_bytes(program) for program in subprograms(eqn)), default=0)
        peak = max(peak, live + max(sum(outputs.values()), inside))
        made |= outputs
        live += sum(outputs.values())
        for v in {
            v for v in eqn.invars if isinstance(v, Var) and last_use[v] == i and v not in kept
        }:
            live -= made.pop(v, 0)
    return peak


def _bytes(v: Any) -> int:
    try:
        return math.prod(v.aval.shape) * np.dtype(v.aval.dtype).itemsize
    except TypeError:  # keys
        return 8 * math.prod(v.aval.shape)
