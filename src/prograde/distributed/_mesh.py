"""Meshes and kinds of arrays, for the parts of `prograde.distributed`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array

Axes = str | Sequence[str] | None


def check_mesh(mesh: Any) -> None:
    """Raises unless this is a mesh of devices."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh={mesh!r}, but a jax.sharding.Mesh is needed, such as "
            "jax.make_mesh((jax.device_count(),), ('workers',))."
        )


def checked_axes(mesh: Mesh, name: str, axes: Any) -> tuple[str, ...]:
    """The names of axes; raises unless they are axes of the mesh, each once."""
    texts = isinstance(axes, str | None) or (
        isinstance(axes, Sequence) and all(isinstance(axis, str) for axis in axes)
    )
    if not texts:
        raise TypeError(
            f"{name}={axes!r}, but the name of an axis of the mesh, a tuple of names, or None is "
            "needed."
        )
    names = axis_names(axes)
    if unknown := [axis for axis in names if axis not in mesh.axis_names]:
        raise ValueError(
            f"{name}={axes!r}, but axes {unknown} are not among those of the mesh, "
            f"{list(mesh.axis_names)}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{name}={axes!r} names an axis twice.")
    return names


def axis_names(axes: Axes) -> tuple[str, ...]:
    """The names of axes, as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def of_the_compiler(mesh: Mesh) -> Mesh:
    """The mesh with axes for which the compiler chooses the layout of results."""
    types = tuple(AxisType.Auto if t == AxisType.Explicit else t for t in mesh.axis_types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def laid_out_as(gradient: Array, weight: Array) -> Array:
    """The gradient, sharded like the weight."""
    sharding = jax.typeof(weight).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(gradient, sharding)
    # an elementwise operation takes over the layout of the weight; NaN stays NaN
    return jnp.where(jnp.isnan(weight), weight.astype(gradient.dtype), gradient)


def is_key(x: Any) -> bool:
    """Whether an array holds typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array of JAX or NumPy."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)
