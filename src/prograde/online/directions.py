"""Directions for `DODGE` that follow a guess of the gradient."""

import abc
from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

from prograde._structured import Tangent
from prograde.kit import check_positive, checked_floats
from prograde.online._learner import OnlineLearner, one_step
from prograde.tangents import Normal, TangentDistribution


class PastWindow(eqx.Module):
    """The window that has ended, as a direction function of `DODGE` is given it.

    **Fields:**

    - `learner`: the `DODGE` itself, with its `cell` and `loss`.
    - `params`: the parameters now.
    - `state`: the state at the start of the window.
    - `inputs`, `targets`: those of the window, with a leading axis of its length.
    - `directions`: its directions, with a leading axis of `num_tangents`.
    - `grads`: the mean of its gradient estimates.
    - `count`: the number of windows so far; 0 before the first, when all else is zero.

    **Source:** Silver et al. 2022, Learning by directional gradient descent (ICLR).

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def along_the_last_estimate(key, past):      # and along a random direction
        ...     return jnp.stack([past.grads, jax.random.normal(key, past.params.shape)])
        >>> cell = lambda w, s, x: (jnp.tanh(w * s + x),) * 2
        >>> learner = pg.online.DODGE(
        ...     cell, lambda output, target: jnp.sum((output - target) ** 2),
        ...     window=10, directions=along_the_last_estimate, num_tangents=2)
        >>> carry = learner.init(jnp.ones(3), jnp.zeros(3), jnp.zeros(3), jnp.zeros(3))
    """

    learner: OnlineLearner = eqx.field(static=True)
    params: PyTree
    state: PyTree[Array]
    inputs: PyTree[Array]
    targets: PyTree[Array]
    directions: PyTree[Tangent]
    grads: PyTree[Array]
    count: Int[Array, ""]


@dataclass(frozen=True)
class Guess(abc.ABC):
    """Directions: a guess of the gradient, then random ones. Subclass and implement `guess`.

    With `combine="projection"` the estimate is the gradient's projection onto their span. For any
    guess, that is at least as good as the guess corrected in length.

    **Arguments:** `others`, the distribution of the other directions.

    **Source:** Silver et al. 2022, Learning by directional gradient descent (ICLR); arXiv
    2312.04709.

    Examples:
        >>> import prograde as pg
        >>> isinstance(pg.online.Momentum(), pg.online.Guess)
        True
    """

    others: TangentDistribution = field(default_factory=Normal, kw_only=True)

    @abc.abstractmethod
    def guess(self, past: PastWindow) -> PyTree[Array]:
        """A guess of the gradient, a tree like the float arrays of the parameters."""

    def __call__(self, key: Key[Array, ""], past: PastWindow) -> PyTree[Array]:
        """The directions, with a leading axis of `num_tangents`."""
        floats, _ = checked_floats(past.params)
        k = past.learner.num_tangents  # pyright: ignore[reportAttributeAccessIssue]
        random = jax.vmap(lambda i: self.others.sample(key, floats, i, k))(
            jnp.arange(k, dtype=jnp.int32)
        )
        guess = self.guess(past)
        # before the first window there is nothing to guess from
        return jax.tree.map(
            lambda r, g: r.at[0].set(jnp.where(past.count > 0, g.astype(r.dtype), r[0])),
            random,
            guess,
        )


@dataclass(frozen=True)
class Momentum(Guess):
    """The running mean of the gradient estimates.

        m <- decay m + (1 - decay) g

    **Arguments:** `decay`, between 0 and 1; `others`, as in `Guess`.

    **Errors:** `ValueError` for another `decay`.

    **Source:** Silver et al. 2022, Learning by directional gradient descent (ICLR).

    Examples:
        >>> import prograde as pg
        >>> pg.online.Momentum(decay=0.95).decay
        0.95
    """

    decay: float = 0.9

    def __post_init__(self):
        check_positive("decay", self.decay, at_most=1.0)

    def guess(self, past):
        mean = jax.tree.map(lambda v: v[0], past.directions)
        mix = lambda m, g: self.decay * m + (1 - self.decay) * g  # noqa: E731
        # the first direction of the first window was random: nothing of it is kept
        return jax.tree.map(lambda m, g: jnp.where(past.count > 1, mix(m, g), g), mean, past.grads)


@dataclass(frozen=True)
class TruncatedBackprop(Guess):
    """The gradient of the past window by truncated backpropagation.

    A projection keeps what it holds of the true gradient, and corrects the rest.

        guess = d/dtheta sum_(t in window) L_t,  from the state at its start, taken as a constant

    **Arguments:** `others`, as in `Guess`.

    **Cost:** keeps a window of inputs and backpropagates through it once a window: memory grows
    with the window.

    **Source:** Silver et al. 2022, Learning by directional gradient descent (ICLR).

    Examples:
        >>> import prograde as pg
        >>> pg.online.TruncatedBackprop()
        TruncatedBackprop(others=Normal())
    """

    def guess(self, past):
        learner = past.learner
        floats, rest = checked_floats(past.params)

        def loss_of(floats):
            def one(state, pair):
                float_state, other = eqx.partition(state, eqx.is_inexact_array)
                params = eqx.combine(floats, rest)
                step = one_step(learner.cell, learner.loss, params, state, *pair)
                (loss, float_state), other = step(floats, float_state)
                return eqx.combine(float_state, other), loss

            return jnp.sum(lax.scan(one, past.state, (past.inputs, past.targets))[1])

        return jax.grad(loss_of)(floats)
