"""Reverse mode, as the reference: plain, and with checkpoints."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from prograde._checkpointed import checkpointed
from prograde.estimators._estimator import Estimate, Estimator, check_whole, split_params, unpack


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
        return _reverse_mode(f, floats, state)


@dataclass(frozen=True)
class CheckpointedBackprop(Estimator):
    """The exact gradient by reverse mode that keeps few activations and computes the others again.

    The function is cut into segments of about equal multiply-adds; what enters a segment is kept, and what is inside is computed
    again when the reverse pass comes to it. So is the inside of every iteration of a `scan`. The model need not be written
    for it. The key is not used and may be `None`.

    **Arguments:**

    - `num_segments`: how many segments; `None` for the square root of the number of products and loops.

    **Bias and variance:** none.

    **Cost:** one more forward pass than `Backprop`; the memory of the activations of one segment, and of what enters each.
    XLA's CPU backend (jax 0.10 to 0.12) finds that code outside of loops is computed again and keeps the first result
    after all: there only what is inside loops is saved.

    **Errors:** `ValueError` for `num_segments` below 1; else as `Backprop`.

    **Source:** Chen et al., arXiv 1604.06174.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def deep(w):
        ...     x = jnp.ones(4)
        ...     for _ in range(9):
        ...         x = jnp.tanh(w @ x)
        ...     return jnp.sum(x)
        >>> value, grads = pg.value_and_grad(deep, pg.CheckpointedBackprop())(None, jnp.eye(4) / 2)
        >>> bool(jnp.allclose(grads, jax.grad(deep)(jnp.eye(4) / 2)))
        True
    """

    num_segments: int | None = None

    def __post_init__(self):
        if self.num_segments is not None:
            check_whole("num_segments", self.num_segments)

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        del key
        f, floats = split_params(fun, params, args, has_aux)
        return _reverse_mode(checkpointed(f, self.num_segments), floats, state)


def _reverse_mode(f, floats, state):
    def mean_loss(floats):
        loss, aux = f(floats)
        return jnp.mean(loss), aux

    (value, aux), grads = jax.value_and_grad(mean_loss, has_aux=True)(floats)
    return Estimate(value, unpack(aux), grads, None, state)
