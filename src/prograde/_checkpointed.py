"""A function cut into segments that reverse mode recomputes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from quax._compat import unpack_scan_args

from prograde._jaxprs import equations, multiply_adds, multiply_adds_of

_CALLS = {"jit", "pjit", "closed_call", "core_call"}


def checkpointed(fun: Callable[..., Any], num_segments: int | None) -> Callable[..., Any]:
    """The same function; reverse mode keeps what enters each of its segments, and each iteration of its scans, and no more.

    The segments have about equal numbers of multiply-adds. When `num_segments` is `None` there are as many as the square
    root of the number of products and loops, which keeps about twice that many activations.
    """

    def run(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        segments = num_segments or max(
            1, math.isqrt(sum(_is_heavy(eqn) for eqn in equations(traced.jaxpr)))
        )
        most = multiply_adds(traced.jaxpr) / segments
        out = _segments(traced.jaxpr, traced.consts, jax.tree.leaves(args), most)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def _is_heavy(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in ("dot_general", "conv_general_dilated", "scan")


def _segments(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], most: float) -> list[Any]:
    env: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )
    read = lambda v: v.val if isinstance(v, Literal) else env[v]  # noqa: E731
    last_use = {
        v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, Literal)
    }
    last_use |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    segment: list[JaxprEqn] = []
    work = 0.0

    def close(end: int) -> None:
        nonlocal segment, work
        if segment:
            made = {v for eqn in segment for v in eqn.outvars}
            needed = dict.fromkeys(
                v for e in segment for v in e.invars if not isinstance(v, Literal) and v not in made
            )
            kept = [v for eqn in segment for v in eqn.outvars if last_use.get(v, -1) >= end]
            inner = jaxpr.replace(
                constvars=[], invars=list(needed), outvars=kept, eqns=list(segment)
            )
            inner = inner.replace(debug_info=jaxpr.debug_info.with_unknown_names())
            out = jax.checkpoint(jaxpr_as_fun(ClosedJaxpr(inner, ())))(*map(read, needed))
            env.update(zip(kept, out, strict=True))
        segment, work = [], 0.0

    for i, eqn in enumerate(jaxpr.eqns):
        cost, name = multiply_adds_of(eqn), eqn.primitive.name
        if name == "scan" or (name in _CALLS and cost > most):
            close(i)
            out = (
                _scan(eqn, [read(v) for v in eqn.invars])
                if name == "scan"
                else _call(eqn, map(read, eqn.invars), most)
            )
            env.update(zip(eqn.outvars, out, strict=True))
            continue
        if work + cost > most:
            close(i)
        segment.append(eqn)
        work += cost
    close(len(jaxpr.eqns))
    return [read(v) for v in jaxpr.outvars]


def _call(eqn: JaxprEqn, values: Any, most: float) -> list[Any]:
    inner = next(v for v in eqn.params.values() if isinstance(v, ClosedJaxpr))
    return _segments(inner.jaxpr, inner.consts, list(values), most)


def _scan(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    params = dict(eqn.params)
    consts, carry, xs = unpack_scan_args(values, dict(params))
    body = jaxpr_as_fun(params["jaxpr"])

    @jax.checkpoint
    def iteration(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out = body(*consts, *carry, *x)
        return out[: len(carry)], out[len(carry) :]

    carry, ys = lax.scan(
        iteration, list(carry), list(xs), params["length"], params["reverse"], params["unroll"]
    )
    return [*carry, *ys]
