"""What every estimator is, and the checks that all of them make."""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from prograde.tangents import TangentDistribution


class Estimate(eqx.Module):
    """What one call of an estimator returns.

    **Fields:**

    - `value`: the loss, a float scalar; the mean where the loss is given per example.
    - `aux`: what the loss function returned beside the loss, or `None`.
    - `grads`: the gradient estimate, a tree like the parameters, with `None` at leaves that are not float arrays.
    - `directional`: the directional derivatives grad f . v of the tangents, in float32 (float64 for float64 losses);
      shape `[num_tangents]`, or `[num_tangents, batch]` where the loss is given per example. `None` for estimators
      without tangents.
    - `state`: the estimator's next state.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator = pg.WeightPerturbation(pg.Rademacher(), num_tangents=4)
        >>> params = jnp.ones(3)
        >>> result = estimator.estimate(lambda w, x: (x @ w) ** 2, jax.random.key(0), None, params, jnp.ones((5, 3)))
        >>> result.grads.shape, result.directional.shape
        ((3,), (4, 5))
    """

    value: Float[Array, ""]
    aux: Any
    grads: PyTree
    directional: Float[Array, "num_tangents *batch"] | None
    state: PyTree


@dataclass(frozen=True)
class Estimator(abc.ABC):
    """An estimator of the gradient of a function, a frozen dataclass: printable, comparable, hashable.

    To write one, subclass and implement `estimate`; estimators that learn also implement `init`.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator = pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=8)
        >>> estimator == pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=8)
        True
    """

    def init(
        self, fun: Callable[..., Any], params: PyTree, *args: Any, has_aux: bool = False
    ) -> PyTree:
        """The state before the first estimate, `None` for estimators without one. `fun` is traced, not run."""
        del fun, params, args, has_aux
        return None

    def objective(self, fun: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        """What is differentiated, as a function for any estimator: `fun` itself, or the sum of the many losses it returns."""
        del has_aux
        return fun

    @abc.abstractmethod
    def estimate(
        self,
        fun: Callable[..., Any],
        key: Key[Array, ""],
        state: PyTree,
        params: PyTree,
        *args: Any,
        has_aux: bool = False,
    ) -> Estimate:
        """Estimates the gradient of the mean of `fun(params, *args)` with respect to the float arrays in `params`.

        **Arguments:**

        - `fun`: returns a float scalar, or a vector of per-example losses, whose mean is differentiated. With
          `has_aux=True` it returns a pair of that and anything else.
        - `key`: a typed PRNG key (`jax.random.key`). The same key gives the same estimate.
        - `state`: what `init` or the previous estimate returned.
        - `params`: any pytree. Leaves that are not float arrays pass through untouched.
        - `args`: further arguments of `fun`, not differentiated.
        """


class _Static(eqx.Module):
    """A value that is not an array, carried through JAX transformations as part of the tree's structure."""

    value: Any = eqx.field(static=True)


def pack(tree: PyTree) -> tuple[PyTree, _Static]:
    """Splits a tree into its arrays and the rest, both safe to return from transformed functions."""
    arrays, rest = eqx.partition(tree, lambda x: isinstance(x, jax.Array | np.ndarray | np.generic))
    leaves, treedef = jax.tree.flatten(rest)
    return arrays, _Static((tuple(leaves), treedef))


def unpack(packed: tuple[PyTree, _Static]) -> PyTree:
    """Undoes `pack`."""
    arrays, static = packed
    leaves, treedef = static.value
    return eqx.combine(arrays, treedef.unflatten(leaves))


def check_key(key: Any) -> None:
    """Raises unless `key` is one typed PRNG key."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"key={key!r}, but a typed PRNG key is needed, such as jax.random.key(0). A key of the old kind (two uint32) "
            "becomes one with jax.random.wrap_key_data(key)."
        )
    if key.shape != ():
        raise TypeError(
            f"key has shape {key.shape}, but one key is needed. Use keys[i], or jax.vmap over the keys."
        )


def check_whole(name: str, value: Any) -> None:
    """Raises unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}, but a whole number of at least 1 is needed.")


def check_positive(name: str, value: Any, at_most: float = math.inf) -> None:
    """Raises unless `value` is a positive finite number, and no more than `at_most`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= at_most
        or math.isinf(value)
    ):
        allowed = (
            "a positive finite number"
            if math.isinf(at_most)
            else f"a number above 0 and at most {at_most:g}"
        )
        raise ValueError(f"{name}={value!r}, but {allowed} is needed.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}, but it is one of {', '.join(map(repr, choices))}.")


def check_tangents(tangents: Any) -> None:
    """Raises unless `tangents` is a distribution of tangents."""
    if not isinstance(tangents, TangentDistribution):
        raise TypeError(
            f"tangents={tangents!r}, but a tangent distribution is needed, such as Normal() or LowRank(rank=1)."
        )


def wide_dtype(dtype: Any) -> Any:
    """The dtype that directional derivatives and sums of tangents are kept in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def wide(x: Array) -> Array:
    """In the dtype of directional derivatives."""
    return x.astype(wide_dtype(x.dtype))


def _partitioned(params: PyTree) -> tuple[PyTree[Array], PyTree]:
    params = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, params
    )
    return eqx.partition(params, eqx.is_inexact_array)


def float_leaves(params: PyTree) -> PyTree[Array]:
    """The float arrays of `params`, and `None` in place of everything else."""
    return _partitioned(params)[0]


def checked_floats(params: PyTree) -> tuple[PyTree[Array], PyTree]:
    """(floats, rest): the float arrays of `params`, real and at least one, and everything else."""
    floats, rest = _partitioned(params)
    leaves = jax.tree_util.tree_leaves_with_path(floats)
    if not leaves:
        raise ValueError(
            "params has no floating-point array among its leaves, so there is nothing to differentiate. "
            "Pass arrays such as jnp.asarray(1.0); Python floats are taken as constants."
        )
    for path, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, but estimators work on real parameters. "
                "Keep the real and imaginary parts as two leaves and join them inside the function."
            )
    return floats, rest


def checked_loss(loss: Any, hint: str = "") -> Array:
    """The loss, a real float scalar or vector; `hint` is added where it is no array at all."""
    if not eqx.is_array_like(loss):
        raise TypeError(
            f"the function returned {type(loss).__name__} as its loss, but an array is needed.{hint}"
        )
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"the loss has dtype {loss.dtype}, but a real floating-point loss is needed."
        )
    if loss.ndim > 1:
        raise ValueError(
            f"the loss has shape {loss.shape}, but a scalar or one loss per example, [batch], is needed. "
            "Take the mean over the other axes."
        )
    return loss


def split_params(
    fun: Callable[..., Any], params: PyTree, args: tuple[Any, ...], has_aux: bool
) -> tuple[Callable[[PyTree], tuple[Array, PyTree]], PyTree[Array]]:
    """(f, floats): the float arrays of `params`, and fun as a function of these that returns (checked loss, packed aux)."""
    floats, rest = checked_floats(params)

    def f(floats: PyTree[Array]) -> tuple[Array, PyTree]:
        out = fun(eqx.combine(floats, rest), *args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"has_aux=True, but the function returned {type(out).__name__} instead of a pair (loss, aux)."
            )
        loss, aux = out if has_aux else (out, None)
        return checked_loss(
            loss, "" if has_aux else " To return more than the loss, pass has_aux=True."
        ), pack(aux)

    return f, floats
