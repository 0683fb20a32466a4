"""A forward run along a tree of tangents, and the sum of weighted tangents."""

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from prograde import _findings
from prograde._inject import inject, wider
from prograde._jaxprs import traced
from prograde._structured.interpreter import dense, run
from prograde._structured.tangent import LowRankTangent, PerturbedArray, Recorder, perturb

Tangent = Array | LowRankTangent


def is_structured(x: Any) -> bool:
    """True for a leaf of a tree of tangents that is kept as factors.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> from prograde.kit import is_structured
        >>> params = {"w": jnp.zeros((6, 5)), "b": jnp.zeros(5)}
        >>> tangent = pg.LowRank().sample(jax.random.key(0), params)
        >>> is_structured(tangent["w"]), is_structured(tangent["b"])
        (True, False)
    """
    return isinstance(x, LowRankTangent)


# what JAX raises where a Python `if`, `int()` or index needs the value of what is differentiated
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def directional_derivative(
    fun: Callable[[PyTree], tuple[PyTree[Array], PyTree]],
    params: PyTree[Array],
    tangents: PyTree[Tangent],
) -> tuple[Any, Any, PyTree]:
    """(fun, grad fun . v, aux) at `params` along `tangents`, in one forward run.

    `fun` returns (value, aux), trees of arrays. It is traced once, and the program is run on
    weights that carry their tangents. A function that Python decides on by the values of its
    parameters cannot be traced: there all tangents are formed.
    """
    leaves, tree = jax.tree.flatten(params)
    tangents = jax.tree.leaves(tangents, is_leaf=is_structured)
    primals, units = (jnp.zeros(()),), (jnp.ones(()),)
    with recorded(params) as recorders:
        try:
            program, rebuilt = traced(fun, params)
        except NEEDS_VALUES:

            def formed(s: Array) -> tuple[PyTree[Array], PyTree]:
                weights = _perturbed(
                    leaves, tangents, s, recorders, "Python code that needs its value"
                )
                return fun(jax.tree.unflatten(tree, [dense(w) for w in weights]))

            return jax.jvp(formed, primals, units, has_aux=True)

        def along(s: Array) -> tuple[PyTree[Array], PyTree]:
            value, aux = rebuilt(run(program, _perturbed(leaves, tangents, s, recorders)))
            is_weight = lambda x: isinstance(x, PerturbedArray)  # noqa: E731
            # auxiliary output is not perturbed
            aux = jax.tree.map(lambda x: x.weight if is_weight(x) else x, aux, is_leaf=is_weight)
            return jax.tree.map(dense, value, is_leaf=is_weight), aux

        return jax.jvp(along, primals, units, has_aux=True)


@contextmanager
def recorded(params: PyTree) -> Iterator[list[Recorder | None]]:
    """A recorder for each parameter where `check` is watching.

    Which is told afterwards what they recorded.
    """
    findings = _findings.current()
    paths = jax.tree_util.tree_leaves_with_path(params)
    if findings is None:
        yield [None] * len(paths)
        return
    recorders = [Recorder() for _ in paths]
    yield list(recorders)
    for (path, _), recorder in zip(paths, recorders, strict=True):
        name = f"params{jax.tree_util.keystr(path)}"
        findings.dense.update(((name, place), None) for place in recorder.formed)


def _perturbed(
    leaves: list[Array],
    tangents: list[Tangent],
    s: Array,
    recorders: list[Recorder | None],
    primitive: str = "",
) -> list[Any]:
    for recorder in recorders:
        if recorder is not None:
            recorder.primitive = primitive
    return [
        perturb(v, w, s, r) if isinstance(v, LowRankTangent) else inject(s, w, v)
        for v, w, r in zip(tangents, leaves, recorders, strict=True)
    ]


def weighted_sum(tangents: PyTree[Tangent], coefficients: Float[Array, " k"]) -> PyTree[Array]:
    """sum_k c_k v_k for tangents with a leading axis k, in float32, or in float64 for float64.

    Structured tangents are not formed before the sum is.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import weighted_sum
        >>> tangents = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}                  # v_0 and v_1
        >>> print(weighted_sum(tangents, jnp.array([3.0, 5.0]))["w"])
        [ 3. 10.]
    """

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
    """<v_j, v_k> for tangents with a leading axis k, in float32, or in float64 for float64.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import inner_products
        >>> print(inner_products({"w": jnp.array([[1.0, 0.0], [3.0, 2.0]])}))
        [[ 1.  3.]
         [ 3. 13.]]
    """

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
    """<tree, v_k> for tangents with a leading axis k, in float32, or in float64 for float64.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import inner_products_with
        >>> tangents = jnp.array([[1.0, 0.0], [3.0, 2.0]])
        >>> print(inner_products_with(jnp.array([10.0, 1.0]), tangents))
        [10. 32.]
    """

    def leaf(v: Tangent, x: Array) -> Array:
        dense = jax.vmap(LowRankTangent.dense)(v) if isinstance(v, LowRankTangent) else v
        dtype = jnp.float64 if jnp.float64 in (x.dtype, dense.dtype) else jnp.float32
        return jnp.sum((dense.astype(dtype) * x.astype(dtype)).reshape(len(dense), -1), axis=1)

    parts = jax.tree.leaves(jax.tree.map(leaf, tangents, tree, is_leaf=is_structured))
    dtype = jnp.float64 if any(part.dtype == jnp.float64 for part in parts) else jnp.float32
    return functools.reduce(operator.add, (part.astype(dtype) for part in parts))


def projected(tangents: PyTree[Tangent], directional: Float[Array, " k"]) -> Float[Array, " k"]:
    """(V^T V)^+ d: the weights of the tangents in the projection of the gradient onto their span.

    The tangents are the columns of V, and d = V^T grad f are the directional derivatives.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import projected, weighted_sum
        >>> tangents = jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
        >>> gradient = jnp.array([3.0, 4.0, 5.0])
        >>> weights = projected(tangents, tangents @ gradient)
        >>> print(jnp.rint(weighted_sum(tangents, weights)))
        [3. 4. 0.]
    """
    gram = inner_products(tangents).astype(directional.dtype)
    # of tangents of length 1, so that what is kept does not hang on how long a guess is beside a
    # random direction
    length = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    gram, directional = gram * scale[:, None] * scale[None, :], directional * scale
    values, vectors = jnp.linalg.eigh(gram)
    # an eigenvalue at the rounding of the largest is that of a dependent tangent
    kept = values > values[-1] * len(gram) * 8 * jnp.finfo(gram.dtype).eps
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return scale * (vectors @ (inverse * (vectors.T @ directional)))
