"""Reverse mode, as a reference."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from prograde.estimators._estimator import Estimate, Estimator, split_params, unpack


@dataclass(frozen=True)
class Backprop(Estimator):
    """The exact gradient by reverse-mode differentiation, through `jax.grad`: the reference.

    It needs the function to be reversible and stores its activations. The key is not used and may be `None`.

    **Bias and variance:** none.

    **Cost:** typically 2.5 to 4 forward passes, and memory for every activation.

    **Errors:** as `jax.grad`; a loss that is neither a scalar nor a vector of per-example losses is refused.

    **Source:** reverse accumulation, as `jax.grad` does it.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> value, grads = pg.value_and_grad(lambda w: jnp.sum(w ** 2), pg.Backprop())(None, jnp.array([1.0, 2.0]))
        >>> print(value, grads)
        5.0 [2. 4.]
    """

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        del key
        f, floats = split_params(fun, params, args, has_aux)

        def mean_loss(floats):
            loss, aux = f(floats)
            return jnp.mean(loss), aux

        (value, aux), grads = jax.value_and_grad(mean_loss, has_aux=True)(floats)
        return Estimate(value, unpack(aux), grads, None, state)
