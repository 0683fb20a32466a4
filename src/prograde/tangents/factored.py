"""Tangents kept as factors: products of few random vectors."""

import abc
import dataclasses
import math
from dataclasses import dataclass, field

import jax
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from prograde._structured import LowRankTangent, Tangent, count
from prograde.tangents._distribution import TangentDistribution
from prograde.tangents._draw import draw, leaf_words
from prograde.tangents.independent import Normal, Rademacher


@dataclass(frozen=True)
class Factored(TangentDistribution):
    """Tangents v = r^(-1/2) sum of r products of independent random factors.

    Each factor varies along some of the axes.
    """

    rank: int = 1
    factors: Normal | Rademacher = field(default_factory=Rademacher)

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(
                f"rank={self.rank!r}, but the rank of a tangent is a whole number of at least 1."
            )
        if not isinstance(self.factors, Normal | Rademacher):
            raise ValueError(
                f"factors={self.factors!r}, but factors need independent entries: Rademacher() or "
                "Normal()."
            )

    @abc.abstractmethod
    def _cut(self, shape: tuple[int, ...]) -> list[list[int]]:
        """Groups of axes, one for each factor."""

    def _group_sizes(self, shape: tuple[int, ...]) -> list[int] | None:
        """The sizes of the factors, or `None` where they hold no fewer numbers than the array."""
        sizes = [math.prod(shape[axis] for axis in axes) for axes in self._cut(shape)]
        return sizes if len(sizes) > 1 and self.rank * sum(sizes) < math.prod(shape) else None

    def check_rank(self, params: PyTree[Array]) -> None:
        """Raises where a lower rank would suit a matrix. Vectors get dense tangents at any rank."""
        shapes = [w.shape for w in jax.tree.leaves(params)]
        if self.rank == 1 or any(self._group_sizes(shape) for shape in shapes):
            return
        of_rank_1 = dataclasses.replace(self, rank=1)
        suited = [
            (shape, n) for shape in shapes if (n := of_rank_1._group_sizes(shape)) is not None
        ]
        if suited:
            shape, n = max(suited, key=lambda pair: math.prod(pair[0]))
            most = -(-math.prod(shape) // sum(n)) - 1
            raise ValueError(
                f"rank={self.rank}, but no parameter is a matrix that large: the largest has shape "
                f"{shape}, for which factors of a rank of at most {most} hold fewer numbers than "
                f"the matrix. Use rank <= {most}, or dense tangents: Rademacher()."
            )

    def sample(self, key, params, index=0, num_tangents=1):
        self.check_rank(params)
        return self.sample_any(key, params, index)

    def sample_any(
        self, key: Key[Array, ""], params: PyTree[Array], index: int | Array
    ) -> PyTree[Tangent]:
        """`sample`, also where the rank suits none of these leaves."""
        leaves, treedef = jax.tree.flatten(params)
        sizes = [self._group_sizes(w.shape) for w in leaves]
        # all factors of a leaf in one draw
        shapes = [
            (w.shape if n is None else (sum(n), self.rank), w.dtype)
            for w, n in zip(leaves, sizes, strict=True)
        ]
        drawn = draw(key, index, leaf_words(params), shapes, self.factors.entries)
        tangents = []
        for w, group_sizes, entries in zip(leaves, sizes, drawn, strict=True):
            if group_sizes is None:
                tangents.append(entries)
                continue
            factors = []
            for axes, part in zip(
                self._cut(w.shape), lax.split(entries, group_sizes, 0), strict=True
            ):
                factors.append(
                    part.reshape(*(n if i in axes else 1 for i, n in enumerate(w.shape)), self.rank)
                )
            if self.rank > 1:
                factors[-1] = factors[-1] / math.sqrt(self.rank)
            tangents.append(LowRankTangent(tuple(factors)))
        return treedef.unflatten(tangents)

    def second_moment(self, params):
        total = count(params)
        excess = 2 if isinstance(self.factors, Normal) else 0

        def leaf(w: Array) -> Float:
            sizes = self._group_sizes(w.shape)
            if sizes is None:
                return total + excess
            of_one_product = math.prod(n + excess for n in sizes) - math.prod(sizes)
            return total + of_one_product / self.rank + 2 * (1 - 1 / self.rank)

        return jax.tree.map(leaf, params)


@dataclass(frozen=True)
class LowRank(Factored):
    """Low-rank tangents: v = r^(-1/2) a b^T with r columns of random signs (or normals) in a and b.

    The product x v is computed as (x a) b^T. A forward run along v therefore costs little more than
    the forward run itself, and v is never formed. A leaf with more than two axes is taken as a
    matrix: its axes are cut in two where the halves are nearest in size. Attention weights [model,
    heads, head] become model x (heads head), a stack of layers [layers, m, n] becomes
    (layers m) x n, a kernel [height, width, in, out] becomes (height width in) x out, and one
    stored as [out, in, height, width] becomes out x (in height width). Leaves whose factors hold no
    fewer numbers than the leaf (vectors, tiny matrices) get dense tangents with independent
    entries.

    **Arguments:**

    - `rank`: r, at least 1.
    - `factors`: the distribution of the entries of a and b, `Rademacher()` or `Normal()`.

    **Second moment:** for leaves taken as m x n matrices, with N parameters in all,
    c = N + 2 (1 - 1/r) for signs: with r = 1 exactly that of dense signs, so structure costs no
    variance. For normal factors c = N + ((m + 2)(n + 2) - m n) / r + 2 (1 - 1/r).

    **Cost:** (m + n) r random numbers per leaf and tangent. In a product or a convolution, x v
    takes about as many multiply-adds per row of the input. Other operations on the weight form the
    dense tangent, and the result stays exact; `prograde.check` lists these places.

    **Errors:** `ValueError` for a rank below 1, a rank that is not low for any matrix of the
    parameters, or another distribution of factors.

    **Source:** rank-one directions for forward-only training: LOZO, arXiv 2410.07698; the second
    moments are derived in the documentation and tested.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import LowRank
        >>> params = {"w": jnp.zeros((30, 20)), "b": jnp.zeros(20)}
        >>> tangent = LowRank(rank=2).sample(jax.random.key(0), params)
        >>> [factor.shape for factor in tangent["w"].factors], tangent["b"].shape
        ([(30, 1, 2), (1, 20, 2)], (20,))
    """

    def _cut(self, shape):
        axes = list(range(len(shape)))
        cuts = [(axes[:i], axes[i:]) for i in range(1, len(axes))]
        size = lambda group: math.prod(shape[axis] for axis in group)  # noqa: E731
        return list(min(cuts, key=lambda cut: size(cut[0]) + size(cut[1]))) if cuts else [axes]


@dataclass(frozen=True)
class Separable(Factored):
    """Separable tangents: v = r^(-1/2) sum of r outer products of one random vector per axis.

    For a matrix this is `LowRank`. Arrays with more axes need even fewer random numbers and
    multiply-adds. But the whole array depends on few factors: the directional derivative has the
    same variance and heavier tails (a product of d factors instead of two), so that a few steps are
    larger and most are smaller. `LowRank` is the default for that reason.

    **Arguments:**

    - `rank`: r, at least 1.
    - `factors`: the distribution of the entries, `Rademacher()` or `Normal()`.

    **Second moment:** with N parameters in all, c = N + 2 (1 - 1/r) for signs, as for `LowRank`.
    For normal factors and a leaf with axes of sizes n_i,
    c = N + (prod (n_i + 2) - prod n_i) / r + 2 (1 - 1/r).

    **Cost:** r sum n_i random numbers per leaf and tangent; a product costs as much as with
    `LowRank`, or less.

    **Errors:** `ValueError` for a rank below 1, a rank that is not low for any matrix of the
    parameters, or another distribution of factors.

    **Source:** arXiv 2202.08587 for the condition E[v v^T] = I; the second moments are derived in
    the documentation.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import Separable
        >>> kernel = Separable().sample(jax.random.key(0), jnp.zeros((3, 3, 64, 32)))
        >>> [factor.size for factor in kernel.factors]
        [3, 3, 64, 32]
    """

    def _cut(self, shape):
        return [[axis] for axis, n in enumerate(shape) if n > 1] or [list(range(len(shape)))]
