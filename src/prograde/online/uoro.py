"""Unbiased online recurrent optimization."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from prograde.kit import check_whole, float_leaves, wide
from prograde.online._learner import OnlineLearner


@dataclass(frozen=True)
class UORO(OnlineLearner):
    """Unbiased online recurrent optimization: a product of two vectors stands for the Jacobian.

        E[a b^T] = J_t
        a   <- r0 dF/ds a + r1 nu
        b   <- b / r0 + nu^T dF/dtheta / r1
        g_t  = (dL/ds . a) b + dL/dtheta

    nu has independent random signs, drawn anew each step. The ratios r0^2 = |b| / |dF/ds a| and
    r1^2 = |nu^T dF/dtheta| / |nu| minimise the variance.

    **Arguments:**

    - `cell`, `loss`, `max_bytes`: as in `OnlineLearner`.
    - `num_products`: how many independent products are carried. The estimate is their mean.

    **Bias:** none while the parameters stay, at any time and for any cell. **Variance:** grows with
    the size of the state and with how long it remembers; falls as 1 / `num_products`.

    **Cost:** memory n + s numbers for each product, for n parameters and a state of s. A step takes
    one reverse run for the loss and, for each product, a forward run with a tangent and a reverse
    run of this one step. Independent of the length of the stream.

    **Errors:** as `OnlineLearner`; `ValueError` for `num_products` below 1, and for a cell whose
    single step has no reverse mode, such as one with a `while_loop`: `DODGE` and `RTRL` take those.

    **Source:** Tallec & Ollivier, arXiv 1702.05043.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> cell = lambda w, s, x: (jnp.tanh(w @ s + x),) * 2
        >>> learner = pg.online.UORO(cell, lambda output, target: jnp.sum((output - target) ** 2))
        >>> carry = learner.init(0.1 * jnp.ones((8, 8)), jnp.zeros(8))
        >>> step, key = jax.jit(learner.step), jax.random.key(0)
        >>> carry, loss, grads = step(key, carry, jnp.ones(8), jnp.zeros(8))
        >>> carry.memory[0].shape, carry.memory[1].shape, grads.shape
        ((1, 8), (1, 8, 8), (8, 8))
    """

    num_products: int = 1

    _less_memory: ClassVar[str] = "UORO keeps num_products x (parameters + state): lower it. "

    def __post_init__(self):
        check_whole("num_products", self.num_products)

    def memory(self, params, state, input, target):
        floats, (flat, _) = float_leaves(params), ravel_pytree(float_leaves(state))
        k = self.num_products
        return jnp.zeros((k, flat.size), flat.dtype), jax.tree.map(
            lambda w: jnp.zeros((k, *w.shape), w.dtype), floats
        )

    def advance(self, key, step, carry, input, target):
        floats, state = float_leaves(carry.params), float_leaves(carry.state)
        flat, unravel = ravel_pytree(state)

        def of_both(floats, flat):
            (loss, following), rest = step(floats, unravel(flat))
            return (loss, ravel_pytree(following)[0]), rest

        try:
            (loss, following), pull_back, rest = jax.vjp(of_both, floats, flat, has_aux=True)
            own, slope_of_state = pull_back((jnp.ones_like(loss), jnp.zeros_like(following)))
        except ValueError as error:
            if "Reverse-mode differentiation" not in str(error):
                raise
            raise ValueError(
                "UORO takes the reverse mode of one step of the cell, which this cell does not "
                f"have: {error} Use DODGE or RTRL, which are forward only."
            ) from error

        def of_product(key, a, b):
            directional = jnp.vdot(wide(slope_of_state), wide(a))
            grads = jax.tree.map(
                lambda own, b: own + (directional * wide(b)).astype(own.dtype), own, b
            )
            signs = jax.random.rademacher(key, flat.shape, flat.dtype)
            carried = jax.jvp(lambda flat: of_both(floats, flat)[0][1], (flat,), (a,))[1]
            new, _ = pull_back((jnp.zeros_like(loss), signs))
            # a product with a zero factor, as after a reset of the state, adds nothing
            r0, s0 = _balance(_norm(b), _norm(carried))
            r1, s1 = _balance(_norm(new), _norm(signs))
            a = (r0 * wide(carried) + r1 * wide(signs)).astype(a.dtype)
            b = jax.tree.map(lambda b, w: (s0 * wide(b) + s1 * wide(w)).astype(b.dtype), b, new)
            return (a, b), grads

        memory, grads = jax.vmap(of_product)(
            jax.random.split(key, self.num_products), *carry.memory
        )
        grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        return memory, (loss, unravel(following)), rest, grads


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(wide(x))) for x in jax.tree.leaves(tree)))


def _balance(above, below):
    """sqrt(above / below) and its inverse; both 0 where either argument is 0."""
    defined = (above > 0) & (below > 0)
    r = jnp.sqrt(jnp.where(defined, above, 1) / jnp.where(defined, below, 1))
    return jnp.where(defined, r, 0), jnp.where(defined, 1 / r, 0)
