"""The exact gradient by forward mode."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from prograde._custom_vjp import inline_custom_vjp
from prograde._structured import coordinate_tangent, count, directional_derivative, from_coordinates
from prograde.estimators._chunks import tangents_at_once
from prograde.estimators._estimator import (
    Estimate,
    Estimator,
    check_choice,
    check_whole,
    split_params,
    unpack,
    wide,
)


@dataclass(frozen=True)
class ForwardJacobian(Estimator):
    """The exact gradient, one directional derivative for each parameter: the right tool for few parameters.

        g_i = grad f . e_i        i = 1 .. n

    It goes where reverse mode does not: through loops of unknown length, and through long ones at constant memory. The key
    is not used and may be `None`.

    **Arguments:**

    - `chunk`: how many of the n tangents are carried through the function together; when `None`, as many as fit into the
      memory of the parameters, or into 256 MiB where that is more.
    - `custom_vjp`: as in `WeightPerturbation`.

    **Bias and variance:** none.

    **Cost:** n tangents: about 1 + n forward runs' worth of multiply-adds, in n / chunk runs; for functions whose operations
    are small, n tangents in one chunk cost little more than one. The tangent of one entry of a matrix is kept as factors, and
    not multiplied as a matrix. Nothing is stored for a reverse pass.

    **Errors:** `ValueError` for a `chunk` below 1 or another `custom_vjp`; `TypeError` for complex parameters, a loss that is not
    real, or a function that forward mode cannot pass; all at trace time.

    **Source:** forward accumulation, as `jax.jacfwd` does it; arXiv 2202.08587, section 2.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> from jax import lax
        >>> def newton_sqrt(a):                 # iterates until it has converged: jax.grad refuses
        ...     return lax.while_loop(lambda x: jnp.abs(x * x - a) > 1e-5, lambda x: (x + a / x) / 2, a)
        >>> value, grads = pg.value_and_grad(newton_sqrt, pg.ForwardJacobian())(None, jnp.array(4.0))
        >>> print(value.round(3), grads.round(3))
        2.0 0.25
    """

    chunk: int | None = None
    custom_vjp: Literal["error", "inline"] = "error"

    def __post_init__(self):
        if self.chunk is not None:
            check_whole("chunk", self.chunk)
        check_choice("custom_vjp", self.custom_vjp, ("error", "inline"))

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        del key
        f, floats = split_params(fun, params, args, has_aux)
        f = inline_custom_vjp(f) if self.custom_vjp == "inline" else f
        n = count(floats)

        def derivative(index):
            value, directional, aux = directional_derivative(
                f, floats, coordinate_tangent(index, floats)
            )
            return value, aux, wide(directional)

        def of_chunk(indices):
            value, aux, directional = jax.vmap(derivative)(indices)
            value, aux = jax.tree.map(
                lambda x: x[0], (value, aux)
            )  # the primal is the same for all of them
            return value, aux, directional

        # the run along the first chunk is also the one that gives the value
        chunk = tangents_at_once(self.chunk, n, f, floats, of_chunk)
        chunks = jnp.arange(-(-n // chunk) * chunk, dtype=jnp.int32).reshape(
            -1, chunk
        )  # over n: tangents of zeros
        value, aux, directional = of_chunk(chunks[0])
        if len(chunks) > 1:
            rest = lax.map(lambda indices: of_chunk(indices)[2], chunks[1:])
            directional = jnp.concatenate([directional, rest.reshape(-1, *rest.shape[2:])])[:n]
        grads = from_coordinates(jnp.mean(directional.reshape(n, -1), axis=1), floats)
        return Estimate(jnp.mean(value), unpack(aux), grads, directional, state)
