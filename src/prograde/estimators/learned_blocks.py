"""One block a step, chosen by what the blocks bring for their cost."""

import dataclasses
from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from prograde._inject import varying_like
from prograde.estimators.one_block import block_costs
from prograde.estimators.weight_perturbation import WeightPerturbation
from prograde.kit import Estimator, Loss, check_key, check_positive, float_leaves
from prograde.tangents import Blocks


class BlockState(eqx.Module):
    """What `LearnedBlocks` carries from step to step.

    **Fields:**

    - `slopes`: for each block, an average of (grad f . u)^2 along tangents u of the block.
    - `visits`: how often each block was chosen.
    - `costs`: the multiply-adds of a step in each block, over those of the cheapest.
    """

    slopes: Float[Array, " blocks"]
    visits: Int[Array, " blocks"]
    costs: Float[Array, " blocks"]


@dataclass(frozen=True)
class LearnedBlocks(Estimator):
    """One block a step, chosen by the size of its gradient for its cost, as seen in earlier steps.

        p_l = (1 - floor) w_l / sum w + floor / (number of blocks),  w_l = sqrt(n_l / cost_l) |g_l|

    Without a floor these minimise the second moment times the cost of a step. |g_l|^2 is the mean
    of (grad f . u)^2 along tangents u in the block, which each step in the block computes anyway.

    **Arguments:**

    - `estimator`: a `WeightPerturbation` whose tangents are `Blocks`. Their probabilities are
      replaced.
    - `floor`: the share of steps that choose all blocks evenly, above 0.
    - `decay`: a new value has the weight 1 - decay in its average.

    **State:** a `BlockState`. A block that was not yet chosen counts as the mean of the others. The
    choice of a step depends on earlier steps alone.

    **Bias:** that of `estimator`, for any state: none for the mean of forward gradients.

    **Variance:** sum_l c_l |g_l|^2 / p_l, with c_l of the tangents in the block. The best p_l leave
    (sum_l sqrt(n_l) |g_l|)^2 of n |grad f|^2 where costs are equal.

    **Cost:** that of `estimator`. `init` traces the function to count the costs.

    **Errors:** `TypeError` for an estimator whose tangents are not in blocks; `ValueError` for
    `floor` or `decay` out of range, and for the state of other blocks.

    **Source:** importance sampling of coordinates for descent, arXiv 1206.2322 for the choice by
    fixed probabilities; Neyman's allocation of samples to strata (1934).

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def loss_fn(params):
        ...     return jnp.sum(params["a"] ** 2) + 100 * jnp.sum(params["b"] ** 2)
        >>> params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}
        >>> estimator = pg.LearnedBlocks(pg.WeightPerturbation(pg.Blocks()))
        >>> state = estimator.init(loss_fn, params)
        >>> step = jax.jit(lambda key, s: estimator.estimate(loss_fn, key, s, params).state)
        >>> for key in jax.random.split(jax.random.key(0), 50):
        ...     state = step(key, state)
        >>> bool(state.visits[1] > state.visits[0])
        True
    """

    estimator: WeightPerturbation = field(default_factory=lambda: WeightPerturbation(Blocks()))
    floor: float = 0.3
    decay: float = 0.95

    def __post_init__(self):
        if not isinstance(self.estimator, WeightPerturbation) or not isinstance(
            self.estimator.tangents, Blocks
        ):
            raise TypeError(
                f"estimator={self.estimator!r}, but a WeightPerturbation is needed whose tangents "
                "are Blocks, such as WeightPerturbation(Blocks(LowRank(rank=1)))."
            )
        if self.estimator.combine != "mean":
            raise ValueError(
                f"estimator has combine={self.estimator.combine!r}, but what the combination needs "
                "to know of the choice changes from step to step. Use combine='mean'."
            )
        check_positive("floor", self.floor, at_most=1)
        check_positive("decay", self.decay)
        if self.decay >= 1:
            raise ValueError(f"decay={self.decay!r}, but a number above 0 and below 1 is needed.")

    @property
    def _blocks(self) -> Blocks:
        assert isinstance(self.estimator.tangents, Blocks)
        return self.estimator.tangents

    def init(self, fun, params, *args, has_aux=False):
        loss = Loss(fun, params, args, has_aux, self.estimator.custom_vjp)
        costs = jnp.asarray(block_costs(self._blocks, loss), jnp.float32)
        num = len(costs)
        return BlockState(jnp.zeros(num), jnp.zeros(num, jnp.int32), costs / jnp.min(costs))

    def probability(self, state: BlockState, params: PyTree[Array]) -> Float[Array, " blocks"]:
        """The probability of each block in the next step."""
        seen = state.visits > 0
        mean = jnp.sum(state.slopes) / jnp.maximum(jnp.sum(seen), 1)
        slopes = jnp.where(seen, state.slopes, jnp.where(jnp.any(seen), mean, 1))
        sizes = jnp.asarray(self._blocks.sizes(params), jnp.float32)
        weights = jnp.sqrt(sizes * slopes / state.costs)
        total, num = jnp.sum(weights), len(weights)
        # without any slope, or with one that is not finite, all blocks are chosen evenly
        usable = (total > 0) & jnp.isfinite(total)
        share = jnp.where(usable, weights / jnp.where(usable, total, 1), 1 / num)
        return (1 - self.floor) * share + self.floor / num

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        check_key(key)
        floats = float_leaves(params)
        if not isinstance(state, BlockState) or len(state.slopes) != len(
            self._blocks.names(floats)
        ):
            raise ValueError(
                f"state={state!r}, but a state for the blocks {self._blocks.names(floats)} is "
                "needed. Make it by estimator.init with this estimator, function and parameters."
            )
        p = self.probability(state, floats)
        chosen = dataclasses.replace(self._blocks, probabilities=p)
        inside = dataclasses.replace(self.estimator, tangents=chosen)
        found = inside.estimate(fun, key, None, params, *args, has_aux=has_aux)
        groups = self.estimator.num_groups
        assert found.directional is not None
        slopes = found.directional.reshape(self.estimator.num_tangents * groups, -1).mean(axis=1)
        return eqx.tree_at(
            lambda e: e.state,
            found,
            self._next(state, chosen.choice(key, p), p, jnp.mean(jnp.square(slopes))),
            is_leaf=lambda x: x is None,
        )

    def _next(self, state: BlockState, block: Array, p: Array, slope: Array) -> BlockState:
        """The state after a step in a block. `slope` is (grad f . v)^2 along v = u / sqrt(p)."""
        state, p = jax.tree.map(lambda x: varying_like(x, slope, block), (state, p))
        slope, block = varying_like(slope, block), varying_like(block, slope)
        rate = jnp.maximum(1 / (state.visits[block] + 1), 1 - self.decay)
        new = (p[block] * slope).astype(state.slopes.dtype)
        moved = state.slopes[block] + rate * (new - state.slopes[block])
        # a slope that is not finite would decide all later choices
        moved = jnp.where(jnp.isfinite(new), moved, state.slopes[block])
        return BlockState(
            state.slopes.at[block].set(moved), state.visits.at[block].add(1), state.costs
        )
