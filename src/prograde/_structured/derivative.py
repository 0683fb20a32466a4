"""A forward run along a tree of tangents, and the sum of weighted tangents."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jaxtyping import Array, Float, PyTree

from prograde._custom_vjp import named
from prograde._inject import inject, wider
from prograde._structured.tangent import LowRankTangent, PerturbedArray, Recorder, perturb

Tangent = Array | LowRankTangent


def is_structured(x: Any) -> bool:
    """Whether a leaf of a tree of tangents is kept as factors."""
    return isinstance(x, LowRankTangent)


def directional_derivative(
    fun: Callable[[PyTree], tuple[PyTree[Array], PyTree]],
    params: PyTree[Array],
    tangents: PyTree[Tangent],
    recorders: PyTree[Recorder] | None = None,
) -> tuple[Any, Any, PyTree]:
    """(fun, grad fun . v, aux) at `params` along `tangents`, in one forward run. `fun` returns (value, aux), trees of arrays."""
    if recorders is None:
        recorders = jax.tree.map(lambda _: None, params)

    def along(s: Array) -> tuple[PyTree[Array], PyTree]:
        perturbed = jax.tree.map(
            lambda v, w, r: perturb(v, w, s, r) if is_structured(v) else inject(s, w, v),
            tangents,
            params,
            recorders,
            is_leaf=is_structured,
        )
        out: Any = quax.quaxify(fun)(perturbed)
        value, aux = out
        # a parameter that is returned as it came in comes out as a Quax value
        is_value = lambda x: isinstance(x, PerturbedArray)  # noqa: E731
        aux = jax.tree.map(lambda x: x.weight if is_value(x) else x, aux, is_leaf=is_value)
        return jax.tree.map(
            lambda x: x.materialise() if is_value(x) else x, value, is_leaf=is_value
        ), aux

    try:
        return jax.jvp(along, (jnp.zeros(()),), (jnp.ones(()),), has_aux=True)
    except TypeError as error:
        raise named(error, fun, params) from None


def weighted_sum(tangents: PyTree[Tangent], coefficients: Float[Array, " k"]) -> PyTree[Array]:
    """sum_k c_k v_k for tangents with a leading axis k, in float32, or float64 where one of them is."""

    def leaf(v: Tangent) -> Array:
        dtype = v.factors[0].dtype if isinstance(v, LowRankTangent) else v.dtype
        c = coefficients.astype(
            jnp.float64 if jnp.float64 in (coefficients.dtype, dtype) else jnp.float32
        )
        if isinstance(v, LowRankTangent):
            return v.weighted_sum(c)
        return jnp.sum(c.reshape((-1,) + (1,) * (v.ndim - 1)) * v.astype(c.dtype), axis=0)

    return jax.tree.map(leaf, tangents, is_leaf=is_structured)


def inner_products(tangents: PyTree[Tangent]) -> Float[Array, "k k"]:
    """<v_j, v_k> for tangents with a leading axis k, in float32, or float64 where one of them is."""

    def leaf(v: Tangent) -> Array:
        if isinstance(v, LowRankTangent):
            return v.inner_products()
        along = tuple(
            range(1, v.ndim)
        )  # not reshaped: what is sharded over devices would have to be gathered
        return jnp.tensordot(
            v, v, (along, along), preferred_element_type=wider(v.dtype, jnp.float32)
        )

    parts = jax.tree.leaves(jax.tree.map(leaf, tangents, is_leaf=is_structured))
    dtype = jnp.float64 if any(part.dtype == jnp.float64 for part in parts) else jnp.float32
    return functools.reduce(operator.add, (part.astype(dtype) for part in parts))


def inner_products_with(tree: PyTree[Array], tangents: PyTree[Tangent]) -> Float[Array, " k"]:
    """<tree, v_k> for tangents with a leading axis k, in float32, or float64 where one of them is."""

    def leaf(v: Tangent, x: Array) -> Array:
        dense = jax.vmap(LowRankTangent.dense)(v) if isinstance(v, LowRankTangent) else v
        dtype = jnp.float64 if jnp.float64 in (x.dtype, dense.dtype) else jnp.float32
        return jnp.sum((dense.astype(dtype) * x.astype(dtype)).reshape(len(dense), -1), axis=1)

    parts = jax.tree.leaves(jax.tree.map(leaf, tangents, tree, is_leaf=is_structured))
    dtype = jnp.float64 if any(part.dtype == jnp.float64 for part in parts) else jnp.float32
    return functools.reduce(operator.add, (part.astype(dtype) for part in parts))


def projected(tangents: PyTree[Tangent], directional: Float[Array, " k"]) -> Float[Array, " k"]:
    """(V^T V)^+ d: the weights of the tangents in the projection of the gradient onto their span."""
    gram = inner_products(tangents).astype(directional.dtype)
    # of tangents of length 1, so that what is kept does not hang on how long a guess is beside a random direction
    length = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    gram, directional = gram * scale[:, None] * scale[None, :], directional * scale
    values, vectors = jnp.linalg.eigh(gram)
    # an eigenvalue at the rounding of the largest is that of a dependent tangent
    kept = values > values[-1] * len(gram) * 8 * jnp.finfo(gram.dtype).eps
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return scale * (vectors @ (inverse * (vectors.T @ directional)))
