"""Estimators whose estimate is a seed and a few numbers, which can be shared and replayed."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key, PyTree

from prograde.kit._estimator import Estimator


class Share(NamedTuple):
    """The share of one worker: a part of the tangents, and a part of the batch.

    The index of a part may be traced, such as `jax.lax.axis_index`. The number of parts is static.

    **Fields:**

    - `tangent`, `tangent_parts`: the tangents are cut into `tangent_parts` equal parts, and this
      worker has part number `tangent`.
    - `group`, `batch_parts`: the batch is cut into `batch_parts` parts, and this worker has part
      number `group`.

    **Errors:** `ValueError` from the estimator where the parts do not divide its tangents or its
    groups.

    **Source:** arXiv 2202.08587 for the mean over tangents.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator, key = pg.WeightPerturbation(num_tangents=4), jax.random.key(0)
        >>> fun, params = lambda w: jnp.sum(w ** 2), jnp.ones((8, 4))
        >>> of_share = lambda share: estimator.derivatives(fun, key, params, share=share)[2]
        >>> halves = [of_share(pg.Share(i, 2)) for i in range(2)]
        >>> bool(jnp.allclose(jnp.concatenate(halves), of_share(None), rtol=1e-4))
        True
    """

    tangent: int | Array = 0
    tangent_parts: int = 1
    group: int | Array = 0
    batch_parts: int = 1

    def of_tangents(self, num_tangents: int) -> int:
        """The number of tangents in the share."""
        if num_tangents % self.tangent_parts:
            raise ValueError(
                f"num_tangents={num_tangents}, but {self.tangent_parts} workers share them. Use a "
                f"multiple of {self.tangent_parts}."
            )
        return num_tangents // self.tangent_parts

    def of_groups(self, num_groups: int) -> int:
        """The number of groups in the share: 1 where the whole batch has the same tangents."""
        if num_groups > 1 and num_groups % self.batch_parts:
            raise ValueError(
                f"num_groups={num_groups}, but {self.batch_parts} workers share the batch. Use 1, "
                f"or a multiple of {self.batch_parts}."
            )
        return max(1, num_groups // self.batch_parts)


class SeededEstimator(Estimator):
    """An estimator whose gradient estimate is a function of the key, the parameters, few numbers.

        g = gradient(key, params, derivatives(fun, key, params, *args))

    The function and the data enter through the numbers alone. Workers with the same parameters and
    keys therefore exchange nothing else, and a run can be repeated from them without its data: see
    `prograde.distributed` and `prograde.replay`.

    To write one, subclass it and implement `estimate`, `derivatives` and `gradient`.

    **Source:** MeZO, arXiv 2305.17333, stores a step as a seed and a number.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator, key = pg.WeightPerturbation(num_tangents=2), jax.random.key(0)
        >>> fun, params = lambda w: jnp.sum(w ** 2), jnp.ones((8, 4))
        >>> value, aux, derivatives = estimator.derivatives(fun, key, params)
        >>> derivatives.shape                              # two tangents, one group, one number
        (2, 1, 1)
        >>> estimator.gradient(key, params, derivatives).shape
        (8, 4)
    """

    num_tangents: int
    num_groups = 1  # parts of the batch that have tangents of their own
    num_numbers = 1  # for each tangent and group

    @abc.abstractmethod
    def derivatives(
        self,
        fun: Callable[..., Any],
        key: Key[Array, ""],
        params: PyTree,
        *args: Any,
        has_aux: bool = False,
        share: Share | None = None,
    ) -> tuple[Float[Array, ""], Any, Float[Array, "num_tangents groups numbers"]]:
        """(value, aux, derivatives) of a share of the tangents on a share of the batch.

        Without `share` they are those of all tangents on the whole batch. `args` hold the share's
        part of the batch. Concatenate the derivatives of shares of the tangents along the first
        axis, those of shares of the groups along the second. Average them where the whole batch has
        the same tangents.
        """

    @abc.abstractmethod
    def gradient(
        self,
        key: Key[Array, ""],
        params: PyTree,
        derivatives: Float[Array, "num_tangents groups numbers"],
    ) -> PyTree:
        """The gradient estimate, a tree like `params`, from the derivatives of all tangents.

        The function is not run.
        """

    def descend(
        self,
        key: Key[Array, ""],
        params: PyTree,
        derivatives: Float[Array, "num_tangents groups numbers"],
        rate: float | Float[Array, ""],
    ) -> PyTree:
        """The parameters after a step of gradient descent, from the derivatives of all tangents.

            params - rate * gradient(key, params, derivatives)

        Where the tangents are in one of several `Blocks`, and the parameters are donated to the
        compiled step, nothing but the block is read or written.
        """
        return self._against(params, self.gradient(key, params, derivatives), rate)

    @staticmethod
    def _against(params: PyTree, grads: PyTree, rate: float | Array) -> PyTree:
        def leaf(g: Array | None, w: Any) -> Any:
            return w if g is None else (w - rate * g).astype(w.dtype)

        return jax.tree.map(leaf, grads, params, is_leaf=lambda g: g is None)
