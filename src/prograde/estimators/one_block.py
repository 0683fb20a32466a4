"""What an estimate along tangents in one block computes: derivatives, their sum, and the step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from prograde._costs import multiply_adds
from prograde._structured import NEEDS_VALUES, Choice, Group, LowRankTangent, Tangent
from prograde.kit import Loss, projected, weighted_sum
from prograde.tangents import Blocks, threefry

_MOST_TERMS = 16  # a sum of so few products is fused with what uses it, and never formed


class OneBlock:
    """The block that a key chooses, and `total` tangents in it."""

    def __init__(
        self,
        blocks: Blocks,
        key: Key[Array, ""],
        floats: PyTree[Array],
        total: int,
    ):
        self.blocks, self.floats, self.total = blocks, floats, total
        # as numbers: `vmap` of a branch reads its operands twice, which JAX takes as reuse of a key
        self._key_data = jax.random.key_data(threefry(jax.random.clone(key)))
        self.groups = blocks.groups(floats)
        p = blocks.probability(floats)
        self.block = blocks.choice(key, p)
        self.scale = 1 / jnp.sqrt(jnp.asarray(p, jnp.float32)[self.block])

    @property
    def key(self) -> Key[Array, ""]:
        """The key of the tangents."""
        return jax.random.wrap_key_data(self._key_data, impl="threefry2x32")

    def along(self, loss: Loss, index: Array) -> tuple[Array, Array, PyTree]:
        """`Loss.along` the tangent with this index."""
        drawn = self.blocks.by_group(self.groups, lambda some: self._within(some, index))
        choice = Choice(self.block, lambda g: drawn(self.groups[g]))
        try:
            value, directional, aux = loss.along_block(self.groups, choice)
        except NEEDS_VALUES:  # Python code branches on the values of the parameters
            return loss.along(self.blocks.sample(self.key, self.floats, index, self.total))
        return value, self.scale.astype(directional.dtype) * directional, aux

    def sum(self, weights: Float[Array, " k"], projection: bool) -> PyTree[Array]:
        """sum_k weights_k v_k, after the projection where one was asked for.

        Blocks that were not chosen get zeros. Sums of few products are zero by a factor, so that
        they fuse with what uses them. Others are not computed.
        """
        leaves, treedef = jax.tree.flatten(self.floats)
        found: list[Any] = [None] * len(leaves)
        sum_within = self._sum_within(weights, projection)
        for group in self.groups:
            here, layer = self._here(group)
            own = [leaves[i] for i in group.leaves]

            def whole(scale: Array, group: Group = group, layer: Array = layer) -> list[Array]:
                sums = sum_within(group, scale)
                return sums if group.layers is None else [_placed(x, layer, group) for x in sums]

            if not projection and self._fuses(group):
                parts = whole(jnp.where(here, self.scale, 0))
            else:
                kinds = jax.eval_shape(whole, self.scale)
                parts = lax.cond(here, whole, partial(_zeros_like, kinds), self.scale)
            for i, w, x in zip(group.leaves, own, parts, strict=True):
                found[i] = x.reshape(w.shape)
        return treedef.unflatten(found)

    def descend(
        self, weights: Float[Array, " k"], projection: bool, rate: float | Array
    ) -> PyTree[Array]:
        """The parameters minus rate * sum_k weights_k v_k; nothing but the block is written."""
        leaves, treedef = jax.tree.flatten(self.floats)
        sum_within = self._sum_within(weights, projection)
        for group in self.groups:
            here, layer = self._here(group)

            def moved(own: list[Array], group: Group = group, layer: Array = layer) -> list[Array]:
                found = []
                for w, g in zip(own, sum_within(group, self.scale), strict=True):
                    at = w if group.layers is None else lax.dynamic_index_in_dim(w, layer, 0, False)
                    # as in `SeededEstimator.descend`: the gradient has the dtype of its parameter
                    new = (at - rate * g.astype(w.dtype)).astype(w.dtype)
                    if group.layers is not None:
                        new = lax.dynamic_update_index_in_dim(w, new, layer, 0)
                    found.append(new)
                return found

            own = [leaves[i] for i in group.leaves]
            for i, w in zip(group.leaves, lax.cond(here, moved, list, own), strict=True):
                leaves[i] = w
        return treedef.unflatten(leaves)

    def _within(self, groups: Sequence[Group], index: Array) -> dict[int, Tangent]:
        return self.blocks.within(groups, self.key, self.floats, index, self.total)

    def _sum_within(
        self, weights: Array, projection: bool
    ) -> Callable[[Group, Array], list[Array]]:
        """The sum for the leaves of a block, or of one layer of a stack, by 1 / sqrt(p)."""

        def all_of(groups: Sequence[Group]) -> dict[int, Tangent]:
            return jax.vmap(lambda index: self._within(groups, index))(jnp.arange(self.total))

        drawn = self.blocks.by_group(self.groups, all_of)

        def of(group: Group, scale: Array) -> list[Array]:
            tangents = drawn(group)
            if projection:
                # of u in place of v: the lengths of tangents have no part in a projection
                return weighted_sum(tangents, projected(tangents, weights / scale))
            return weighted_sum(tangents, weights * scale.astype(weights.dtype))

        return of

    def _here(self, group: Group) -> tuple[Array, Array]:
        """Whether the chosen block is one of the group, and which."""
        layer = self.block - group.first
        return (layer >= 0) & (layer < group.size), jnp.clip(layer, 0, group.size - 1)

    def _fuses(self, group: Group) -> bool:
        drawn = jax.eval_shape(lambda: list(self._within([group], jnp.int32(0)).values()))
        large = lambda v: isinstance(v, LowRankTangent) or v.size < 2**12  # noqa: E731
        terms = lambda v: v.factors[0].shape[-1] if isinstance(v, LowRankTangent) else 1  # noqa: E731
        return all(large(v) and self.total * terms(v) <= _MOST_TERMS for v in drawn)


def block_costs(blocks: Blocks, loss: Loss) -> list[int]:
    """The multiply-adds of a run along one tangent in each block."""
    groups, key = blocks.groups(loss.floats), jax.random.key(0)
    tangents = blocks.within(groups, key, loss.floats)
    return loss.block_costs(groups, lambda g: [tangents[i] for i in groups[g].leaves])


def mean_cost(estimator: Any, loss: Loss, bare: int) -> float | None:
    """The multiply-adds of an estimate in blocks, in the mean over the choice.

    `None` for an estimator whose tangents are not in blocks, and for a function that branches on
    values. `bare` are the multiply-adds of the loss.
    """
    blocks = getattr(estimator, "tangents", None)
    if not isinstance(blocks, Blocks) or not hasattr(estimator, "num_groups"):
        return None
    num = estimator.num_tangents
    try:
        costs = block_costs(blocks, loss)
    except NEEDS_VALUES:
        return None
    one = OneBlock(blocks, jax.random.key(0), loss.floats, num * estimator.num_groups)
    weights = jnp.zeros(num * estimator.num_groups)
    update = multiply_adds(jax.make_jaxpr(lambda w: one.sum(w, False))(weights).jaxpr)
    mean = sum(p * c for p, c in zip(blocks.probability(loss.floats), costs, strict=True))
    return float(bare + num * (mean - bare) + update)


def _zeros_like(kinds: list[jax.ShapeDtypeStruct], _: Array) -> list[Array]:
    return [jnp.zeros(x.shape, x.dtype) for x in kinds]


def _placed(x: Array, layer: Array, group: Group) -> Array:
    """The sum for one layer as one for the stack."""
    assert group.layers is not None
    at = (jnp.arange(group.layers) == layer).reshape(-1, *(1,) * x.ndim)
    return jnp.where(at, x, 0)
