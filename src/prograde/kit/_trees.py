"""Trees of parameters: their float arrays, the dtype of sums, and what is no array."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


class _Static(eqx.Module):
    """A value that JAX transformations carry as part of the tree's structure."""

    value: Any = eqx.field(static=True)


def pack(tree: PyTree) -> tuple[PyTree, _Static]:
    """Splits a tree into its arrays and the rest, both safe to return from transformed functions.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde.kit import pack, unpack
        >>> of = lambda x: pack({"loss": 2 * x, "name": "mlp"})    # jit refuses to return a string
        >>> unpack(jax.jit(of)(3))["name"]
        'mlp'
    """
    arrays, rest = eqx.partition(tree, lambda x: isinstance(x, jax.Array | np.ndarray | np.generic))
    leaves, treedef = jax.tree.flatten(rest)
    return arrays, _Static((tuple(leaves), treedef))


def unpack(packed: tuple[PyTree, _Static]) -> PyTree:
    """The tree that `pack` split.

    Examples:
        >>> from prograde.kit import pack, unpack
        >>> unpack(pack([1, "two", None]))
        [1, 'two', None]
    """
    arrays, static = packed
    leaves, treedef = static.value
    return eqx.combine(arrays, treedef.unflatten(leaves))


def wide_dtype(dtype: Any) -> Any:
    """The dtype of directional derivatives and sums of tangents: float32, or float64 for float64.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import wide_dtype
        >>> wide_dtype(jnp.bfloat16).__name__
        'float32'
    """
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def wide(x: Array) -> Array:
    """`x` in the dtype of directional derivatives, `wide_dtype`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import wide
        >>> print(wide(jnp.ones((), jnp.bfloat16)).dtype)
        float32
    """
    return x.astype(wide_dtype(x.dtype))


def wide_zeros(floats: PyTree[Array]) -> PyTree[Array]:
    """Zeros of the shapes of `floats` in `wide_dtype`: a sum of tangents starts with them.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import wide_zeros
        >>> zeros = wide_zeros({"w": jnp.ones((2, 3), jnp.bfloat16)})
        >>> print(zeros["w"].shape, zeros["w"].dtype)
        (2, 3) float32
    """
    return jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w.dtype)), floats)


def _partitioned(params: PyTree) -> tuple[PyTree[Array], PyTree]:
    params = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, params
    )
    return eqx.partition(params, eqx.is_inexact_array)


def float_leaves(params: PyTree) -> PyTree[Array]:
    """The float arrays of `params`, and `None` in place of everything else.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import float_leaves
        >>> float_leaves({"w": jnp.ones(2), "steps": 3, "act": jnp.tanh})
        {'act': None, 'steps': None, 'w': Array([1., 1.], dtype=float32)}
    """
    return _partitioned(params)[0]


def checked_floats(params: PyTree) -> tuple[PyTree[Array], PyTree]:
    """(floats, rest): the float arrays of `params`, real and at least one, and everything else.

    **Errors:** `ValueError` without any float array, `TypeError` for a complex one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from prograde.kit import checked_floats
        >>> floats, rest = checked_floats({"w": jnp.ones(2), "steps": 3})
        >>> rest
        {'steps': 3, 'w': None}
    """
    floats, rest = _partitioned(params)
    leaves = jax.tree_util.tree_leaves_with_path(floats)
    if not leaves:
        raise ValueError(
            "params has no floating-point array among its leaves, so there is nothing to "
            "differentiate. Pass arrays such as jnp.asarray(1.0); Python floats are constants."
        )
    for path, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, but estimators work "
                "on real parameters. Keep the real and imaginary parts as two leaves and join "
                "them inside the function."
            )
    return floats, rest
