"""Tangents whose entries depend on each other, or that depend on the other tangents."""

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from prograde._inject import wider
from prograde._structured import count
from prograde.tangents._distribution import TangentDistribution
from prograde.tangents._draw import threefry
from prograde.tangents.independent import Normal


@dataclass(frozen=True)
class Sphere(TangentDistribution):
    """Uniform on the sphere of radius sqrt(n) in the space of all n parameters together.

    **Second moment:** E |g|^2 = n |grad f|^2.

    **Cost:** one normal number per parameter and tangent, and one pass over them for the norm.

    **Source:** arXiv 2310.14168 compares it with `Normal`; it is the direction of randomised
    gradient-free methods.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import Sphere
        >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(4)}
        >>> tangent = Sphere().sample(jax.random.key(0), params)
        >>> norm_squared = sum(jnp.sum(leaf ** 2) for leaf in jax.tree.leaves(tangent))
        >>> f"{norm_squared:.4f}"
        '10.0000'
    """

    def sample(self, key, params, index=0, num_tangents=1):
        normal = Normal().sample(key, params, index, num_tangents)
        squares = [jnp.sum(jnp.square(v.astype(jnp.float32))) for v in jax.tree.leaves(normal)]
        scale = jnp.sqrt(count(params) / sum(squares))
        return jax.tree.map(lambda v: v * scale.astype(v.dtype), normal)

    def second_moment(self, params):
        return jax.tree.map(lambda _: count(params), params)


@dataclass(frozen=True)
class Basis(TangentDistribution):
    """Coordinate directions sqrt(n) e_i. The tangents of one estimate are all different.

    With as many tangents as parameters the estimate is the exact gradient.

    **Second moment:** E |g|^2 = n |grad f|^2 for one tangent, and (n / K) |grad f|^2 for the mean
    of K <= n of them.

    **Cost:** drawing K tangents sorts n numbers, so this is a tool for small models and for tests.

    **Errors:** `ValueError` for more tangents than parameters.

    **Source:** randomised coordinate descent; the full basis is forward-mode differentiation of
    arXiv 2202.08587, section 2.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator = pg.WeightPerturbation(pg.Basis(), num_tangents=3)
        >>> grad_fn = pg.value_and_grad(lambda w: jnp.sum(w ** 2), estimator)
        >>> value, grads = grad_fn(jax.random.key(0), jnp.array([1.0, 2.0, 3.0]))
        >>> print(value, grads.round(4))
        14.0 [2. 4. 6.]
    """

    def sample(self, key, params, index=0, num_tangents=1):
        leaves, treedef = jax.tree.flatten(params)
        n = count(params)
        if num_tangents > n:
            raise ValueError(
                f"num_tangents={num_tangents}, but Basis has one tangent per parameter and the "
                f"parameters hold {n}. Use num_tangents <= {n}."
            )
        chosen = jax.random.permutation(jax.random.fold_in(threefry(key), 0), n)[index]
        tangents, start = [], 0
        for w in leaves:
            position = jnp.arange(start, start + w.size).reshape(w.shape)
            tangents.append(jnp.where(position == chosen, math.sqrt(n), 0.0).astype(w.dtype))
            start += w.size
        return treedef.unflatten(tangents)

    def second_moment(self, params):
        return jax.tree.map(lambda _: count(params), params)

    def second_moment_of_mean(self, params, num_tangents):
        return jax.tree.map(lambda _: count(params) / num_tangents, params)


@dataclass(frozen=True)
class Orthogonal(TangentDistribution):
    """Tangents at right angles to each other, each uniform on the sphere of radius sqrt(n).

    The mean over K of them is n/K times the projection of the gradient onto a uniformly random
    subspace of dimension K.

    **Second moment:** E |g|^2 = n |grad f|^2 for one tangent, and (n / K) |grad f|^2 for the mean
    of K <= n of them, a little less than the 1 + (n - 1) / K of independent ones. At K = n the
    estimate is the gradient, and nothing is random.

    **Cost:** K normal numbers per parameter and a QR decomposition, about 2 n K^2 multiply-adds.
    All K tangents are held at once: for small models.

    **Errors:** `ValueError` for more tangents than parameters.

    **Source:** orthogonal random directions are those of structured evolution strategies, arXiv
    1804.02395.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> estimator = pg.WeightPerturbation(pg.Orthogonal(), num_tangents=3)
        >>> grad_fn = pg.value_and_grad(lambda w: jnp.sum(w ** 2), estimator)
        >>> value, grads = grad_fn(jax.random.key(0), jnp.array([1.0, 2.0, 3.0]))
        >>> print(value, grads.round(4))
        14.0 [2. 4. 6.]
    """

    def sample(self, key, params, index=0, num_tangents=1):
        leaves, treedef = jax.tree.flatten(params)
        n = count(params)
        if num_tangents > n:
            raise ValueError(
                f"num_tangents={num_tangents}, but at most n tangents can be at right angles, and "
                f"the parameters hold n={n}. Use num_tangents <= {n}."
            )
        dtype = wider(jnp.float32, *(w.dtype for w in leaves))
        # this does not depend on the index, so that under `vmap` over tangents it is computed once
        normal = jax.random.normal(jax.random.fold_in(threefry(key), 0), (n, num_tangents), dtype)
        q, r = jnp.linalg.qr(normal)
        # without the signs q is not uniform
        direction = math.sqrt(n) * (q * jnp.sign(jnp.diagonal(r)))[:, index]
        ends = list(itertools.accumulate(w.size for w in leaves))
        parts = jnp.split(direction, ends[:-1])
        return treedef.unflatten(
            [v.reshape(w.shape).astype(w.dtype) for v, w in zip(parts, leaves, strict=True)]
        )

    def second_moment(self, params):
        return jax.tree.map(lambda _: count(params), params)

    def second_moment_of_mean(self, params, num_tangents):
        return jax.tree.map(lambda _: count(params) / num_tangents, params)
