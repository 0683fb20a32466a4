"""Distributions of tangents: random directions v in parameter space with E[v] = 0 and E[v v^T] = I.

Any of them gives an unbiased estimate g = (grad f . v) v. They differ in the second moment of that estimate, which is
known in closed form for all of them,

    E |g|^2 = sum over leaves l of  c_l |grad_l f|^2

(`second_moment` returns the c_l), and in what a step costs: dense tangents need one random number per parameter, low-rank
ones need a few per row and column.
"""

import abc
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from prograde._structured import LowRankTangent, Tangent

_SMALL = 2**16  # draws of fewer elements than this are batched by shape: one generator call instead of one per leaf


def _leaf_words(params: PyTree[Array]) -> list[int]:
    """One word per leaf to fold into a key, from the leaf's path: a leaf's tangent does not depend on its neighbours."""
    words: dict[int, None] = {}  # an ordered set
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name, salt = jax.tree_util.keystr(path), 0
        while (word := int.from_bytes(hashlib.sha256(f"{name}{salt or ''}".encode()).digest()[:4], "big")) in words:
            salt += 1
        words[word] = None
    return list(words)


def _draw(
    key: Key[Array, ""], words: list[int], shapes: list[tuple[tuple[int, ...], jnp.dtype]], entries: Callable
) -> list[Array]:
    """`entries(fold_in(key, word), shape, dtype)` for each; small draws of one shape share a call, to compile faster."""
    groups: dict[tuple, list[int]] = {}
    for i, (shape, dtype) in enumerate(shapes):
        groups.setdefault((shape, dtype) if math.prod(shape) < _SMALL else (i,), []).append(i)
    drawn: list[Array] = [jnp.zeros(())] * len(shapes)
    for members in groups.values():
        shape, dtype = shapes[members[0]]

        def one(word: Array, shape: tuple[int, ...] = shape, dtype: jnp.dtype = dtype) -> Array:
            return entries(jax.random.fold_in(key, word), shape, dtype)

        group_words = jnp.asarray([words[i] for i in members], jnp.uint32)
        arrays = jax.vmap(one)(group_words) if len(members) > 1 else [one(group_words[0])]
        for i, array in zip(members, arrays, strict=True):
            drawn[i] = array
    return drawn


def _normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.random.normal(key, shape, dtype)


def _signs(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Independent fair signs.

    A large draw takes 32 signs from each random word. A small one, such as the factor of a low-rank tangent, takes a word
    for each: XLA fuses the conversion into every use of the factor, and there it must be one load and two bit operations.
    """
    size = math.prod(shape)
    if size < _SMALL:
        words = jax.random.bits(key, shape, jnp.uint32)
    else:
        packed = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
        words = (packed[None, :] << jnp.arange(32, dtype=jnp.uint32)[:, None]).reshape(-1)[:size].reshape(shape)
    signed_one = (words & jnp.uint32(0x80000000)) | jnp.uint32(0x3F800000)  # the bits of +1.0 or -1.0 in float32
    return lax.bitcast_convert_type(signed_one, jnp.float32).astype(dtype)


def _count(params: PyTree[Array]) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@dataclass(frozen=True)
class TangentDistribution(abc.ABC):
    """A distribution of tangents with zero mean and unit covariance. Subclass it to add one.

    **Source:** the condition E[v v^T] = I is that of arXiv 2202.08587, section 3.
    """

    @abc.abstractmethod
    def sample(
        self, key: Key[Array, ""], params: PyTree[Array], index: int | Array = 0, num_tangents: int = 1
    ) -> PyTree[Tangent]:
        """The tangent number `index` of `num_tangents`, a tree like `params` of arrays or structured tangents.

        **Arguments:**

        - `key`: a typed key. The same key, index and parameter paths give the same tangent.
        - `params`: floating-point arrays (or their shapes and dtypes).
        - `index`: which of the tangents; may be traced, so that tangents can be drawn inside `vmap` and `scan`.
        - `num_tangents`: how many are drawn together; only distributions whose tangents depend on each other look at it.
        """

    @abc.abstractmethod
    def second_moment(self, params: PyTree[Array]) -> PyTree[float]:
        """The c_l of E |g|^2 = sum_l c_l |grad_l f|^2, for one tangent; a tree like `params` of numbers."""


@dataclass(frozen=True)
class _IndependentEntries(TangentDistribution):
    """Every entry drawn independently."""

    def sample(self, key, params, index=0, num_tangents=1):
        leaves, treedef = jax.tree.flatten(params)
        shapes = [(w.shape, w.dtype) for w in leaves]
        drawn = _draw(jax.random.fold_in(key, index), _leaf_words(params), shapes, self._entries)
        return treedef.unflatten(drawn)

    @staticmethod
    @abc.abstractmethod
    def _entries(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array: ...


@dataclass(frozen=True)
class Normal(_IndependentEntries):
    """Independent standard normal entries: the distribution of the paper.

    **Second moment:** E |g|^2 = (n + 2) |grad f|^2 for n parameters.

    **Cost:** one normal number per parameter and tangent; on a CPU drawing them takes longer than the forward run of
    a multilayer perceptron at batch size 64.

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

    _entries = staticmethod(_normal)

    def second_moment(self, params):
        return jax.tree.map(lambda _: _count(params) + 2, params)


@dataclass(frozen=True)
class Rademacher(_IndependentEntries):
    """Independent fair signs.

    **Second moment:** E |g|^2 = n |grad f|^2 for n parameters, the least of all distributions with independent entries.

    **Cost:** one random bit per parameter and tangent.

    **Source:** simultaneous perturbation with signs is Spall's SPSA (1992); for forward gradients, arXiv 2310.14168.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import Rademacher
        >>> tangent = Rademacher().sample(jax.random.key(0), jnp.zeros(1000))
        >>> bool(jnp.all(jnp.abs(tangent) == 1))
        True
    """

    _entries = staticmethod(_signs)

    def second_moment(self, params):
        return jax.tree.map(lambda _: _count(params), params)


@dataclass(frozen=True)
class Sphere(TangentDistribution):
    """Uniform on the sphere of radius sqrt(n) in the space of all n parameters together.

    **Second moment:** E |g|^2 = n |grad f|^2.

    **Cost:** one normal number per parameter and tangent, and one pass over them for the norm.

    **Source:** arXiv 2310.14168 compares it with `Normal`; it is the direction of randomised gradient-free methods.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import Sphere
        >>> tangent = Sphere().sample(jax.random.key(0), {"w": jnp.zeros((3, 2)), "b": jnp.zeros(4)})
        >>> norm_squared = sum(jnp.sum(leaf ** 2) for leaf in jax.tree.leaves(tangent))
        >>> f"{norm_squared:.4f}"
        '10.0000'
    """

    def sample(self, key, params, index=0, num_tangents=1):
        normal = Normal().sample(key, params, index, num_tangents)
        squares = [jnp.sum(jnp.square(v.astype(jnp.float32))) for v in jax.tree.leaves(normal)]
        scale = jnp.sqrt(_count(params) / sum(squares))
        return jax.tree.map(lambda v: v * scale.astype(v.dtype), normal)

    def second_moment(self, params):
        return jax.tree.map(lambda _: _count(params), params)


@dataclass(frozen=True)
class Basis(TangentDistribution):
    """Coordinate directions, sqrt(n) e_i, chosen without repetition among the tangents of one estimate.

    With as many tangents as parameters the estimate is the exact gradient.

    **Second moment:** E |g|^2 = n |grad f|^2 for one tangent, and (n / K) |grad f|^2 for the mean of K <= n of them.

    **Cost:** drawing K tangents sorts n numbers, so this is a tool for small models and for tests.

    **Errors:** `ValueError` when more tangents are asked for than there are parameters.

    **Source:** randomised coordinate descent; the full basis is forward-mode differentiation of arXiv 2202.08587,
    section 2.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> grad_fn = pg.value_and_grad(lambda w: jnp.sum(w ** 2), pg.WeightPerturbation(pg.Basis(), num_tangents=3))
        >>> value, grads = grad_fn(jax.random.key(0), jnp.array([1.0, 2.0, 3.0]))
        >>> print(value, grads.round(4))
        14.0 [2. 4. 6.]
    """

    def sample(self, key, params, index=0, num_tangents=1):
        leaves, treedef = jax.tree.flatten(params)
        n = _count(params)
        if num_tangents > n:
            raise ValueError(
                f"num_tangents={num_tangents}, but Basis has one tangent per parameter and the parameters hold {n}. "
                f"Use num_tangents <= {n}."
            )
        chosen = jax.random.permutation(jax.random.fold_in(key, 0), n)[index]
        tangents, start = [], 0
        for w in leaves:
            position = jnp.arange(start, start + w.size).reshape(w.shape)
            tangents.append(jnp.where(position == chosen, math.sqrt(n), 0.0).astype(w.dtype))
            start += w.size
        return treedef.unflatten(tangents)

    def second_moment(self, params):
        return jax.tree.map(lambda _: _count(params), params)


@dataclass(frozen=True)
class LowRank(TangentDistribution):
    """Low-rank tangents of matrices: v = r^(-1/2) a b^T with r columns of random signs (or normals) in a and b.

    The product x v is computed as (x a) b^T, so that a forward run along v costs little more than the forward run
    itself, and v is never formed. The last two axes of a leaf are the matrix; leading axes are a stack of independent
    matrices (layers of a `scan`, offsets of a convolution kernel). Leaves with fewer than two axes, and matrices too
    small for the factors to be fewer numbers than the matrix, get dense tangents with independent entries.

    **Arguments:**

    - `rank`: r, at least 1.
    - `factors`: the distribution of the entries of a and b, `Rademacher()` or `Normal()`.

    **Second moment:** for a tree of m x n matrices with N parameters in all,
    c = N + 2 (1 - 1/r) for signs: with r = 1 exactly that of dense signs, so structure costs no variance. For normal factors
    c = N + ((m + 2)(n + 2) - m n) / r + 2 (1 - 1/r).

    **Cost:** (m + n) r random numbers per matrix and tangent, and as many multiply-adds per row of the input, where the
    weight is used as a matrix. Elsewhere the dense tangent is formed and the result stays exact.

    **Errors:** `ValueError` for a rank below 1 or another distribution of factors.

    **Source:** rank-one directions for forward-only training: LOZO, arXiv 2410.07698; the second moments are derived in
    the documentation and tested.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import LowRank
        >>> tangent = LowRank(rank=2).sample(jax.random.key(0), {"w": jnp.zeros((30, 20)), "b": jnp.zeros(20)})
        >>> tangent["w"].a.shape, tangent["w"].b.shape, tangent["b"].shape
        ((30, 2), (20, 2), (20,))
    """

    rank: int = 1
    factors: Normal | Rademacher = field(default_factory=Rademacher)

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r}, but the rank of a tangent is a whole number of at least 1.")
        if not isinstance(self.factors, _IndependentEntries):
            raise ValueError(
                f"factors={self.factors!r}, but factors need independent entries: Rademacher() or Normal()."
            )

    def _is_low_rank(self, w: Array) -> bool:
        return w.ndim >= 2 and self.rank * (w.shape[-2] + w.shape[-1]) < w.shape[-2] * w.shape[-1]

    def sample(self, key, params, index=0, num_tangents=1):
        leaves, treedef = jax.tree.flatten(params)
        shapes = []
        for w in leaves:
            if self._is_low_rank(w):  # both factors of a matrix in one draw
                shapes.append(((*w.shape[:-2], w.shape[-2] + w.shape[-1], self.rank), w.dtype))
            else:
                shapes.append((w.shape, w.dtype))
        tangents = []
        arrays = _draw(jax.random.fold_in(key, index), _leaf_words(params), shapes, self.factors._entries)
        for w, drawn in zip(leaves, arrays, strict=True):
            if self._is_low_rank(w):
                a, b = lax.split(drawn, w.shape[-2:], axis=drawn.ndim - 2)
                drawn = LowRankTangent(a, b / math.sqrt(self.rank) if self.rank > 1 else b)
            tangents.append(drawn)
        return treedef.unflatten(tangents)

    def second_moment(self, params):
        total = _count(params)
        entry_excess = 2 if isinstance(self.factors, Normal) else 0

        def leaf(w: Array) -> Float:
            if not self._is_low_rank(w):
                return total + entry_excess
            m, n = w.shape[-2:]
            diagonal = (m + entry_excess) * (n + entry_excess) - m * n
            return total + diagonal / self.rank + 2 * (1 - 1 / self.rank)

        return jax.tree.map(leaf, params)
