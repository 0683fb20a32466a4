"""The drop-in for `jax.value_and_grad`."""

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from prograde.kit import Estimator


def value_and_grad(
    fun: Callable[..., Any],
    estimator: Estimator,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad` by an estimator: a function of a PRNG key and the arguments of `fun`.

        loss, grads = jax.value_and_grad(loss_fn)(params, batch)                    # before
        loss, grads = pg.value_and_grad(loss_fn, estimator)(key, params, batch)     # after

    **Arguments:**

    - `fun`: a function that returns a real scalar, or a vector of per-example losses, whose mean is
      differentiated. With `has_aux=True` it returns a pair of that and anything else.
    - `estimator`: the estimator, such as `WeightPerturbation(LowRank(rank=1))` or `Backprop()`.
    - `argnums`: the position of the argument of `fun` to differentiate by, or a sequence of
      different positions.
    - `has_aux`: `True` where `fun` returns auxiliary output in addition to the loss.

    **Returns:** a function `(key, *args, **kwargs) -> (value, grads)`, or `((value, aux), grads)`
    with `has_aux=True`. `grads` has the structure of the argument (a tuple of these for a sequence
    of `argnums`), with `None` at leaves that are not float arrays, as in
    `equinox.filter_value_and_grad`. It works under `jit`, `vmap` and `scan`, and is not jitted
    itself. Arguments that are not differentiated reach `fun` as they were passed: outside of `jit`
    it may branch on them.

    **Bias, variance and cost:** those of the estimator.

    **Errors:** `TypeError` for what is no estimator, for one that learns from step to step, and for
    a module of Flax NNX with state (take `prograde.nnx.value_and_grad`);
    `ValueError` for `argnums` that are empty, that name an argument twice, or that the call has no
    argument for. `RuntimeWarning` outside of `jit` where the loss is finite and its derivative is
    not.

    **Source:** arXiv 2202.08587.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prograde as pg
        >>> def loss_fn(params, x, y):
        ...     return jnp.mean((x @ params - y) ** 2)
        >>> x = jax.random.normal(jax.random.key(1), (32, 3))
        >>> y = x @ jnp.array([1.0, -2.0, 3.0])
        >>> grad_fn = pg.value_and_grad(loss_fn, pg.WeightPerturbation(pg.Normal(), num_tangents=1))
        >>> params, optimizer = jnp.zeros(3), optax.sgd(0.05)
        >>> opt_state = optimizer.init(params)
        >>> @jax.jit
        ... def step(key, params, opt_state):
        ...     loss, grads = grad_fn(key, params, x, y)
        ...     updates, opt_state = optimizer.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state, loss
        >>> for key in jax.random.split(jax.random.key(0), 300):
        ...     params, opt_state, loss = step(key, params, opt_state)
        >>> print(params.round(2))
        [ 1. -2.  3.]
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator={estimator!r}, but an instance of an estimator is needed, such as "
            "WeightPerturbation(LowRank(rank=1)) or Backprop()."
        )
    single = not isinstance(argnums, Sequence)
    positions = tuple(operator.index(position) for position in ((argnums,) if single else argnums))
    if not positions:
        raise ValueError(f"argnums={argnums!r}, but at least one argument is needed.")

    def value_and_grad_fun(key: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for position in positions:
            if not -len(args) <= position < len(args):
                raise ValueError(
                    f"argnums={argnums!r}, but the function was called with {len(args)} positional "
                    "arguments after the key. Pass what is differentiated by position."
                )
        wanted = [position % len(args) for position in positions]
        if len(set(wanted)) < len(wanted):
            raise ValueError(
                f"argnums={argnums!r} name the arguments {wanted} of {len(args)}, but each may be "
                "named once. Remove the repetition."
            )
        # a single argument is passed as it is: its tangents are those of `estimator.estimate`
        params = args[wanted[0]] if single else tuple(args[position] for position in wanted)
        others = tuple(arg for i, arg in enumerate(args) if i not in wanted)
        _refuse_state(params)

        def of_params(params: Any, *others: Any) -> Any:
            given, remaining = (
                dict(zip(wanted, (params,) if single else params, strict=True)),
                iter(others),
            )
            return fun(
                *(given[i] if i in given else next(remaining) for i in range(len(args))), **kwargs
            )

        state = estimator.init(of_params, params, *others, has_aux=has_aux)
        if state is not None:
            raise TypeError(
                f"estimator={estimator!r} learns from step to step, and a function without state "
                "would forget what it learned. Use estimator.init and estimator.estimate, and pass "
                "the state of each Estimate to the next."
            )
        try:
            result = estimator.estimate(of_params, key, state, params, *others, has_aux=has_aux)
        except jax.errors.ConcretizationTypeError as error:
            error.add_note(
                f"estimator={estimator!r} traces the function, or is itself traced. Pass what the "
                "function branches on as a Python number, or use lax.cond or jnp.where."
            )
            raise
        return ((result.value, result.aux) if has_aux else result.value), result.grads

    return value_and_grad_fun


def _refuse_state(params: Any) -> None:
    """Raises where a module of Flax NNX holds state, which would be perturbed and not move."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    variables = [(path, x) for path, x in leaves if is_variable(x)]
    state = [(path, x) for path, x in variables if not isinstance(x, nnx.Param)]
    if state and len(state) < len(variables):
        names = ", ".join(f"{jax.tree_util.keystr(p)} ({type(x).__name__})" for p, x in state)
        raise TypeError(
            f"the parameters hold state of Flax NNX: {names}. It would be perturbed like weights, "
            "and would not move. Use prograde.nnx.value_and_grad, or split the module with "
            "nnx.split(model, nnx.Param, ...)."
        )
