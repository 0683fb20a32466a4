"""One update of an optimizer for the gradients of several steps."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from prograde.kit import check_whole


class _Sum(eqx.Module):
    """The sum of the gradients since the last update, their number, and the optimizer's state."""

    grads: PyTree[Array]
    count: Int[Array, ""]
    state: PyTree


@dataclass(frozen=True)
class Every:
    """An optimizer that adds up gradients, and updates once in `steps` steps.

    Between updates the parameters stay, so the gradients of `RTRL` add up to exactly those of
    backpropagation through time. `optax.MultiSteps` gives the same updates, and runs the optimizer
    at every step.

    **Arguments:**

    - `optimizer`: an object with the methods `init` and `update` of Optax. It is given the sum.
    - `steps`: the number of steps.

    **Cost:** one more array for each parameter, and an addition a step.

    **Errors:** `ValueError` for `steps` below 1.

    **Source:** none; the usual accumulation of gradients.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prograde as pg
        >>> learner = pg.online.RTRL(
        ...     lambda w, s, x: (w * s + x,) * 2, lambda output, target: (output - target) ** 2)
        >>> w, key, xs = jnp.array(0.5), jax.random.key(0), jnp.ones(4)
        >>> optimizer = pg.online.Every(optax.sgd(0.1), 4)
        >>> carry, opt_state = learner.init(w, jnp.array(0.0)), optimizer.init(w)
        >>> for n in (3, 1):
        ...     carry, opt_state, _ = pg.online.learn(
        ...         learner, optimizer, key, carry, opt_state, xs[:n], 2 * xs[:n])
        ...     print(f"{carry.params:.3f}")
        0.500
        0.769
    """

    optimizer: Any
    steps: int

    def __post_init__(self):
        check_whole("steps", self.steps)

    def init(self, params: PyTree) -> PyTree:
        """The state before the first step."""
        grads = jax.tree.map(jnp.zeros_like, params)
        return _Sum(grads, jnp.zeros((), jnp.int32), self.optimizer.init(params))

    def update(
        self, grads: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """(updates, state): zeros, but at every `steps`-th step."""
        total = jax.tree.map(jnp.add, state.grads, grads)
        count = state.count + 1

        def due() -> tuple[PyTree, PyTree, PyTree]:
            updates, inner = self.optimizer.update(total, state.state, params)
            return updates, jax.tree.map(jnp.zeros_like, total), inner

        def not_due() -> tuple[PyTree, PyTree, PyTree]:
            updates = jax.eval_shape(due)[0]
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), updates), total, state.state

        updates, total, inner = lax.cond(count == self.steps, due, not_due)
        return updates, _Sum(total, count % self.steps, inner)
