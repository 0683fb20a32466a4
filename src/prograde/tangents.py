"""Distributions of tangents: random directions v in parameter space with E[v] = 0 and E[v v^T] = I.

Any of them gives an unbiased estimate g = (grad f . v) v. They differ in the second moment of that estimate, which is
known in closed form for all of them,

    E |g|^2 = sum over leaves l of  c_l |grad_l f|^2

(`second_moment` returns the c_l), and in what a step costs: dense tangents need one random number per parameter, low-rank
ones need a few per row and column.
"""

import abc
import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from prograde._inject import wider
from prograde._structured import LowRankTangent, Tangent

_SMALL = 2**16  # draws of fewer elements than this are cut into blocks, and all blocks drawn by one loop
_BLOCK = 64


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
    key: Key[Array, ""],
    index: int | Array,
    words: list[int],
    shapes: list[tuple[tuple[int, ...], jnp.dtype]],
    entries: Callable,
) -> list[Array]:
    """Arrays of random `entries`, each from the key folded with the tangent's index and a word of its own.

    A small array is cut into blocks, each from a key of its own, and the blocks of all small arrays are drawn in one loop:
    otherwise XLA compiles the generator into every use of every factor, for minutes where there are many leaves.
    """
    key = _threefry(key)
    zero = (
        jax.random.key_data(key)[0] >> 31
    ) >> 1  # of the key that all tangents share, so that `vmap` slices and not gathers
    key = jax.random.fold_in(key, index)
    drawn: list[Array] = [jnp.zeros(())] * len(shapes)
    small: dict[jnp.dtype, list[int]] = {}
    for i, (shape, dtype) in enumerate(shapes):
        if math.prod(shape) < _SMALL:
            small.setdefault(jnp.dtype(dtype), []).append(i)
        else:
            drawn[i] = entries(jax.random.fold_in(key, words[i]), shape, dtype)
    for dtype, members in small.items():
        sizes = [math.prod(shapes[i][0]) for i in members]
        counts = [-(-size // _BLOCK) for size in sizes]
        which = [(words[i], block) for i, count in zip(members, counts, strict=True) for block in range(count)]
        which += [(0, 0)] * (len(which) % 2)
        blocks = _draw_blocks(key, jnp.asarray(which, jnp.uint32).reshape(-1, 2), entries, dtype)
        start = 0
        for i, size, count in zip(members, sizes, counts, strict=True):
            # the start is data to XLA, which compiles one kernel for all uses of equal shape instead of one for each
            at = (jnp.asarray([start, 1], jnp.uint32) + zero)[0]
            drawn[i] = lax.dynamic_slice(blocks, (at,), (size,)).reshape(shapes[i][0])
            start += count * _BLOCK
    return drawn


@partial(jax.jit, static_argnums=(2, 3))
def _draw_blocks(key: Key[Array, ""], which: Array, entries: Callable, dtype: jnp.dtype) -> Array:
    """A block for each (word, block number), in a loop of two iterations, whose result XLA keeps and does not recompute."""

    def one(word_and_number: Array) -> Array:
        word, number = word_and_number
        return entries(jax.random.fold_in(jax.random.fold_in(key, word), number), (_BLOCK,), dtype)

    return lax.map(jax.vmap(one), which.reshape(2, -1, 2)).reshape(-1)


def _normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    # in fewer bits than float32 JAX's normal numbers have a mean that is not zero
    return jax.random.normal(key, shape, wider(dtype, jnp.float32)).astype(dtype)


def _threefry(key: Key[Array, ""]) -> Key[Array, ""]:
    """A threefry key in place of any other, whose draws under `vmap` would depend on the size of the batch."""
    if jax.random.key_impl(key) == "threefry2x32":
        return key
    data = jax.random.key_data(key)
    key = jax.random.wrap_key_data(data[:2], impl="threefry2x32")
    for i in range(2, len(data)):
        key = jax.random.fold_in(key, data[i])
    return key


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
        drawn = _draw(key, index, _leaf_words(params), shapes, self._entries)
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
        chosen = jax.random.permutation(jax.random.fold_in(_threefry(key), 0), n)[index]
        tangents, start = [], 0
        for w in leaves:
            position = jnp.arange(start, start + w.size).reshape(w.shape)
            tangents.append(jnp.where(position == chosen, math.sqrt(n), 0.0).astype(w.dtype))
            start += w.size
        return treedef.unflatten(tangents)

    def second_moment(self, params):
        return jax.tree.map(lambda _: _count(params), params)


@dataclass(frozen=True)
class _Factored(TangentDistribution):
    """Tangents v = r^(-1/2) sum of r products of independent random factors, each of which varies along some of the axes."""

    rank: int = 1
    factors: Normal | Rademacher = field(default_factory=Rademacher)

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r}, but the rank of a tangent is a whole number of at least 1.")
        if not isinstance(self.factors, _IndependentEntries):
            raise ValueError(
                f"factors={self.factors!r}, but factors need independent entries: Rademacher() or Normal()."
            )

    @abc.abstractmethod
    def _cut(self, shape: tuple[int, ...]) -> list[list[int]]:
        """Groups of axes, one for each factor."""

    def _group_sizes(self, shape: tuple[int, ...]) -> list[int] | None:
        """The sizes of the factors, or `None` where they would hold no fewer numbers than the array."""
        sizes = [math.prod(shape[axis] for axis in axes) for axes in self._cut(shape)]
        return sizes if len(sizes) > 1 and self.rank * sum(sizes) < math.prod(shape) else None

    def _check_rank(self, shapes: list[tuple[int, ...]]) -> None:
        """Raises where there are matrices that a lower rank would suit; vectors alone get dense tangents of any rank."""
        of_rank_1 = dataclasses.replace(self, rank=1)
        suited = [(shape, n) for shape in shapes if (n := of_rank_1._group_sizes(shape)) is not None]
        if suited:
            shape, n = max(suited, key=lambda pair: math.prod(pair[0]))
            most = -(-math.prod(shape) // sum(n)) - 1
            raise ValueError(
                f"rank={self.rank}, but no parameter is a matrix that large: the largest has shape {shape}, for which a rank "
                f"of at most {most} takes fewer numbers than the matrix. Use rank <= {most}, or dense tangents: Rademacher()."
            )

    def sample(self, key, params, index=0, num_tangents=1):
        leaves, treedef = jax.tree.flatten(params)
        sizes = [self._group_sizes(w.shape) for w in leaves]
        if self.rank > 1 and not any(sizes):
            self._check_rank([w.shape for w in leaves])
        # all factors of a leaf in one draw
        shapes = [(w.shape if n is None else (sum(n), self.rank), w.dtype) for w, n in zip(leaves, sizes, strict=True)]
        drawn = _draw(key, index, _leaf_words(params), shapes, self.factors._entries)
        tangents = []
        for w, group_sizes, entries in zip(leaves, sizes, drawn, strict=True):
            if group_sizes is None:
                tangents.append(entries)
                continue
            factors = []
            for axes, part in zip(self._cut(w.shape), lax.split(entries, group_sizes, 0), strict=True):
                factors.append(part.reshape(*(n if i in axes else 1 for i, n in enumerate(w.shape)), self.rank))
            if self.rank > 1:
                factors[-1] = factors[-1] / math.sqrt(self.rank)
            tangents.append(LowRankTangent(tuple(factors)))
        return treedef.unflatten(tangents)

    def second_moment(self, params):
        total = _count(params)
        excess = 2 if isinstance(self.factors, Normal) else 0

        def leaf(w: Array) -> Float:
            sizes = self._group_sizes(w.shape)
            if sizes is None:
                return total + excess
            of_one_product = math.prod(n + excess for n in sizes) - math.prod(sizes)
            return total + of_one_product / self.rank + 2 * (1 - 1 / self.rank)

        return jax.tree.map(leaf, params)


@dataclass(frozen=True)
class LowRank(_Factored):
    """Low-rank tangents: v = r^(-1/2) a b^T with r columns of random signs (or normals) in a and b.

    The product x v is computed as (x a) b^T, so that a forward run along v costs little more than the forward run
    itself, and v is never formed. A leaf with more than two axes is taken as a matrix by cutting its axes in two, where the
    halves are nearest in size: attention weights [model, heads, head] as model x (heads head), a stack of layers
    [layers, m, n] as (layers m) x n, a kernel [height, width, in, out] as (height width in) x out and one stored as
    [out, in, height, width] as out x (in height width). Leaves whose factors would be no fewer numbers than the leaf (vectors,
    tiny matrices) get dense tangents with independent entries.

    **Arguments:**

    - `rank`: r, at least 1.
    - `factors`: the distribution of the entries of a and b, `Rademacher()` or `Normal()`.

    **Second moment:** for leaves taken as m x n matrices, with N parameters in all,
    c = N + 2 (1 - 1/r) for signs: with r = 1 exactly that of dense signs, so structure costs no variance. For normal factors
    c = N + ((m + 2)(n + 2) - m n) / r + 2 (1 - 1/r).

    **Cost:** (m + n) r random numbers per leaf and tangent. Where the weight is used in a product or a convolution, x v takes
    about as many multiply-adds per row of the input. Where something else is done to it, the dense tangent is formed and
    the result stays exact; `prograde.check` lists these places.

    **Errors:** `ValueError` for a rank below 1, a rank that is not low for any matrix there is, or another distribution of
    factors.

    **Source:** rank-one directions for forward-only training: LOZO, arXiv 2410.07698; the second moments are derived in
    the documentation and tested.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import LowRank
        >>> tangent = LowRank(rank=2).sample(jax.random.key(0), {"w": jnp.zeros((30, 20)), "b": jnp.zeros(20)})
        >>> [factor.shape for factor in tangent["w"].factors], tangent["b"].shape
        ([(30, 1, 2), (1, 20, 2)], (20,))
    """

    def _cut(self, shape):
        axes = list(range(len(shape)))
        cuts = [(axes[:i], axes[i:]) for i in range(1, len(axes))]
        size = lambda group: math.prod(shape[axis] for axis in group)  # noqa: E731
        return list(min(cuts, key=lambda cut: size(cut[0]) + size(cut[1]))) if cuts else [axes]


@dataclass(frozen=True)
class Separable(_Factored):
    """Separable tangents: v = r^(-1/2) times the sum of r outer products of one random vector per axis.

    Of a matrix this is `LowRank`. Arrays with more axes take fewer random numbers and multiply-adds still, but all of the array
    hangs on few factors: the directional derivative has the same variance and heavier tails (a product of d factors instead
    of two), so that single steps are larger and most are smaller. `LowRank` is the default for that reason.

    **Arguments:**

    - `rank`: r, at least 1.
    - `factors`: the distribution of the entries, `Rademacher()` or `Normal()`.

    **Second moment:** with N parameters in all, c = N + 2 (1 - 1/r) for signs, as for `LowRank`. For normal factors and a leaf
    with axes of sizes n_i, c = N + (prod (n_i + 2) - prod n_i) / r + 2 (1 - 1/r).

    **Cost:** r sum n_i random numbers per leaf and tangent; a product costs as much as with `LowRank`, or less.

    **Errors:** `ValueError` for a rank below 1, a rank that is not low for any matrix there is, or another distribution of
    factors.

    **Source:** arXiv 2202.08587 for the condition E[v v^T] = I; the second moments are derived in the documentation.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import Separable
        >>> kernel = Separable().sample(jax.random.key(0), jnp.zeros((3, 3, 64, 32)))
        >>> [factor.size for factor in kernel.factors]
        [3, 3, 64, 32]
    """

    def _cut(self, shape):
        return [[axis] for axis, n in enumerate(shape) if n > 1] or [list(range(len(shape)))]
