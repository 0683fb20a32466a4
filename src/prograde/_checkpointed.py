"""A function cut into segments that reverse mode recomputes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from prograde._costs import multiply_adds, multiply_adds_of
from prograde._jaxprs import as_closed, called, equations, scan_groups, traced, walk


def checkpointed(fun: Callable[..., Any], num_segments: int | None) -> Callable[..., Any]:
    """The same function, of which reverse mode stores less.

    It stores the inputs of segments and of each `scan` iteration, and computes the rest again.

    The segments have about equal numbers of multiply-adds. When `num_segments` is `None` there are
    as many as the square root of the number of products and loops, which stores about twice that
    many activations.
    """

    def run(*args: Any) -> Any:
        program, rebuilt = traced(fun, *args)
        segments = num_segments or max(
            1, math.isqrt(sum(_is_heavy(eqn) for eqn in equations(program.jaxpr)))
        )
        most = multiply_adds(program.jaxpr) / segments
        return rebuilt(_run(program, jax.tree.leaves(args), most))

    return run


def _is_heavy(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in ("dot_general", "conv_general_dilated", "scan")


def _run(program: ClosedJaxpr, args: Sequence[Any], most: float) -> list[Any]:
    """Runs a program whose segments and loop bodies are checkpointed.

    A call with too much work is cut inside.
    """

    def operation(part: Any, values: list[Any]) -> list[Any]:
        if isinstance(part, _Segment):
            return jax.checkpoint(jaxpr_as_fun(ClosedJaxpr(part.program, ())))(*values)
        if part.primitive.name == "scan":
            return _scan(part, values)
        inner = called(part)
        assert inner is not None
        return _run(inner, values, most)

    return walk(program, args, operation, parts=_parts(program.jaxpr, most))


class _Segment:
    """Equations that are run as one.

    With the variables they need and the ones needed after them.
    """

    def __init__(
        self, whole: Jaxpr, eqns: list[JaxprEqn], last_use: dict[Any, int], end: int
    ) -> None:
        made = {v for eqn in eqns for v in eqn.outvars}
        needed = (v for eqn in eqns for v in eqn.invars if not isinstance(v, Literal))
        self.invars = list(dict.fromkeys(v for v in needed if v not in made))
        self.outvars = [v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) >= end]
        self.program = whole.replace(
            constvars=[],
            invars=self.invars,
            outvars=self.outvars,
            eqns=eqns,
            debug_info=whole.debug_info.with_unknown_names(),
        )


def _parts(jaxpr: Jaxpr, most: float) -> list[Any]:
    """The program as segments of at most this many multiply-adds, loops, and calls with more."""
    last_use = {
        v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, Literal)
    }
    last_use |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    parts: list[Any] = []
    segment: list[JaxprEqn] = []
    work = 0.0

    def close(end: int) -> None:
        nonlocal segment, work
        if segment:
            parts.append(_Segment(jaxpr, segment, last_use, end))
        segment, work = [], 0.0

    for i, eqn in enumerate(jaxpr.eqns):
        cost = multiply_adds_of(eqn)
        # what the user checkpoints stays as it is
        is_call = called(eqn) is not None and "prevent_cse" not in eqn.params
        if eqn.primitive.name == "scan" or (is_call and cost > most):
            close(i)
            parts.append(eqn)
            continue
        if work + cost > most:
            close(i)
        segment.append(eqn)
        work += cost
    close(len(jaxpr.eqns))
    return parts


def _scan(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    consts, carry, xs = scan_groups(eqn, values)
    body = jaxpr_as_fun(as_closed(eqn.params["jaxpr"]))

    @jax.checkpoint
    def iteration(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out = body(*consts, *carry, *x)
        return out[: len(carry)], out[len(carry) :]

    params = eqn.params
    carry, ys = lax.scan(
        iteration, carry, xs, params["length"], params["reverse"], params["unroll"]
    )
    return [*carry, *ys]
