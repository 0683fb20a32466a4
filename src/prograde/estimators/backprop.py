"""Reverse mode, as the reference: plain, and with checkpoints."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from prograde._checkpointed import checkpointed
from prograde.kit import Estimator, Loss, check_whole


@dataclass(frozen=True)
class Backprop(Estimator):
    """The exact gradient by reverse-mode differentiation, through `jax.grad`: the reference.

    The function must be reversible, and its activations are stored. The key is not used and may be
    `None`.

    **Bias and variance:** none.

    **Cost:** typically 2.5 to 4 forward passes, and memory for every activation.

    **Errors:** as `jax.grad`; `ValueError` for a loss that is neither a scalar nor a vector of
    per-example losses.

    **Source:** reverse accumulation, as `jax.grad` does it.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> grad_fn = pg.value_and_grad(lambda w: jnp.sum(w ** 2), pg.Backprop())
        >>> value, grads = grad_fn(None, jnp.array([1.0, 2.0]))
        >>> print(value, grads)
        5.0 [2. 4.]
    """

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        del key
        loss = Loss(fun, params, args, has_aux)
        return _reverse_mode(loss, loss, state)


@dataclass(frozen=True)
class CheckpointedBackprop(Estimator):
    """The exact gradient by reverse mode that stores few activations and recomputes the others.

    The function is cut into segments of about equal multiply-adds. The inputs of a segment are
    stored; what is inside is computed again when the reverse pass comes to it. So is the inside of
    every iteration of a `scan`. The model need not be written for it. The key is not used and may
    be `None`.

    **Arguments:**

    - `num_segments`: the number of segments; `None` for the square root of the number of products
      and loops.

    **Bias and variance:** none.

    **Cost:** one more forward pass than `Backprop`; the memory of the activations of one segment,
    and of the inputs of all. XLA's CPU backend (jax 0.10 to 0.12) merges what is computed again
    outside of loops with the first computation: there only loops save memory.

    **Errors:** `ValueError` for `num_segments` below 1; otherwise as `Backprop`.

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
        loss = Loss(fun, params, args, has_aux)
        return _reverse_mode(checkpointed(loss, self.num_segments), loss, state)


def _reverse_mode(losses, loss, state):
    def mean_loss(floats):
        found, aux = losses(floats)
        return jnp.mean(found), aux

    (value, aux), grads = jax.value_and_grad(mean_loss, has_aux=True)(loss.floats)
    return loss.estimate(value, grads, None, aux, state)
