"""The one place where a perturbation enters a program."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inject(direction, s, z, operands):
    return z


def _inject_jvp(direction, primals, tangents):
    _, z, operands = primals
    sdot, zdot, _ = tangents
    if isinstance(sdot, SymbolicZero):
        return z, zdot
    along = direction(*operands)
    dtype = wider(sdot.dtype, along.dtype)
    along = varying_like((sdot.astype(dtype) * along.astype(dtype)).astype(z.dtype), z)
    return z, along if isinstance(zdot, SymbolicZero) else zdot + along


_inject.defjvp(_inject_jvp, symbolic_zeros=True)


def wider(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype that holds all the others, for any promotion mode of the caller."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def varying_like(x: Array, *others: Array | ShapedArray) -> Array:
    """`x`, cast to vary along the same axes of a `shard_map` as the others. Outside one, `x`."""

    def axes(value: Array | ShapedArray) -> frozenset[str]:
        aval = value if isinstance(value, ShapedArray) else jax.typeof(value)
        return aval.manual_axis_type.varying if isinstance(aval, ShapedArray) else frozenset()

    wanted = frozenset().union(*map(axes, others)) - axes(x)
    return lax.pcast(x, tuple(wanted), to="varying") if wanted else x


def inject_product(s: Array, z: Array, direction: Callable[..., Array], *operands: Array) -> Array:
    """`inject` with the direction as a function of operands, evaluated only for a tangent.

    The derivative of the direction is never traced.
    """
    return _inject(direction, s, z, operands)


def inject(
    s: Float[Array, ""], z: Float[Array, "*shape"], direction: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The identity on `z`, whose derivative with respect to the scalar `s` is `direction`.

    Differentiate a program in forward mode with respect to `s` alone. What was injected, anywhere
    in the program, becomes the perturbation, and the tangent of the loss is its exact directional
    derivative. An estimator decides which values to perturb, and with which direction.

        inject(s, z, direction) = z            d inject = dz + ds * direction

    **Arguments:**

    - `s`: the scalar that the program is differentiated by. Its value is not used.
    - `z`: the value to perturb, of any shape and a real floating dtype.
    - `direction`: the perturbation, of the shape of `z`. As s is 0, the change of the direction has
      no part in the derivative by s.

    **Returns:** `z`, unchanged.

    **Errors:** `ValueError` for a direction of another shape.

    **Cost:** nothing in the primal; one multiply-add per element of `z` in the tangent.

    **Source:** the rule is the sum rule of forward mode, as in "Gradients without Backpropagation"
    (arXiv 2202.08587).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from prograde import inject
        >>> weight, tangent = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])
        >>> loss = lambda s: jnp.sum(inject(s, weight, tangent) ** 2)
        >>> value, directional = jax.jvp(loss, (0.0,), (1.0,))
        >>> float(value), float(directional)          # |w|^2  and  2 w . v
        (5.0, 2.0)
    """
    if jnp.shape(direction) != jnp.shape(z):
        raise ValueError(
            f"direction has shape {jnp.shape(direction)}, but the value it perturbs, z, has shape "
            f"{jnp.shape(z)}. Give it the shape of z."
        )
    return inject_product(jnp.asarray(s), z, _itself, jnp.asarray(direction))


def _itself(direction: Array) -> Array:
    return direction
