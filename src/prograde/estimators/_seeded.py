"""Estimators whose estimate is a seed and few numbers: what can be shared among workers, and replayed."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Key, PyTree

from prograde.estimators._estimator import Estimator


class Share(NamedTuple):
    """The share of one worker: which part of the tangents, of how many equal parts, and which part of the batch.

    The numbers of the parts may be traced, such as `jax.lax.axis_index`; how many there are may not.

    **Fields:** `tangent`, which part of the tangents, of `tangent_parts`; `group`, which part of the batch, of `batch_parts`.

    **Errors:** `ValueError` from the estimator where the parts do not divide its tangents or its groups.

    **Source:** arXiv 2202.08587 for the mean over tangents.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator, key, params = pg.WeightPerturbation(num_tangents=4), jax.random.key(0), jnp.ones((8, 4))
        >>> fun = lambda w: jnp.sum(w ** 2)
        >>> halves = [estimator.derivatives(fun, key, params, share=pg.Share(i, 2))[2] for i in range(2)]
        >>> bool(jnp.allclose(jnp.concatenate(halves), estimator.derivatives(fun, key, params)[2], rtol=1e-4))
        True
    """

    tangent: int | Array = 0
    tangent_parts: int = 1
    group: int | Array = 0
    batch_parts: int = 1

    def of_tangents(self, num_tangents: int) -> int:
        """How many of the tangents the share holds."""
        if num_tangents % self.tangent_parts:
            raise ValueError(
                f"num_tangents={num_tangents}, but they are shared by {self.tangent_parts} workers, which must divide them."
            )
        return num_tangents // self.tangent_parts

    def of_groups(self, num_groups: int) -> int:
        """How many groups the part of the batch is cut into: one where the whole batch has the same tangents."""
        if num_groups > 1 and num_groups % self.batch_parts:
            raise ValueError(
                f"num_groups={num_groups}, but the batch is cut among {self.batch_parts} workers: 1, or a multiple of them, is "
                "needed."
            )
        return max(1, num_groups // self.batch_parts)


class SeededEstimator(Estimator):
    """An estimator whose gradient estimate is a function of the key, the parameters and a few numbers.

        g = gradient(key, params, derivatives(fun, key, params, *args))

    The numbers are all that depends on the function and the data. Workers that have the same parameters and keys need to
    exchange nothing else, and a run can be repeated from them without its data: see `prograde.distributed` and
    `prograde.replay`.

    To write one, subclass, and implement `estimate`, `derivatives` and `gradient`.

    **Source:** a step as a seed and a number: MeZO, arXiv 2305.17333.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator, key, params = pg.WeightPerturbation(num_tangents=2), jax.random.key(0), jnp.ones((8, 4))
        >>> value, aux, derivatives = estimator.derivatives(lambda w: jnp.sum(w ** 2), key, params)
        >>> derivatives.shape                                     # two tangents, one group, one number
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
        """(value, aux, derivatives) of a share of the tangents on a share of the batch; of all without one.

        `args` hold the share's part of the batch. The derivatives of shares of the tangents are to be concatenated along the first axis, those of
        shares of the groups along the second; where all of the batch has the same tangents they are averaged.
        """

    @abc.abstractmethod
    def gradient(
        self,
        key: Key[Array, ""],
        params: PyTree,
        derivatives: Float[Array, "num_tangents groups numbers"],
    ) -> PyTree:
        """The gradient estimate of the whole, a tree like `params`, from all the derivatives. The function is not run."""
