"""Loops that end: a bound on every `while_loop` of a function.

And an error that names the loop which reached it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jaxtyping import Array

from prograde._control_flow import enter, while_parts
from prograde._jaxprs import bind, source, traced, walk, with_inner
from prograde.kit import check_whole, pack, unpack


def bounded_loops(fun: Callable[..., Any], max_iterations: int) -> Callable[..., Any]:
    """Puts a bound on every `jax.lax.while_loop` of a function, at any depth.

    The bound holds anew each time a loop is entered.

    A loop whose condition never becomes false runs for ever, and under `jit` it cannot even be
    stopped. With a bound it ends, and an error names the loop by file and line. Where no loop
    reaches the bound, values and derivatives are the same as without it.

    **Arguments:**

    - `fun`: any function of trees of arrays.
    - `max_iterations`: how often the body of a loop may run, at least 1.

    **Returns:** a function like `fun`, for `value_and_grad`, `jit`, `vmap`.

    **Bias and variance:** none. **Cost:** a counter and a comparison per iteration. The derivative
    rule of a function with a `jax.custom_jvp` is left as it is.

    **Errors:** `ValueError` for `max_iterations` below 1. At run time a `RuntimeError` for a loop
    that does not end; equinox raises it, and under `jit` the device does (it reads best with
    `equinox.filter_jit`).

    **Source:** no paper; `equinox.error_if` raises the error.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> from jax import lax
        >>> def newton_sqrt(a):            # for negative a it never converges
        ...     unfinished = lambda x: jnp.abs(x * x - a) > 1e-5
        ...     return lax.while_loop(unfinished, lambda x: (x + a / x) / 2, jnp.abs(a))
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

        program, rebuilt = traced(of_arrays, arrays)
        return unpack(rebuilt(_run(program, jax.tree.leaves(arrays), max_iterations)))

    return bounded


def _run(program: ClosedJaxpr, args: Sequence[Any], most: int) -> list[Any]:
    run = lambda program, args: _run(program, args, most)  # noqa: E731

    def operation(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        if eqn.primitive.name == "while":
            return _bounded_while(eqn, values, run, most)
        if any(inner.primitive.name == "while" for inner in with_inner(eqn)):
            return enter(eqn, values, run)
        return bind(eqn, values)

    return walk(program, args, operation)


def _bounded_while(eqn: JaxprEqn, values: list[Any], run: Any, most: int) -> list[Array]:
    (cond, of_cond), (body, of_body), carry = while_parts(eqn, values)

    def unfinished(carry: Sequence[Any]) -> Array:
        """Whether the loop goes on.

        One answer for each loop where `vmap` made one loop of several.
        """
        return run(cond, [*of_cond, *carry])[0]

    def once(carry: Sequence[Any]) -> list[Array]:
        on, after = unfinished(carry), run(body, [*of_body, *carry])
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
        f"the while_loop at {source(eqn)} did not end within max_iterations={most}. Give it a "
        "condition "
        "that becomes false (a bound on its iterations, a tolerance above rounding error), or a "
        "larger "
        "max_iterations.",
    )
