"""Loops that end: a bound on every `while_loop` of a function, and an error that says which one ran into it."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jaxtyping import Array

from prograde._jaxprs import bind, equations, source
from prograde.kit import check_whole, pack, unpack


def bounded_loops(fun: Callable[..., Any], max_iterations: int) -> Callable[..., Any]:
    """The function with a bound on every `jax.lax.while_loop` in it, at any depth, each time it is entered.

    A loop whose condition never becomes false runs for ever, and under `jit` cannot even be stopped. With a bound it ends, and an error
    names the loop by file and line. Where no loop runs into the bound nothing changes: values and derivatives are the same.

    **Arguments:**

    - `fun`: any function of trees of arrays.
    - `max_iterations`: how often the body of a loop may run, at least 1.

    **Returns:** a function like `fun`, to be given to `value_and_grad`, `jit`, `vmap`.

    **Bias and variance:** none. **Cost:** a counter and a comparison each iteration. Rules that a function brings for its own derivative
    (`jax.custom_jvp`) are left as they are.

    **Errors:** `ValueError` for `max_iterations` below 1; when run, `RuntimeError` (of equinox, which under `jit` is raised by the device; with
    `equinox.filter_jit` it reads best) for a loop that would go on.

    **Source:** no paper; `equinox.error_if` raises the error.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> from jax import lax
        >>> def newton_sqrt(a):            # for negative a it never converges
        ...     return lax.while_loop(lambda x: jnp.abs(x * x - a) > 1e-5, lambda x: (x + a / x) / 2, jnp.abs(a))
        >>> safe = pg.bounded_loops(newton_sqrt, max_iterations=100)
        >>> print(safe(jnp.array(4.0)).round(3))
        2.0
        >>> try:
        ...     safe(jnp.array(-2.0))
        ... except RuntimeError as error:
        ...     print("max_iterations=100" in str(error))
        True
    """
    check_whole("max_iterations", max_iterations)

    def bounded(*args: Any, **kwargs: Any) -> Any:
        arrays, fixed = eqx.partition((args, kwargs), eqx.is_array)

        def of_arrays(arrays: Any) -> Any:
            args, kwargs = eqx.combine(arrays, fixed)
            return pack(fun(*args, **kwargs))

        traced, shape = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        out = _evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(arrays), max_iterations)
        return unpack(jax.tree.unflatten(jax.tree.structure(shape), out))

    return bounded


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], most: int) -> list[Any]:
    values: dict[Any, Any] = dict(
        zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
    )
    of = lambda atoms: [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]  # noqa: E731
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            out = _bounded_while(eqn, of(eqn.invars), most)
        else:
            params = {name: _bounded_parameter(value, most) for name, value in eqn.params.items()}
            out = bind(eqn.replace(params=params), of(eqn.invars))
        values.update(zip(eqn.outvars, out, strict=True))
    return of(jaxpr.outvars)


def _bounded_while(eqn: JaxprEqn, args: list[Any], most: int) -> list[Array]:
    cond, body = (_bounded(eqn.params[name], most) for name in ("cond_jaxpr", "body_jaxpr"))
    in_cond, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body, carry = (
        args[:in_cond],
        args[in_cond : in_cond + in_body],
        args[in_cond + in_body :],
    )

    def unfinished(carry: Sequence[Any]) -> Array:
        """Of each of the loops that `vmap` has made one of; without it, of the one."""
        return jaxpr_as_fun(cond)(*of_cond, *carry)[0]

    def once(carry: Sequence[Any]) -> list[Array]:
        on, after = unfinished(carry), jaxpr_as_fun(body)(*of_body, *carry)
        if on.ndim == 0:
            return after
        along = lambda x: on.reshape(on.shape + (1,) * (x.ndim - on.ndim))  # noqa: E731
        return [jnp.where(along(new), new, old) for new, old in zip(after, carry, strict=True)]

    _, carry = lax.while_loop(
        lambda loop: jnp.any(unfinished(loop[1])) & (loop[0] < most),
        lambda loop: (loop[0] + 1, once(loop[1])),
        (jnp.zeros((), jnp.int32), list(carry)),
    )
    return eqx.error_if(
        carry,
        jnp.any(unfinished(carry)),
        f"the while_loop at {source(eqn)} did not end within max_iterations={most}. Give it a condition that becomes false (a bound on its "
        "iterations, a tolerance within rounding), or a larger max_iterations.",
    )


def _bounded(closed: ClosedJaxpr, most: int) -> ClosedJaxpr:
    if not any(eqn.primitive.name == "while" for eqn in equations(closed.jaxpr)):
        return closed
    run = lambda *args: _evaluate(closed.jaxpr, closed.consts, args, most)  # noqa: E731
    return jax.make_jaxpr(run)(*closed.in_avals)


def _bounded_parameter(value: Any, most: int) -> Any:
    if isinstance(value, ClosedJaxpr):
        return _bounded(value, most)
    if isinstance(value, Jaxpr):
        closed = _bounded(ClosedJaxpr(value, ()), most)
        return closed.jaxpr if not closed.consts else value
    if type(value) in (tuple, list):
        return type(value)(_bounded_parameter(v, most) for v in value)
    return value
