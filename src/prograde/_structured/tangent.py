"""A tangent kept as its factors, and a weight that carries one."""

import functools
import math
import operator
import string
from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from prograde._findings import DenseFallback
from prograde._inject import inject, wider
from prograde._jaxprs import UNKNOWN

# A sum of so few products of factors is written out, and fused by XLA into whatever uses it: an
# update that adds it to the
# weights takes no memory of their size. For more, a product of matrices is faster.
_MOST_TERMS = 16


class LowRankTangent(eqx.Module):
    """The tangent sum_r f_1[..., r] f_2[..., r] ... of an array of d axes, kept as its factors.

    Each factor has d + 1 axes. Along an axis of the array a factor has either the array's size, or
    1 and broadcasts. Its last axis is the rank. The matrix a b^T has the factors a[:, None, :] and
    b[None, :, :].

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import LowRankTangent
        >>> a, b = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [0.0], [3.0]])     # of rank one
        >>> print(LowRankTangent((a[:, None, :], b[None, :, :])).dense())
        [[1. 0. 3.]
         [2. 0. 6.]]
    """

    factors: tuple[Float[Array, "*axes rank"], ...]

    def dense(self) -> Float[Array, "*shape"]:
        """The tangent as an array."""
        return jnp.sum(functools.reduce(operator.mul, self.factors), axis=-1)

    def weighted_sum(self, coefficients: Float[Array, " k"]) -> Float[Array, "*shape"]:
        """sum_k c_k v_k, for a tangent whose factors have a leading axis k."""
        k, rank = self.factors[0].shape[0], self.factors[0].shape[-1]
        first, *others = (f.astype(coefficients.dtype) for f in self.factors)
        first = first * coefficients.reshape((k,) + (1,) * (first.ndim - 1))
        if k * rank <= _MOST_TERMS:

            def product(i, r):
                return functools.reduce(operator.mul, (f[i, ..., r] for f in (first, *others)))

            return functools.reduce(
                operator.add, (product(i, r) for i in range(k) for r in range(rank))
            )
        ndim = first.ndim - 2
        names = string.ascii_lowercase[:ndim]
        terms = []
        for factor in (first, *others):
            covered = [i for i in range(ndim) if factor.shape[1 + i] > 1]
            terms.append(
                (
                    "K" + "".join(names[i] for i in covered) + "R",
                    factor.reshape(k, *_sizes(factor, covered), rank),
                )
            )
        shape = jnp.broadcast_shapes(*(f.shape for f in (first, *others)))[1:-1]
        out = "".join(name for name, size in zip(names, shape, strict=True) if size > 1)
        total = jnp.einsum(
            ",".join(t for t, _ in terms) + "->" + out, *(f for _, f in terms), optimize="optimal"
        )
        return total.reshape(shape)

    def inner_products(self) -> Float[Array, "k k"]:
        """<v_j, v_k>, for a tangent whose factors have a leading axis k.

        Each factor varies along axes of its own.

        <a b^T, c d^T> = <a, c> <b, d>, for every pair of terms of the two sums over the rank.
        """
        pairs = []
        for factor in self.factors:
            flat = jnp.moveaxis(
                factor.reshape(factor.shape[0], -1, factor.shape[-1]), 1, -1
            )  # [k, rank, entries]
            dtype = wider(flat.dtype, jnp.float32)
            pairs.append(jnp.einsum("jrn,ksn->jrks", flat, flat, preferred_element_type=dtype))
        return jnp.sum(functools.reduce(operator.mul, pairs), axis=(1, 3))


def _sizes(factor: Array, covered: Sequence[int]) -> list[int]:
    return [factor.shape[1 + i] for i in covered]


class Recorder:
    """Collects where the tangent of one weight is formed.

    Compared by identity: nothing cached for another run is used.

    `primitive` and `place` are what is being done to the weight now.
    """

    def __init__(self) -> None:
        self.primitive, self.place = "", UNKNOWN
        self.formed: list[DenseFallback] = []


class PerturbedArray(eqx.Module):
    """A weight whose tangent with respect to `s` is the product of `factors`.

    `s` has as many axes as the weight.
    """

    weight: Float[Array, "*shape"]
    factors: tuple[Float[Array, "*axes rank"], ...]
    s: Float[Array, "*ones"]
    recorder: Recorder | None = eqx.field(static=True, default=None)

    @property
    def scalar(self) -> Float[Array, ""]:
        """What the program is differentiated by.

        After a loop `s` may be repeated along the axes the loop made.
        """
        return self.s[(0,) * self.s.ndim]

    def materialise(self) -> Array:
        if self.weight.size == 0:
            return self.weight
        if self.recorder is not None and sum(math.prod(f.shape[:-1]) > 1 for f in self.factors) > 1:
            self.recorder.formed.append(
                DenseFallback(self.recorder.primitive, self.weight.shape, self.recorder.place)
            )
        direction = jnp.broadcast_to(LowRankTangent(self.factors).dense(), self.weight.shape)
        return inject(self.scalar, self.weight, direction)

    def replace(self, weight: Array, factors: Sequence[Array]) -> "PerturbedArray":
        """Another weight and other factors, differentiated by the same scalar."""
        return PerturbedArray(
            weight, tuple(factors), self.scalar.reshape((1,) * weight.ndim), self.recorder
        )

    def map(
        self, of_weight: Callable[[Array], Array], of_factor: Callable[[Array], Array]
    ) -> "PerturbedArray":
        """Applies one function to the weight and another to every factor."""
        return self.replace(of_weight(self.weight), [of_factor(f) for f in self.factors])


def perturb(
    tangent: LowRankTangent, weight: Array, s: Float[Array, ""], recorder: Recorder | None = None
) -> PerturbedArray:
    """The weight as a value that carries this tangent with respect to `s`."""
    return PerturbedArray(weight, tangent.factors, s.reshape((1,) * weight.ndim), recorder)
