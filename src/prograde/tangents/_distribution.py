"""What every distribution of tangents is."""

import abc
from dataclasses import dataclass

import jax
from jaxtyping import Array, Key, PyTree

from prograde._structured import Tangent


@dataclass(frozen=True)
class TangentDistribution(abc.ABC):
    """A distribution of tangents v with E[v] = 0 and E[v v^T] = I.

    To add one, subclass it as a frozen dataclass and implement `sample` and `second_moment`. For
    independent entries subclass `prograde.kit.IndependentEntries`.

    **Source:** the condition E[v v^T] = I is that of arXiv 2202.08587, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> isinstance(pg.LowRank(rank=2), pg.TangentDistribution)
        True
        >>> pg.Rademacher().second_moment_of_mean(jnp.zeros(9), num_tangents=4)   # 1 + (9 - 1) / 4
        3.0
    """

    @abc.abstractmethod
    def sample(
        self,
        key: Key[Array, ""],
        params: PyTree[Array],
        index: int | Array = 0,
        num_tangents: int = 1,
    ) -> PyTree[Tangent]:
        """The tangent with this index: a tree like `params` of arrays or structured tangents.

        **Arguments:**

        - `key`: a typed key. The same key, index and parameter paths give the same tangent.
        - `params`: floating-point arrays (or their shapes and dtypes).
        - `index`: from 0 to `num_tangents` - 1. It may be traced, so that tangents can be drawn
          inside `vmap` and `scan`.
        - `num_tangents`: the number of tangents of the estimate. Only distributions whose tangents
          depend on each other use it.
        """

    @abc.abstractmethod
    def second_moment(self, params: PyTree[Array]) -> PyTree[float]:
        """The c_l of E |g|^2 = sum_l c_l |grad_l f|^2, for one tangent: a tree of numbers."""

    def second_moment_of_mean(self, params: PyTree[Array], num_tangents: int) -> PyTree[float]:
        """The c_l for the mean over K tangents: 1 + (c_l - 1) / K where they are independent."""
        return jax.tree.map(lambda c: 1 + (c - 1) / num_tangents, self.second_moment(params))
