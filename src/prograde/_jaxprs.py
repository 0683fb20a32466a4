"""What a traced program needs: multiply-adds, memory that is live at once; and where in the user's code it comes from."""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import numpy as np
import quax
from jax._src import source_info_util
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

# where a program does something is a line of its author, not of what stands between
_HERE = os.path.dirname(__file__)
for _prefix in (
    quax.__path__[0],
    eqx.__path__[0],
    f"{_HERE}/_",
    f"{_HERE}/estimators",
    f"{_HERE}/kit",
    f"{_HERE}/tangents",
):
    source_info_util.register_exclusion(_prefix)


def source(eqn: JaxprEqn) -> str:
    """Where in the user's code an equation comes from, `file:line:column (function)`."""
    return source_info_util.summarize(eqn.source_info) or "an unknown place"


def current_source() -> str:
    """Where in the user's code the operation comes from that is being traced."""
    now = source_info_util.current()
    # an operation inside one that JAX traced before has no frame of the user: then what is being run has
    return (
        source_info_util.summarize(now)
        or source_info_util.summarize(now.replace(traceback=_jax.Traceback.get_traceback()))
        or "an unknown place"
    )


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on these values."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def subprograms(eqn: JaxprEqn) -> list[Jaxpr]:
    """The programs in an equation's parameters: bodies of loops, branches, called functions."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations, those of inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in subprograms(eqn):
            yield from equations(inner)


def multiply_adds(jaxpr: Jaxpr) -> int:
    """Multiply-adds of products and convolutions, and one for every element that any other operation makes; 40 for a random word.

    A loop of unknown length counts as one iteration, a branch as its dearest. Moving data (reshape, transpose, slices) counts
    nothing.
    """
    return sum(multiply_adds_of(eqn) for eqn in jaxpr.eqns)


_MOVES = {
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "slice", "dynamic_slice", "concatenate", "convert_element_type",
    "copy", "pad", "gather", "split", "rev", "iota", "expand_dims", "stop_gradient", "bitcast_convert_type",
}  # fmt: skip


_PER_RANDOM_WORD = 40  # operations of threefry


def multiply_adds_of(eqn: JaxprEqn) -> int:
    """`multiply_adds` of one equation."""
    name, inner = eqn.primitive.name, [multiply_adds(program) for program in subprograms(eqn)]
    out = sum(math.prod(v.aval.shape) for v in eqn.outvars)  # pyright: ignore[reportAttributeAccessIssue]
    if name == "scan":
        return eqn.params["length"] * sum(inner)
    if name == "cond":
        return max(inner, default=0)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return inner[0]  # the function itself, not its rules
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
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
        return sum(math.prod(v.aval.shape) for v in eqn.invars)  # pyright: ignore[reportAttributeAccessIssue]
    return out


def live_bytes(jaxpr: Jaxpr) -> int:
    """The most bytes of intermediate results that are live at once when every equation is run as it stands.

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
