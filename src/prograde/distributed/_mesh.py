"""Meshes, and what is an array, for the parts of `prograde.distributed`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array

Axes = str | Sequence[str] | None


def axis_names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def of_the_compiler(mesh: Mesh) -> Mesh:
    """The mesh with axes of the type for which the compiler decides how what follows from gathered numbers is laid out."""
    types = tuple(AxisType.Auto if t == AxisType.Explicit else t for t in mesh.axis_types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def laid_out_as(gradient: Array, weight: Array) -> Array:
    """The gradient, sharded as the weight is."""
    sharding = jax.typeof(weight).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(gradient, sharding)
    # the compiler knows the layout of the weight, and hands it on through an elementwise operation; NaN stays NaN
    return jnp.where(jnp.isnan(weight), weight.astype(gradient.dtype), gradient)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)
