"""What forward mode cannot pass: refused by name, or differentiated as its code.

All forward runs of this package go through `bind_forward`, so that every estimator refuses the same
things with the same words.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, JaxprEqn

from prograde import _findings
from prograde._control_flow import enter
from prograde._jaxprs import (
    as_closed,
    bind,
    files_of,
    function_name,
    inner_programs,
    source,
    traced,
    walk,
    with_inner,
)


def is_custom_vjp(eqn: JaxprEqn) -> bool:
    """Whether an equation calls a function with a `jax.custom_vjp`."""
    return eqn.primitive.name.startswith("custom_vjp_call")


def describe(eqn: JaxprEqn) -> str:
    """The name of the called function, or of the operation, and its place.

    `name (file:line:column (caller))`.
    """
    name = function_name(_code(eqn)) if is_custom_vjp(eqn) else eqn.primitive.name
    return f"{name} ({source(eqn)})"


def _code(eqn: JaxprEqn) -> ClosedJaxpr:
    return as_closed(eqn.params["call_jaxpr"])


# Libraries whose own code has a reverse rule, and what to pass to them instead. A rule is theirs
# when the
# innermost frame of its traceback is in one of the first parts; the first of the second parts that
# occurs anywhere in
# the traceback gives the advice.
_REVERSE_ONLY = (
    "/equinox/internal/_loop/",
    "/diffrax/_adjoint.py",
    "/optimistix/_adjoint.py",
    "/jaxopt/",
    "/jax/experimental/ode.py",
)
_ADVICE = {
    "/diffrax/_": (
        "This adjoint of diffrax is for reverse mode only: pass adjoint=diffrax.ForwardMode() to "
        "diffrax.diffeqsolve."
    ),
    "/optimistix/_": (
        "This adjoint of optimistix is for reverse mode only: pass "
        "adjoint=optimistix.ImplicitAdjoint() to the solver."
    ),
    "/equinox/internal/_loop/": (
        "A checkpointed loop of equinox is for reverse mode only: pass kind='lax' to it."
    ),
    "/jaxopt/": (
        "The implicit differentiation of jaxopt is for reverse mode only: pass implicit_diff=False "
        "to the solver."
    ),
    "/jax/experimental/ode.py": (
        "jax.experimental.ode.odeint has a rule for reverse mode only: pass custom_vjp='inline' to "
        "the "
        "estimator, or use diffrax.diffeqsolve with adjoint=diffrax.ForwardMode()."
    ),
}
_BETWEEN = (
    "/jax/_src/",
    "/jaxlib/",
    "/quax/",
    "/equinox/_ad.py",
    "/equinox/_vmap_pmap.py",
    "/equinox/_jit.py",
)


def remedy(eqn: JaxprEqn) -> str:
    """What to do about a function with a reverse rule that forward mode meets, in a sentence."""
    files = files_of(eqn)
    innermost = next((file for file in files if not any(part in file for part in _BETWEEN)), "")
    if any(part in innermost for part in _REVERSE_ONLY):
        for part, sentence in _ADVICE.items():
            if any(part in file for file in files):
                return sentence
    return (
        "Give it a jax.custom_jvp instead, or pass custom_vjp='inline' to the estimator to "
        "differentiate its code "
        "and ignore the rule."
    )


def _refuse(what: str, why: str, advice: str) -> None:
    """Raises; where `check` is watching, notes it and returns."""
    if (findings := _findings.current()) is None:
        raise TypeError(f"{what} {why}, which forward mode cannot pass. {advice}")
    findings.refused[what] = advice


def bind_forward(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on arrays that may have tangents.

    And refuses what forward mode cannot pass.
    """
    if is_custom_vjp(eqn):
        return _refusing_tangents(eqn, values)
    if any(map(is_custom_vjp, with_inner(eqn))):
        return naming(eqn, lambda: enter(eqn, values, run_forward))
    return naming(eqn, lambda: bind(eqn, values))


def naming(eqn: JaxprEqn, run: Callable[[], list[Any]]) -> list[Any]:
    """What `run` returns for an equation.

    An operation in it that JAX has no rule for is refused by name.
    """
    try:
        return run()
    except (NotImplementedError, ValueError) as error:
        message = str(error).split("\n")[0]
        if isinstance(error, ValueError) and "JVP" not in message:
            raise
        missing = [e for e in with_inner(eqn) if _is_about(message, e)] or [eqn]
        several = re.search("vmap|batch", message, re.IGNORECASE)
        _refuse(
            describe(missing[0]),
            f"has no rule in JAX ({message})",
            "Pass chunk=1 to the estimator, which then runs one tangent after the other."
            if several
            else "Compute it by other operations, or in a function with a jax.custom_jvp.",
        )
        return [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]  # pyright: ignore


def _is_about(message: str, eqn: JaxprEqn) -> bool:
    """Whether an error of JAX names this operation.

    It says "Pure callbacks" for `pure_callback`.
    """
    name = eqn.primitive.name
    return not list(inner_programs(eqn)) and (
        f"'{name}'" in message or name.replace("_", " ") in message.lower()
    )


def run_forward(program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Runs a program on arrays that may have tangents.

    And refuses what forward mode cannot pass.
    """
    return walk(program, args, bind_forward)


def _refusing_tangents(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The code of a function with a reverse rule, refused once a tangent arrives there."""
    what, advice = describe(eqn), remedy(eqn)

    @jax.custom_jvp
    def call(*args: Any) -> list[Any]:
        return run_forward(_code(eqn), args)

    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        out = call(*primals)
        if not all(isinstance(t, SymbolicZero) for t in tangents):
            _refuse(what, "has a jax.custom_vjp: a rule for reverse mode", advice)
        return out, [_zero_tangent(x) for x in out]

    call.defjvp(rule, symbolic_zeros=True)
    return call(*values)


def _zero_tangent(x: Any) -> Any:
    return jnp.zeros(x.shape, jax.typeof(x).to_tangent_aval().dtype)


def inline_custom_vjp(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the code of every function in it that has a reverse rule."""

    def inlined(*args: Any) -> Any:
        program, rebuilt = traced(fun, *args)
        return rebuilt(_run_inlined(program, jax.tree.leaves(args)))

    return inlined


def _run_inlined(program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    return walk(program, args, _bind_inlined)


def _bind_inlined(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    if is_custom_vjp(eqn):
        return _noting_tangents(eqn, _run_inlined(_code(eqn), values))
    if any(map(is_custom_vjp, with_inner(eqn))):
        return naming(eqn, lambda: enter(eqn, values, _run_inlined))
    return naming(eqn, lambda: bind(eqn, values))


# Whether tangents that pass inlined code are watched.
_WATCHED: ContextVar[bool] = ContextVar("watched", default=True)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Traces inlined code without a watch on its tangents.

    A program whose tangents are transposed later can do nothing with them that is not linear.
    """
    token = _WATCHED.set(False)
    try:
        yield
    finally:
        _WATCHED.reset(token)


def _noting_tangents(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The values, watched for tangents that are not finite, which a warning names.

    Where `check` is watching, it is told that a tangent passed by a reverse rule.
    """
    findings, what, watched = _findings.current(), describe(eqn), _WATCHED.get()

    @jax.custom_jvp
    def seen(*values: Any) -> list[Any]:
        return list(values)

    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        moved = [not isinstance(t, SymbolicZero) for t in tangents]
        out = [
            t if m else _zero_tangent(x) for x, t, m in zip(primals, tangents, moved, strict=True)
        ]
        if any(moved) and findings is not None:
            findings.inlined[what] = None
        elif any(moved) and watched:
            finite = [_all_finite(x) for x in primals]
            lost = [~_all_finite(t) for t, m in zip(out, moved, strict=True) if m]
            jax.debug.callback(
                partial(_warn, what), jnp.all(jnp.stack(finite)) & jnp.any(jnp.stack(lost))
            )
        return list(primals), out

    seen.defjvp(rule, symbolic_zeros=True)
    return seen(*values)


def _all_finite(x: Any) -> Any:
    return jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)


def _warn(what: str, lost: Any) -> None:
    if np.any(lost):
        warnings.warn(
            f"custom_vjp='inline' differentiates the code of {what}, and there the tangent is not "
            "finite although the value is. The rule that it ignores may be what keeps the "
            "derivative finite: give the function a jax.custom_jvp.",
            RuntimeWarning,
            stacklevel=2,
        )
