"""The one place where a perturbation enters a program."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def _inject(s, z, direction):
    return z


@_inject.defjvp
def _inject_jvp(primals, tangents):
    _, z, direction = primals
    sdot, zdot, _ = tangents
    return z, zdot + (sdot * direction.astype(sdot.dtype)).astype(z.dtype)


def inject(s: Float[Array, ""], z: Float[Array, "*shape"], direction: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The identity on `z`, whose derivative with respect to the scalar `s` is `direction`.

    Differentiate a program in forward mode with respect to `s` alone, and whatever was injected, anywhere in the
    program, becomes the perturbation: the tangent of the loss is its exact directional derivative. Every estimator
    of this package is a choice of where to inject what.

        inject(s, z, direction) = z            d inject = dz + ds * direction

    **Arguments:**

    - `s`: the scalar that the program is differentiated by. Its value is not used, only its tangent.
    - `z`: the value to perturb, of any shape and a real floating dtype.
    - `direction`: the perturbation, of the shape of `z`. As s is 0, the change of
      the direction itself has no part in the derivative by s.

    **Returns:** `z`, unchanged.

    **Errors:** `ValueError` for a direction of another shape.

    **Cost:** nothing in the primal; one multiply-add per element of `z` in the tangent.

    **Source:** the rule is the sum rule of forward mode, as in "Gradients without Backpropagation" (arXiv 2202.08587).

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
            f"direction has shape {jnp.shape(direction)}, but the value it perturbs, z, has shape {jnp.shape(z)}. "
            "Give it the shape of z."
        )
    return _inject(jnp.asarray(s), z, direction)
