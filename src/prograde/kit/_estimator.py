"""What every estimator is, and what it returns."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Key, PyTree


class Estimate(eqx.Module):
    """What one call of an estimator returns.

    **Fields:**

    - `value`: the loss, a float scalar; the mean where the loss is given per example.
    - `aux`: what the loss function returned in addition to the loss, or `None`.
    - `grads`: the gradient estimate, a tree like the parameters, with `None` at leaves that are not
      float arrays. Each leaf has the shape and dtype of its parameter.
    - `directional`: the directional derivatives grad f . v of the tangents, in float32 (float64 for
      float64 losses); shape `[num_tangents]`, or `[num_tangents, batch]` where the loss is given
      per example. `None` for estimators without tangents.
    - `state`: the estimator's next state.

    `value` may be finite while `grads` is not: a tangent can overflow, or meet an infinite slope
    times zero, where the function itself does not. Look at both before a step is taken.

    **Source:** forward gradients, arXiv 2202.08587.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator = pg.WeightPerturbation(pg.Rademacher(), num_tangents=4)
        >>> loss, params, x = lambda w, x: (x @ w) ** 2, jnp.ones(3), jnp.ones((5, 3))
        >>> result = estimator.estimate(loss, jax.random.key(0), None, params, x)
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
    """An estimator of the gradient of a function: printable, comparable, hashable.

    To write one, subclass it as a frozen dataclass and implement `estimate`. Estimators that learn
    also implement `init`. `prograde.kit` has the parts; `docs/add_an_estimator.md` is a guide.

    **Source:** forward gradients, arXiv 2202.08587.

    Examples:
        >>> import prograde as pg
        >>> estimator = pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=8)
        >>> estimator == pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=8)
        True
    """

    def init(
        self, fun: Callable[..., Any], params: PyTree, *args: Any, has_aux: bool = False
    ) -> PyTree:
        """The state before the first estimate, `None` for estimators without one.

        `fun` may be traced, for state whose shape depends on the function. It is never run.
        """
        del fun, params, args, has_aux
        return None

    def objective(self, fun: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        """The function that is differentiated, in a form that any other estimator takes.

        This is `fun` itself, except for estimators whose `fun` returns many losses: then it is
        their sum.
        """
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
        """Estimates the gradient of the mean of `fun(params, *args)` by the floats in `params`.

        **Arguments:**

        - `fun`: returns a float scalar, or a vector of per-example losses, whose mean is
          differentiated. With `has_aux=True` it returns a pair of that and anything else.
        - `key`: a typed PRNG key (`jax.random.key`). The same key gives the same estimate.
        - `state`: what `init` or the previous estimate returned.
        - `params`: any tree. Leaves that are not float arrays pass through untouched.
        - `args`: further arguments of `fun`, not differentiated.
        """
