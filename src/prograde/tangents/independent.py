"""Tangents whose entries are drawn independently of each other."""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from prograde._structured import count
from prograde.tangents._distribution import TangentDistribution
from prograde.tangents._draw import draw, leaf_words, normal, signs


@dataclass(frozen=True)
class IndependentEntries(TangentDistribution):
    """A distribution that draws every entry by itself.

    Subclass it as a frozen dataclass with a static method `entries(key, shape, dtype)`, an array of
    random numbers with mean 0 and variance 1, and with `second_moment`:
    c = n + kappa_4 - 1 for n parameters and entries with fourth moment kappa_4. `entries` must be
    the same function object at each access, so that compiled draws are found again.

    **Source:** arXiv 2202.08587.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from dataclasses import dataclass
        >>> from prograde.kit import IndependentEntries
        >>> @dataclass(frozen=True)
        ... class Uniform(IndependentEntries):
        ...     @staticmethod
        ...     def entries(key, shape, dtype):
        ...         return jax.random.uniform(key, shape, dtype, -3**0.5, 3**0.5)
        ...     def second_moment(self, params):
        ...         n = sum(w.size for w in jax.tree.leaves(params))
        ...         return jax.tree.map(lambda _: n + 9 / 5 - 1, params)
        >>> Uniform().sample(jax.random.key(0), {"w": jnp.zeros((3, 2))})["w"].shape
        (3, 2)
    """

    def sample(self, key, params, index=0, num_tangents=1):
        leaves, treedef = jax.tree.flatten(params)
        shapes = [(w.shape, w.dtype) for w in leaves]
        drawn = draw(key, index, leaf_words(params), shapes, self.entries)
        return treedef.unflatten(drawn)

    @staticmethod
    @abc.abstractmethod
    def entries(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """Independent random numbers with mean 0 and variance 1."""
        ...


@dataclass(frozen=True)
class Normal(IndependentEntries):
    """Independent standard normal entries: the distribution of the paper.

    **Second moment:** E |g|^2 = (n + 2) |grad f|^2 for n parameters.

    **Cost:** one normal number per parameter and tangent. On a CPU, drawing them takes longer than
    the forward run of a multilayer perceptron at batch size 64.

    **Source:** arXiv 2202.08587.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import Normal
        >>> tangent = Normal().sample(jax.random.key(0), {"w": jnp.zeros((3, 2))})
        >>> tangent["w"].shape
        (3, 2)
        >>> Normal().second_moment({"w": jnp.zeros((3, 2))})
        {'w': 8}
    """

    entries = staticmethod(normal)

    def second_moment(self, params):
        return jax.tree.map(lambda _: count(params) + 2, params)


@dataclass(frozen=True)
class Rademacher(IndependentEntries):
    """Independent fair signs.

    **Second moment:** E |g|^2 = n |grad f|^2 for n parameters, the least of all
    distributions with independent entries.

    **Cost:** one random bit per parameter and tangent.

    **Source:** simultaneous perturbation with signs is Spall's SPSA (1992); for forward gradients,
    arXiv 2310.14168.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import Rademacher
        >>> tangent = Rademacher().sample(jax.random.key(0), jnp.zeros(1000))
        >>> bool(jnp.all(jnp.abs(tangent) == 1))
        True
    """

    entries = staticmethod(signs)

    def second_moment(self, params):
        return jax.tree.map(lambda _: count(params), params)


@dataclass(frozen=True)
class Sparse(IndependentEntries):
    """Independent entries: a share `density` of them is +-1/sqrt(density), the others are zero.

    **Arguments:**

    - `density`: the share p of entries that are not zero, more than 0 and at most 1. With p = 1
      this is `Rademacher`.

    **Second moment:** E |g|^2 = (n + 1/p - 1) |grad f|^2 for n parameters: hardly more than that of
    dense signs as long as n p is large.

    **Cost:** one random number and one sign per parameter and tangent. The product with a sparse
    tangent is computed as a dense one.

    **Errors:** `ValueError` for a density outside (0, 1].

    **Source:** sparse perturbations for forward-only fine-tuning: arXiv 2402.15751.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import Sparse
        >>> tangent = Sparse(density=0.25).sample(jax.random.key(0), jnp.zeros(8))
        >>> sorted(set(tangent.tolist()))
        [-2.0, 0.0, 2.0]
    """

    density: float = 0.1

    def __post_init__(self):
        is_number = isinstance(self.density, int | float) and not isinstance(self.density, bool)
        if not is_number or not 0 < self.density <= 1:
            raise ValueError(
                f"density={self.density!r}, but the share of non-zero entries is more than 0 and "
                "at most 1."
            )

    @property
    def entries(self):
        return _sparse_signs(self.density)

    def second_moment(self, params):
        return jax.tree.map(lambda _: count(params) + 1 / self.density - 1, params)


@lru_cache  # one function for each density, so that what was compiled for it is found again
def _sparse_signs(density: float) -> Callable[..., Array]:
    def entries(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        uniform = jax.random.uniform(key, shape, jnp.float32, minval=-1.0, maxval=1.0)
        return jnp.where(
            jnp.abs(uniform) <= density, jnp.sign(uniform) / math.sqrt(density), 0.0
        ).astype(dtype)

    return entries
