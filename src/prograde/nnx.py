"""Forward gradients of Flax NNX modules: `nnx.value_and_grad` by any estimator.

Only the variables that are differentiated are perturbed, by default every `nnx.Param`. All other
state moves once a call, as `nnx.value_and_grad` moves it: batch statistics, counters of random
numbers, anything that the module assigns. It needs `flax`.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(f"prograde.nnx needs {error.name}: pip install flax") from None

from prograde.estimators import Estimator

__all__ = ["value_and_grad"]


def value_and_grad(
    f: Callable[..., Any],
    estimator: Estimator,
    *,
    argnums: "int | nnx.DiffState | Sequence[int | nnx.DiffState]" = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """`flax.nnx.value_and_grad` by an estimator: a function of a PRNG key and the arguments of `f`.

        loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)                        # before
        loss, grads = prograde.nnx.value_and_grad(loss_fn, estimator)(key, model, x, y)  # after
        optimizer.update(model, grads)

    **Arguments:**

    - `f`: returns a real scalar, or a vector of per-example losses, whose mean is differentiated;
      with `has_aux=True` a pair of that and anything else. It may change the state of its modules.
    - `estimator`: how to estimate the gradient, such as `WeightPerturbation(LowRank(rank=1))`.
    - `argnums`: the argument, or arguments, to differentiate by. `nnx.DiffState(0, filter)` picks
      the variables of an argument; a number picks its `nnx.Param`.
    - `has_aux`: whether `f` returns auxiliary output in addition to the loss.

    **Returns:** a function `(key, *args, **kwargs) -> (value, grads)`, or `((value, aux), grads)`
    with `has_aux=True`. `grads` is an `nnx.State` like that of `nnx.value_and_grad`, or a tuple of
    them for a sequence of `argnums`. The modules that were passed hold their new state afterwards.
    All tangents of a call share one dropout mask and one update of the statistics.

    **Bias, variance and cost:** those of the estimator, with the parameters that are picked.

    **Errors:** `TypeError` for an estimator that learns from step to step, or an argument that is
    no module; `ValueError` for an `argnums` that the call has no argument for, or for a filter that
    picks nothing.

    **Source:** arXiv 2202.08587; the semantics are those of `flax.nnx.value_and_grad`.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg, prograde.nnx
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs))
        >>> def loss_fn(model, x, y):
        ...     return jnp.mean((model(x) - y) ** 2)
        >>> grad_fn = pg.nnx.value_and_grad(loss_fn, pg.WeightPerturbation(pg.LowRank(rank=1)))
        >>> x, y = jax.random.normal(jax.random.key(0), (8, 3)), jnp.ones((8, 1))
        >>> loss, grads = grad_fn(jax.random.key(1), model, x, y)
        >>> sorted(grads["layers"][0])              # no gradient for the statistics
        ['bias', 'scale']
        >>> bool(jnp.any(model.layers[0].mean[...] != 0))      # which have moved
        True
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator={estimator!r}, but an instance of an estimator is needed, such as "
            "WeightPerturbation(LowRank(rank=1)) or Backprop()."
        )
    single = isinstance(argnums, int | nnx.DiffState)
    wanted = [
        chosen
        if isinstance(chosen, nnx.DiffState)
        else nnx.DiffState(operator.index(chosen), nnx.Param)
        for chosen in ((argnums,) if single else argnums)
    ]

    def value_and_grad_fun(key: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        filters = _filters(wanted, args)
        modules = {i: arg for i, arg in enumerate(args) if _has_variables(arg)}
        for i in filters:
            if i not in modules:
                raise TypeError(
                    f"argnums={argnums!r}, but argument {i} is {type(args[i]).__name__}, which "
                    "holds no nnx variables. Use prograde.value_and_grad for plain arrays."
                )
        batch = [arg for i, arg in enumerate(args) if i not in modules]

        def picked(path: Any, value: Any) -> bool:
            return path[0] in filters and filters[path[0]](path[1:], value)

        graph, params, rest = nnx.split(modules, picked, ...)
        if not jax.tree.leaves(params):
            raise ValueError(f"argnums={argnums!r} picks no variable of the modules.")

        def of_params(params: Any, *batch: Any) -> tuple[Any, Any]:
            inside = nnx.merge(graph, params, rest, copy=True)
            given = iter(batch)
            out = f(
                *(inside[i] if i in inside else next(given) for i in range(len(args))), **kwargs
            )
            loss, aux = out if has_aux else (out, None)
            _, _, moved = nnx.split(inside, picked, ...)
            return loss, (aux, moved)

        state = estimator.init(of_params, params, *batch, has_aux=True)
        if state is not None:
            raise TypeError(
                f"estimator={estimator!r} learns from step to step, and a function without state "
                "would forget what it learned. Split the module with nnx.split, and use "
                "estimator.init and estimator.estimate."
            )
        found = estimator.estimate(of_params, key, state, params, *batch, has_aux=True)
        aux, moved = found.aux
        nnx.update(modules, moved)
        grads = tuple(found.grads[i] for i in filters)
        value = (found.value, aux) if has_aux else found.value
        return value, grads[0] if single else grads

    return value_and_grad_fun


def _filters(wanted: Sequence[Any], args: Sequence[Any]) -> dict[int, Any]:
    """The filter of each argument that is differentiated by, in the order that was asked for."""
    found = {}
    for chosen in wanted:
        if not -len(args) <= chosen.argnum < len(args):
            raise ValueError(
                f"argnums={chosen.argnum}, but the function was called with {len(args)} positional "
                "arguments after the key. Pass what is differentiated by position."
            )
        position = chosen.argnum % len(args)
        if position in found:
            raise ValueError(f"argnums names argument {position} more than once.")
        found[position] = nnx.filterlib.to_predicate(chosen.filter)
    return found


def _has_variables(tree: Any) -> bool:
    """Whether a tree holds variables of NNX."""
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return any(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable)))
