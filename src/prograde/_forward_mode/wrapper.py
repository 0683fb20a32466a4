"""The public wrapper: any tree in and out, static arguments, auxiliary output, estimators."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from prograde._forward_mode.pushforward import Program, evaluate
from prograde.kit import Estimator, check_key, check_whole


def forward_mode(
    fun: Callable[..., Any],
    *,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    chunk: int | None = None,
    estimator: Estimator | None = None,
) -> Callable[..., Any]:
    """Wraps a function so that all of its derivatives run forward. Values stay the same.

        solver = pg.forward_mode(solver)      # jax.grad, jax.hessian, NUTS, BFGS now run through it

    The derivative of the result is taken by forward mode, whoever asks for it, by `jax.grad`,
    `jax.vjp`, `jax.jacrev`, `jax.hessian` or `jax.jvp`, of any order. So libraries that call
    `jax.grad` inside run on programs that reverse mode refuses: `while_loop`, adaptive solvers with
    a forward adjoint, loops whose length depends on the parameters. It works under `jit`, `vmap`,
    `scan`, `jax.checkpoint` and `shard_map`.

        (x, v) -> (f(x), J(x) v)        J(x): by one forward run along all unit vectors of x

    Reverse mode keeps J(x) and multiplies by its transpose. It never meets the loops of `fun`.

    **Arguments:**

    - `fun`: a function of any trees to any tree. Values that it closes over are differentiated too,
      traced ones included. Leaves that are not float arrays pass through, and stay concrete.
    - `argnums`: the positional arguments that may be differentiated by; by default all. A
      derivative by another argument is refused. Give it where an argument is large.
    - `has_aux`: whether `fun` returns a pair of its output and anything else, which has no
      derivative.
    - `chunk`: the number of unit vectors that run together; by default as many as fit into 256 MiB.
    - `estimator`: estimates the gradient of a scalar function in place of its Jacobian, where there
      are many inputs. The result then takes a PRNG key before the other arguments, and **its
      gradient is random**: that of the estimator. The same key gives the same gradient. A plain
      `jax.jvp` stays exact.

    **Returns:** a function of the same arguments, after a key with an `estimator`.

    **Bias and variance:** none: derivatives are exact. With an `estimator`, those of its gradient.

    **Cost:** a derivative by n numbers takes n tangents, in one run or n / chunk runs, and keeps
    the Jacobian: n times the size of the output. A plain `jax.jvp` takes one tangent. Inputs that
    nobody differentiates by cost nothing. Take reverse mode where the program has one and n is
    large, and implicit differentiation where the loop finds a root.

    **Errors:** `TypeError` for complex inputs, for a function that returns no float array, and for
    a function that forward mode cannot pass, such as one with a custom reverse rule or a call of
    Python; `ValueError` for a derivative by more than 20,000 numbers
    without `chunk`, a `chunk` below 1, or an `argnums` out of range; all at trace time.

    **Source:** forward accumulation; the rule is that of `jax.custom_jvp` with the Jacobian of
    `jax.jacfwd`.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def cube_root(a):                 # iterates until it has converged: jax.grad refuses
        ...     far = lambda x: jnp.abs(x**3 - a) > 1e-5
        ...     return jax.lax.while_loop(far, lambda x: x - (x**3 - a) / (3 * x**2), a)
        >>> cube_root = pg.forward_mode(cube_root)
        >>> print(f"{jax.grad(cube_root)(8.0):.4f} {jax.hessian(cube_root)(8.0):.4f}")
        0.0833 -0.0069
    """
    if not callable(fun):
        raise TypeError(f"fun={fun!r}, but a function is needed.")
    if chunk is not None:
        check_whole("chunk", chunk)
    if estimator is not None and (chunk is not None or has_aux):
        raise ValueError(
            f"estimator={estimator!r} with chunk={chunk!r} and has_aux={has_aux!r}: an estimator "
            "has a chunk of its own, and the function must return a scalar alone."
        )
    allowed = None if argnums is None else tuple(np.atleast_1d(argnums).tolist())

    @functools.wraps(fun)
    def forward_mode_fun(*args: Any, **kwargs: Any) -> Any:
        key, args = (args[0], args[1:]) if estimator is not None else (None, args)
        if allowed is not None:
            args, kwargs = _closed_to_derivatives(allowed, args, kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        moving = [i for i, leaf in enumerate(leaves) if _is_moving(leaf)]
        output = _Output(has_aux)

        def flat(*moved: Any) -> list[Any]:
            given = list(leaves)
            for i, x in zip(moving, moved, strict=True):
                given[i] = x
            args, kwargs = jax.tree.unflatten(treedef, given)
            return output.flatten(fun(*args, **kwargs))

        traced = jax.make_jaxpr(flat)(*(leaves[i] for i in moving))
        # values that are closed over become inputs: traced ones may be differentiated by
        inner = traced.jaxpr
        inner = inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars])
        jaxpr = ClosedJaxpr(inner, [])
        primals = [*traced.consts, *(leaves[i] for i in moving)]
        primals = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in primals]
        program = Program(jaxpr, chunk)
        if estimator is not None:
            return evaluate_estimated(jaxpr, estimator, key, primals)
        return output.unflatten(evaluate(program, *primals))

    return forward_mode_fun


def evaluate_estimated(
    jaxpr: ClosedJaxpr, estimator: Estimator, key: Any, primals: list[Any]
) -> Any:
    """Runs a scalar program whose gradient is an estimate."""
    (aval, *others) = jaxpr.out_avals
    if others or aval.shape != ():  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(
            f"estimator={estimator!r}, but the function returns "
            f"{', '.join(map(str, jaxpr.out_avals))}: a scalar is needed."
        )
    check_key(key)
    keyed = jax.make_jaxpr(lambda _, *primals: jaxpr_as_fun(jaxpr)(*primals))(key, *jaxpr.in_avals)

    def gradient(active: Sequence[int], key: Any, *primals: Any) -> list[Any]:
        chosen = [primals[i - 1] for i in active]

        def loss(chosen: list[Any]) -> Any:
            given = list(primals)
            for i, x in zip(active, chosen, strict=True):
                given[i - 1] = x
            return jaxpr_as_fun(jaxpr)(*given)[0]

        state = estimator.init(loss, chosen)
        found = estimator.estimate(loss, key, state, chosen)
        return [found.value, jnp.concatenate([jnp.ravel(g) for g in found.grads])]

    return evaluate(Program(keyed, None, gradient), key, *primals)[0]


def _is_moving(leaf: Any) -> bool:
    """Whether a leaf is an input of the traced program. Other concrete values stay as they are."""
    if isinstance(leaf, Tracer):
        dtype = leaf.dtype  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(leaf, jax.Array | np.ndarray | float | complex | np.generic):
        dtype = jnp.result_type(leaf)
    else:
        return False
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"forward_mode: an input of dtype {dtype}, but real inputs are needed. Pass real and "
            "imaginary part, and put them together inside the function."
        )
    return jnp.issubdtype(dtype, jnp.floating) or isinstance(leaf, Tracer)


class _Output:
    """The output of a function as arrays, and back again. What is no array is kept aside."""

    def __init__(self, has_aux: bool):
        self.has_aux = has_aux
        self.treedef: Any = None
        self.leaves: list[Any] = []
        self.arrays: list[int] = []

    def flatten(self, out: Any) -> list[Any]:
        main = out
        if self.has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise TypeError(
                    f"has_aux=True, but the function returned {type(out).__name__}: a pair "
                    "(output, aux) is needed."
                )
            main, aux = out
            out = main, jax.tree.map(lambda x: lax.stop_gradient(x) if _is_array(x) else x, aux)
        floats = [x for x in jax.tree.leaves(main) if _is_array(x)]
        if not any(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in floats):
            raise TypeError(
                "forward_mode: the function returns no float array, so it has no derivative. It "
                f"returned {main!r}."
            )
        self.leaves, self.treedef = jax.tree.flatten(out)
        self.arrays = [i for i, x in enumerate(self.leaves) if _is_array(x)]
        return [self.leaves[i] for i in self.arrays]

    def unflatten(self, arrays: list[Any]) -> Any:
        leaves = list(self.leaves)
        for i, x in zip(self.arrays, arrays, strict=True):
            leaves[i] = x
        return jax.tree.unflatten(self.treedef, leaves)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | float)


def _closed_to_derivatives(
    allowed: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, of which all but the allowed ones refuse a derivative."""
    if bad := [i for i in allowed if not -len(args) <= i < len(args)]:
        raise ValueError(
            f"argnums={bad[0]}, but the function was called with {len(args)} positional arguments."
        )
    positions = {i % len(args) for i in allowed}

    def close(name: str, tree: Any) -> Any:
        return jax.tree.map(lambda x: _refusing(name)(x) if _is_array(x) else x, tree)

    args = tuple(x if i in positions else close(str(i), x) for i, x in enumerate(args))
    return args, {name: close(name, x) for name, x in kwargs.items()}


def _refusing(name: str) -> Callable[[Any], Any]:
    """The identity, which refuses a derivative."""

    @jax.custom_jvp
    def identity(x):
        return x

    @functools.partial(identity.defjvp, symbolic_zeros=True)
    def rule(primals, tangents):
        if not isinstance(tangents[0], SymbolicZero):
            raise TypeError(
                f"forward_mode: a derivative by argument {name} is asked for, which `argnums` "
                "leaves out. Add it to `argnums`."
            )
        return primals[0], tangents[0]

    return identity
