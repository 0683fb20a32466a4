"""The exact gradient by forward mode."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from prograde._structured import coordinate_tangent, count, from_coordinates
from prograde.kit import Estimator, Loss, check_choice, check_whole, in_chunks, tangents_at_once

# Few parameters stand behind large results: their tangents must not take far more than the
# function.
_LEAST_BYTES = 2**25


@dataclass(frozen=True)
class ForwardJacobian(Estimator):
    """The exact gradient, by one directional derivative for each parameter: for few parameters.

        g_i = grad f . e_i        i = 1 .. n

    It works where reverse mode does not: through loops of unknown length, and through long ones at
    constant memory. The key is not used and may be `None`.

    **Arguments:**

    - `chunk`: the number of tangents, of all n, that run through the function together. `None`
      takes as many as need no more memory than the parameters, or than the run without tangents (at
      least 32 MiB, at most 256 MiB). A loop that saves its outputs for a loss that follows
      holds them for each tangent: put the loss into the loop where you can.
    - `custom_vjp`: as in `WeightPerturbation`.

    **Bias and variance:** none.

    **Cost:** n tangents: about 1 + n forward runs' worth of multiply-adds, in n / chunk runs. For
    functions whose operations are small, n tangents in one chunk cost little more than one. The
    tangent of one entry of a matrix is kept as factors, and not multiplied as a matrix. Nothing is
    stored for a reverse pass.

    **Errors:** `ValueError` for a `chunk` below 1 or another `custom_vjp`; `TypeError` for complex
    parameters, a loss that is not real, or a function that forward mode cannot pass; all at trace
    time.

    **Source:** forward accumulation, as `jax.jacfwd` does it; arXiv 2202.08587, section 2.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> from jax import lax
        >>> def newton_sqrt(a):                 # iterates until it has converged: jax.grad refuses
        ...     far = lambda x: jnp.abs(x * x - a) > 1e-5
        ...     return lax.while_loop(far, lambda x: (x + a / x) / 2, a)
        >>> grad_fn = pg.value_and_grad(newton_sqrt, pg.ForwardJacobian())
        >>> value, grads = grad_fn(None, jnp.array(4.0))
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
        loss = Loss(fun, params, args, has_aux, self.custom_vjp)
        n = count(loss.floats)
        if n == 0:  # all leaves are empty
            losses, aux = loss(loss.floats)
            nothing = jnp.zeros((0, *losses.shape))
            return loss.estimate(jnp.mean(losses), loss.floats, nothing, aux, state)

        def along_entries(indices):
            along = lambda index: loss.along(coordinate_tangent(index, loss.floats))  # noqa: E731
            value, directional, aux = jax.vmap(along)(indices)
            # all tangents have the same primal
            return *jax.tree.map(lambda x: x[0], (value, aux)), directional

        def chunk(_, indices):  # padding: tangents of zeros
            value, aux, directional = along_entries(indices)
            return None, (value, aux), directional

        size = tangents_at_once(self.chunk, n, loss, loss.floats, along_entries, _LEAST_BYTES)
        _, (value, aux), directional = in_chunks(chunk, None, n, size)
        grads = from_coordinates(jnp.mean(directional.reshape(n, -1), axis=1), loss.floats)
        return loss.estimate(value, grads, directional, aux, state)
