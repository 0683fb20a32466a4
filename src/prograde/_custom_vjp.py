"""Functions with a hand-made rule for reverse mode, which forward mode cannot pass: named, or taken as their code."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from prograde._jaxprs import current_source, equations, source


def is_custom_vjp(eqn: JaxprEqn) -> bool:
    """Whether an equation calls a function with a `jax.custom_vjp`."""
    return eqn.primitive.name.startswith("custom_vjp_call")


def describe(eqn: JaxprEqn) -> str:
    """The name of the function and where it is called, `name (file:line)`."""
    code = eqn.params["call_jaxpr"]
    jaxpr = code.jaxpr if isinstance(code, ClosedJaxpr) else code
    name = jaxpr.debug_info.func_name if jaxpr.debug_info is not None else "a function"
    return f"{name} ({source(eqn)})"


# whose code makes a loop for reverse mode, and what to pass instead; the first whose code is on the way there
_LOOPS = ("/equinox/internal/_loop/", "/diffrax/_adjoint.py", "/optimistix/_adjoint.py")
_FORWARD_ALTERNATIVES = {
    "/diffrax/_": "This adjoint of diffrax is for reverse mode only: pass adjoint=diffrax.ForwardMode() to diffrax.diffeqsolve.",
    "/optimistix/_": "This adjoint of optimistix is for reverse mode only: pass adjoint=optimistix.ImplicitAdjoint() to the solver.",
    "/equinox/internal/_loop/": "A checkpointed loop of equinox is for reverse mode only: pass kind='lax' to it.",
}
_BETWEEN = (
    "/jax/",
    "/jaxlib/",
    "/quax/",
    "/equinox/_ad.py",
    "/equinox/_vmap_pmap.py",
    "/equinox/_jit.py",
)


def remedy(eqn: JaxprEqn) -> str:
    """What to do about a call of a function with a custom reverse rule, in a sentence."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback is not None else ()
    files = [frame.file_name.replace("\\", "/") for frame in frames]  # the innermost first
    caller = next((file for file in files if not any(part in file for part in _BETWEEN)), "")
    if any(part in caller for part in _LOOPS):
        for part, sentence in _FORWARD_ALTERNATIVES.items():
            if any(part in file for file in files):
                return sentence
    return "Give it a jax.custom_jvp, or pass custom_vjp='inline' to the estimator."


def named(error: TypeError, fun: Callable[..., Any], *args: Any) -> TypeError:
    """JAX's refusal to push a tangent through a custom reverse rule, with the functions there are and what to do; or the error as it is."""
    if "custom_vjp" not in str(error) or "forward-mode" not in str(error):
        return error
    found = {
        describe(eqn): remedy(eqn)
        for eqn in equations(jax.make_jaxpr(fun)(*args).jaxpr)
        if is_custom_vjp(eqn)
    }
    if not found:
        return error
    sentences = " ".join(dict.fromkeys(found.values()))
    return TypeError(
        f"forward mode cannot pass a jax.custom_vjp, a rule for reverse mode: {', '.join(found)}. {sentences}"
    )


def inline_custom_vjp(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every call of a function with a custom reverse rule replaced by that function's code."""

    def inlined(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        jaxpr = _inlined(traced.jaxpr)
        out = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return inlined


def _inlined(jaxpr: Jaxpr) -> Jaxpr:
    if not any(is_custom_vjp(eqn) for eqn in equations(jaxpr)):
        return jaxpr
    eqns: list[JaxprEqn] = []
    names: dict[Any, Any] = {}  # what stands for a variable of the program in the new one

    def of(atoms):
        return [atom if isinstance(atom, Literal) else names.get(atom, atom) for atom in atoms]

    def splice(eqn: JaxprEqn) -> None:
        code = eqn.params["call_jaxpr"]
        closed = code if isinstance(code, ClosedJaxpr) else ClosedJaxpr(code, ())
        inner = _inlined(closed.jaxpr)
        # the same program may be spliced in many times, so its variables get new names each time
        inside: dict[Any, Any] = dict(zip(inner.invars, of(eqn.invars), strict=True))
        for var, const in zip(inner.constvars, closed.consts, strict=True):
            inside[var] = Literal(const, var.aval)
        look = lambda atoms: [atom if isinstance(atom, Literal) else inside[atom] for atom in atoms]  # noqa: E731
        for step in inner.eqns:
            invars = look(step.invars)
            inside.update((v, Var(v.aval)) for v in step.outvars)
            eqns.append(step.replace(invars=invars, outvars=[inside[v] for v in step.outvars]))
        names.update(zip(eqn.outvars, look(inner.outvars), strict=True))

    for eqn in jaxpr.eqns:
        if is_custom_vjp(eqn):
            splice(eqn)
        else:
            params = {name: _inlined_parameter(value) for name, value in eqn.params.items()}
            eqns.append(eqn.replace(invars=of(eqn.invars), params=params))
    return jaxpr.replace(eqns=eqns, outvars=of(jaxpr.outvars))


def _inlined_parameter(value: Any) -> Any:
    if isinstance(value, ClosedJaxpr):
        inner = _inlined(value.jaxpr)
        return value if inner is value.jaxpr else ClosedJaxpr(inner, value.consts)
    if isinstance(value, Jaxpr):
        return _inlined(value)
    if isinstance(value, tuple | list):
        return (
            type(value)(_inlined_parameter(v) for v in value)
            if type(value) in (tuple, list)
            else value
        )
    return value


def call_without_reverse_rule(fun: Any, args: list[Any]) -> list[Any]:
    """Calls the code of a function with a custom reverse rule; refuses, by name, once a tangent arrives there."""
    code = jaxpr_as_fun(jax.make_jaxpr(fun.call_wrapped)(*args))
    return _guarded(code, f"{fun.debug_info.func_name}, called at {current_source()},", args)


def refuse_tangents(eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    """As `call_without_reverse_rule`, for a call in a traced program."""
    code = eqn.params["call_jaxpr"]
    closed = code if isinstance(code, ClosedJaxpr) else ClosedJaxpr(code, ())
    name = (
        closed.jaxpr.debug_info.func_name if closed.jaxpr.debug_info is not None else "a function"
    )
    return _guarded(jaxpr_as_fun(closed), f"{name}, called at {source(eqn)},", args)


def _guarded(code: Callable[..., list[Any]], what: str, args: list[Any]) -> list[Any]:
    @jax.custom_jvp
    def call(*args: Any) -> list[Any]:
        return code(*args)

    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        if not all(isinstance(t, SymbolicZero) for t in tangents):
            raise TypeError(
                f"{what} has a jax.custom_vjp: a rule for reverse mode only, which forward mode cannot "
                "pass. Give it a jax.custom_jvp instead, or pass custom_vjp='inline' to the estimator to differentiate its "
                "code and leave the rule aside."
            )
        out = call(*primals)
        return out, [jnp.zeros(x.shape, jax.typeof(x).to_tangent_aval().dtype) for x in out]

    call.defjvp(rule, symbolic_zeros=True)
    return call(*args)
