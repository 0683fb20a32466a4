"""Draws: leaves, factors and tangents share no random numbers, below and above each threshold."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg
from prograde._structured import is_structured
from prograde.testing import assert_mean

# 2^16 entries is the size at which draws change
LEAVES = {
    "small": (40, 50),
    "small again": (40, 50),
    "below": (2**16 - 1,),
    "at": (2**16,),
    "at again": (2**16,),
    "large": (300, 300),
    "large again": (300, 300),
}
DENSE = [pg.Normal(), pg.Rademacher(), pg.Sparse(0.3)]
LIMIT = 5.7  # standard errors that one of 100 right figures exceeds once in a million times


def arrays(distribution, key, shapes=LEAVES, index=0):
    """Every array that is drawn, flat, with entries of variance 1."""
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    tangent = jax.jit(distribution.sample, static_argnums=(2, 3))(key, params, index, 4)
    found = {}
    for name, v in tangent.items():
        if is_structured(v):
            *factors, last = v.factors
            factors.append(last * math.sqrt(distribution.rank))
            for i, factor in enumerate(factors):
                for r in range(factor.shape[-1]):
                    found[f"{name}, factor {i}, column {r}"] = np.ravel(factor[..., r])
        else:
            found[name] = np.ravel(v)
    return found


def uncorrelated(a, b):
    n = min(len(a), len(b))
    return abs(a[:n] @ b[:n]) < LIMIT * math.sqrt(n) and not np.array_equal(a[:n], b[:n])


@pytest.mark.parametrize("distribution", DENSE, ids=repr)
def test_no_two_leaves_and_no_two_tangents_share_numbers(distribution, key):
    drawn = arrays(distribution, key)
    other = arrays(distribution, key, index=1)
    names = list(drawn)
    for i, name in enumerate(names):
        for earlier in names[:i]:
            assert uncorrelated(drawn[name], drawn[earlier]), (name, earlier)
        assert uncorrelated(drawn[name], other[name]), name
        # blocks and words of one leaf
        for lag in (1, 32, 64, len(drawn[name]) // 32, len(drawn[name]) // 2):
            assert uncorrelated(drawn[name][lag:], drawn[name][:-lag]), (name, lag)


@pytest.mark.parametrize("distribution", DENSE, ids=repr)
def test_entries_have_the_moments_of_their_distribution_below_and_above_the_threshold(
    distribution, key
):
    fourth = {pg.Normal(): 3, pg.Rademacher(): 1, pg.Sparse(0.3): 1 / 0.3}[distribution]
    for name, x in arrays(distribution, key).items():
        x = x.astype(np.float64)
        error = LIMIT / math.sqrt(len(x))
        assert abs(x.mean()) < error, name
        assert abs((x**2).mean() - 1) <= error * math.sqrt(fourth - 1) + 1e-9, name
        assert abs((x**3).mean()) < error * math.sqrt(15), name
        assert abs((x**4).mean() - fourth) <= error * 10 + 1e-5, name


@pytest.mark.parametrize(
    "distribution",
    [pg.LowRank(1), pg.LowRank(2, pg.Normal()), pg.Separable(3)],
    ids=repr,
)
def test_factors_and_their_columns_share_no_numbers(distribution, key):
    """Of two equal matrices, a stack, and one whose factors are above the threshold."""
    tall = {"tall": (2**16, 3)} if distribution == pg.LowRank(1) else {}
    shapes = {"a": (400, 400), "b": (400, 400), "stack": (40, 50, 60)} | tall
    drawn = arrays(distribution, key, shapes)
    assert len(drawn) >= 2 * len(shapes)
    names = list(drawn)
    for i, name in enumerate(names):
        assert abs((drawn[name].astype(np.float64) ** 2).mean() - 1) < LIMIT * math.sqrt(
            2 / len(drawn[name])
        )
        for earlier in names[:i]:
            assert uncorrelated(drawn[name], drawn[earlier]), (name, earlier)


ALL = [
    pg.Normal(),
    pg.Rademacher(),
    pg.Sparse(0.3),
    pg.Sphere(),
    pg.Basis(),
    pg.Orthogonal(),
    *(pg.LowRank(r, f) for r in (1, 2) for f in (pg.Rademacher(), pg.Normal())),
    *(pg.Separable(r, f) for r in (1, 2) for f in (pg.Rademacher(), pg.Normal())),
]


def rank_two_normal(distribution):
    return distribution in (pg.LowRank(2, pg.Normal()), pg.LowRank(1), pg.Sphere())


@pytest.mark.parametrize(
    "distribution",
    [d if rank_two_normal(d) else pytest.param(d, marks=pytest.mark.long) for d in ALL],
    ids=repr,
)
def test_covariance_is_one_and_second_moment_the_closed_form(distribution, key):
    """E[v v^T] = I and E |(G . v) v|^2 = sum_l c_l |G_l|^2, for every distribution and rank.

    Notices an error of 6 % in one (10 % with normal factors), and of 2 % of the trace.
    """
    number = np.random.default_rng(3)
    shapes = {"matrix": (5, 6), "stack": (3, 3, 4), "vector": (3,)}
    params = {name: jnp.zeros(s) for name, s in shapes.items()}
    gradient = {name: number.normal(size=s) for name, s in shapes.items()}
    n = sum(math.prod(s) for s in shapes.values())

    @jax.jit
    @jax.vmap
    def draw(key):
        tangent = distribution.sample(key, params)
        leaves = jax.tree.leaves(
            jax.tree.map(
                lambda v: v.dense() if is_structured(v) else v, tangent, is_leaf=is_structured
            )
        )
        along = sum(jnp.sum(v * g) for v, g in zip(leaves, jax.tree.leaves(gradient), strict=True))
        return along, sum(jnp.sum(v**2) for v in leaves)

    heavy = "Normal" in repr(distribution) and hasattr(distribution, "rank")
    batches = 5 if heavy or distribution == pg.Basis() else 2
    if distribution == pg.Separable(1, pg.Normal()):  # products of three normal numbers
        batches = 12
    keys = jax.random.split(key, (batches, 40_000))
    along, squares = (
        np.concatenate(x).astype(np.float64) for x in zip(*map(draw, keys), strict=True)
    )
    size = sum(float((g**2).sum()) for g in gradient.values())
    if distribution in (pg.Rademacher(), pg.Sphere(), pg.Basis(), pg.Orthogonal()):
        np.testing.assert_allclose(squares, n, rtol=1e-5)  # of one length, not in the mean alone
    else:
        assert_mean(squares / n, 1.0, effect=0.02)
    assert_mean(along**2 / size, 1.0, effect=0.1)
    moments = distribution.second_moment(params)
    expected = sum(moments[name] * float((g**2).sum()) for name, g in gradient.items())
    assert_mean(along**2 * squares / expected, 1.0, effect=0.1 if heavy else 0.06)


# three points with the moments of a normal number up to the fifth, two with those of a sign
POINTS = {
    pg.Normal(): ([-(3**0.5), 0.0, 3**0.5], [1 / 6, 2 / 3, 1 / 6]),
    pg.Rademacher(): ([-1.0, 1.0], [0.5, 0.5]),
}


@pytest.mark.parametrize("factors", POINTS, ids=repr)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("family", "shape"), [(pg.LowRank, (8, 9)), (pg.LowRank, (2, 4, 9)), (pg.Separable, (4, 5, 8))]
)
def test_second_moment_of_factors_is_exact(family, shape, rank, factors):
    """E |(G . v) v|^2 by enumeration, for v of rank 1, and by independence for a sum of r of them.

    The points go through the entries of the factors; G is a product itself, and so are all sums.
    """
    number = np.random.default_rng(1)
    distribution = family(rank, factors)
    sizes = distribution._group_sizes(shape)
    parts = [number.normal(size=n) for n in sizes]  # G is the product of these
    points, weights = POINTS[factors]
    product = {"square": 1.0, "fourth": 1.0, "size": 1.0}
    for (
        g
    ) in parts:  # moments of (g . a)^2, (g . a)^2 |a|^2 and |a|^2 over the entries of one factor
        grid = np.stack(np.meshgrid(*[points] * 4, indexing="ij"), -1).reshape(-1, 4)
        p = np.prod(np.stack(np.meshgrid(*[weights] * 4, indexing="ij"), -1).reshape(-1, 4), -1)
        fourth = 0.0
        for i in range(len(g)):  # E (g . a)^2 a_i^2, by the four entries that can matter at a time
            square = p @ (grid[:, 0] ** 4)
            fourth += g[i] ** 2 * square + (g @ g - g[i] ** 2) * (
                p @ (grid[:, 0] ** 2 * grid[:, 1] ** 2)
            )
        product["square"] *= g @ g
        product["fourth"] *= fourth
        product["size"] *= len(g)
    size, n = product["square"], product["size"]
    # (x_1 + .. + x_r)^2 |v_1 + .. + v_r|^2 / r^2 for independent v_s with mean zero, x_s = G . v_s
    same, pairs = rank * product["fourth"], rank * (rank - 1)
    expected = (same + pairs * size * n + 2 * pairs * size) / rank**2
    found = distribution.second_moment(jnp.zeros(shape)) * size
    np.testing.assert_allclose(found, expected, rtol=1e-12)
