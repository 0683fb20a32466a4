"""Weight perturbation: the forward gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from prograde.estimators.one_block import OneBlock
from prograde.kit import (
    Loss,
    SeededEstimator,
    Share,
    check_choice,
    check_key,
    check_tangents,
    check_whole,
    float_leaves,
    in_chunks,
    in_groups,
    is_structured,
    projected,
    tangents_at_once,
    unpack,
    weighted_sum,
)
from prograde.tangents import Blocks, LowRank, TangentDistribution


@dataclass(frozen=True)
class WeightPerturbation(SeededEstimator):
    """The forward gradient: random tangents, each weighted by its exact directional derivative.

        g = 1/K sum_k (grad f . v_k) v_k

    `WeightPerturbation(Normal(), num_tangents=1)` is the estimator of the paper, exactly.

    **Arguments:**

    - `tangents`: the distribution of v, such as `Normal()`, `LowRank(rank=1)` or
      `Blocks(LowRank(rank=1))`.
    - `num_tangents`: K, at least 1.
    - `chunk`: the number of tangents that run through the function together. `None` takes as many
      as need no more memory than the parameters, or than 256 MiB where that is more, by a count of
      what is live at once. The result does not depend on it
      (up to rounding). The memory does: it holds the activations of one layer for `chunk` tangents,
      and whatever else the function saves.
    - `combine`: how the K tangents, the columns of V, and d = V^T grad f make the estimate:
        - `"mean"`: g = V d / K, the unbiased estimate;
        - `"shrunk"`: a V d / K with a = 1/c and c = E |V d / K|^2 / |grad f|^2. No other multiple
          of the mean has a smaller mean squared error. (Where c differs between leaves, it is
          averaged over the parameters, and this holds approximately.)
        - `"projection"`: V (V^T V)^+ d, the orthogonal projection of the gradient onto the span of
          the tangents. Dependent tangents are allowed.
    - `num_groups`: G. The batch is cut into G groups of examples with tangents of their own, which
      run in the same products. The estimate is the mean of the groups' estimates. Arrays in the
      arguments have the examples along their first axis. The loss of a group is that of the
      function on the group alone (batch statistics are those of a group), and `aux` gets a leading
      axis for the groups.
    - `custom_vjp`: what to do with functions that have a `jax.custom_vjp`, a rule for reverse mode,
      which JAX refuses to differentiate forward. `"error"` raises; `"inline"` differentiates the
      code of the function. The custom rule is then ignored: if it differs from the derivative of
      the code, so does the result.

    **Bias:** none with `"mean"`, for any function and any K. With groups this holds where the loss
    is a mean over examples, or is given per example: the estimate is of the gradient of the mean of
    the groups' losses. A loss that is a sum over the batch gives a G-th of its value and gradient;
    a weighted mean is off where groups have different total weights. `prograde.check` tests this.
    `"shrunk"` has E[g] = a grad f, with a = 1/(n + kappa_4 - 1) for one tangent of n independent
    entries of fourth moment kappa_4. `"projection"` has E[g] = (K/n) grad f where the span is
    uniformly distributed (`Normal`, `Sphere`, `Orthogonal`; K <= n), and grad f / n for one tangent
    of fixed length.

    **Variance:** one tangent gives E |g|^2 = sum_l c_l |grad_l f|^2 with c_l from
    `tangents.second_moment`, close to the number of parameters n. The mean of K independent
    tangents has 1/K of the variance. G groups divide it by G again where all groups have the same
    gradient; in general E |g|^2 = |grad f|^2 + sum_g (c - 1) |grad f_g|^2 / (K G^2). A projection
    never makes an error larger than the gradient: |g - grad f|^2 = (1 - cos^2) |grad f|^2, which is
    (1 - K/n) |grad f|^2 in the mean for uniform spans.

    **Cost:** one forward run gives the loss and a directional derivative. A dense tangent doubles
    the multiply-adds and draws n random numbers; a low-rank one adds little to each. The K tangents
    share one evaluation of the function (one per chunk), one dropout mask and one update of batch
    statistics. No activation is stored. Structured tangents are not formed before they are summed.
    `"projection"` needs all tangents at once: K times the parameters for dense ones, little for
    structured ones, whose inner products follow from their factors.

    **Errors:** `ValueError` for `num_tangents`, `chunk` or `num_groups` below 1, a batch that the
    groups do not divide, another `combine` or `custom_vjp`; `TypeError` for complex parameters, an
    old-style key, a loss that is not real, or a function that forward mode cannot pass; all at
    trace time. Nothing is raised where the value is finite and a tangent is not: such a tangent
    makes `directional` and `grads` not finite.

    With `Blocks`, what comes before the block runs without a tangent, and `descend` writes nothing
    but the block.

    **Source:** arXiv 2202.08587; several tangents and the least mean squared error: arXiv
    2310.14168; orthogonal projection onto a guessed subspace: FROG, in "How to guess a gradient",
    arXiv 2312.04709.

    Examples:
        >>> import jax, jax.numpy as jnp, prograde as pg
        >>> def loss_fn(params, x, y):
        ...     return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
        >>> params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
        >>> estimator = pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=16, chunk=8)
        >>> grad_fn = jax.jit(pg.value_and_grad(loss_fn, estimator))
        >>> value, grads = grad_fn(jax.random.key(0), params, jnp.ones((2, 8)), jnp.zeros((2, 4)))
        >>> float(value), grads["w"].shape
        (64.0, (8, 4))
    """

    tangents: TangentDistribution = field(default_factory=LowRank)
    num_tangents: int = 1
    chunk: int | None = None
    combine: Literal["mean", "shrunk", "projection"] = "mean"
    num_groups: int = 1
    custom_vjp: Literal["error", "inline"] = "error"

    def __post_init__(self):
        check_tangents(self.tangents)
        check_whole("num_tangents", self.num_tangents)
        check_whole("num_groups", self.num_groups)
        if self.chunk is not None:
            check_whole("chunk", self.chunk)
        check_choice("combine", self.combine, ("mean", "shrunk", "projection"))
        check_choice("custom_vjp", self.custom_vjp, ("error", "inline"))
        if self.num_groups > 1 and self.combine != "mean":
            raise ValueError(
                f"combine={self.combine!r} with num_groups={self.num_groups}, but each group has "
                "derivatives of a function of its own, and only their mean estimates one gradient. "
                "Use combine='mean' or num_groups=1."
            )
        if (
            isinstance(self.tangents, Blocks)
            and self.combine == "projection"
            and not (
                isinstance(self.tangents.probabilities, str)
                and self.tangents.probabilities == "size"
            )
        ):
            raise ValueError(
                "combine='projection' in Blocks with "
                f"probabilities={self.tangents.probabilities!r}, but the mean of projections in "
                "the blocks is p_l K / n_l times the gradient of block l: a multiple of the "
                "gradient only for p_l ~ n_l. Use probabilities='size' or combine='mean'."
            )

    def estimate(self, fun, key, state, params, *args, has_aux=False):
        loss, run, size = self._runs(fun, key, params, args, has_aux, Share())
        k, g = self.num_tangents, self.num_groups
        late = self._summed_last(key, loss.floats)
        if size >= k and not self._in_blocks:  # all tangents are at hand together
            late = jax.tree.map(lambda _: False, late)

        def add_chunk(sums, indices):
            value, aux, directional, tangents = run(indices)
            not_padding = jnp.repeat(indices < k, g)
            weights = jnp.where(not_padding, self._weights(loss.floats, directional), 0)
            if tangents is not None:
                early = jax.tree.map(lambda late, v: None if late else v, late, tangents)
                sums = _plus(sums, self._combined(early, weights))
            return sums, (value, aux), directional

        sums, (value, aux), directional = in_chunks(add_chunk, None, k, size)
        summed_last = eqx.filter(loss.floats, late)
        if jax.tree.leaves(summed_last):
            weights = self._weights(loss.floats, directional)
            last = self._summed(key, summed_last, weights)
            sums = last if sums is None else eqx.combine(sums, last)
        # one axis for the groups and their examples
        directional = directional[:, 0] if g == 1 else directional.reshape(k, -1)
        return loss.estimate(value, sums, directional, aux, state)

    def derivatives(self, fun, key, params, *args, has_aux=False, share=None):
        share = share or Share()
        k, g = share.of_tangents(self.num_tangents), share.of_groups(self.num_groups)
        _, run, size = self._runs(fun, key, params, args, has_aux, share)

        def of_chunk(_, indices):
            value, aux, directional, _ = run(indices)
            return None, (value, aux), directional.reshape(len(indices), g, -1).mean(axis=2)

        _, (value, aux), directional = in_chunks(of_chunk, None, k, size, share.tangent * k)
        return value, unpack(aux), directional[..., None]

    def gradient(self, key, params, derivatives):
        check_key(key)
        floats = float_leaves(params)
        weights = self._weights(floats, derivatives)
        at_once, one_by_one = eqx.partition(floats, self._summed_last(key, floats))

        def add(sums, indices):
            tangents = self._drawn(key, one_by_one, indices)
            return _plus(sums, weighted_sum(tangents, weights[indices])), None, ()

        sums = None
        if jax.tree.leaves(one_by_one):
            sums, _, _ = in_chunks(add, None, self.num_tangents * self.num_groups, 1)
        if jax.tree.leaves(at_once):
            last = self._summed(key, at_once, weights)
            sums = last if sums is None else eqx.combine(sums, last)
        return jax.tree.map(lambda g, w: g.astype(w.dtype), sums, floats)

    def descend(self, key, params, derivatives, rate):
        if not self._in_blocks:
            return super().descend(key, params, derivatives, rate)
        check_key(key)
        floats = float_leaves(params)
        weights = self._weights(floats, derivatives)
        moved = self._block(key, floats).descend(weights, self.combine == "projection", rate)
        return eqx.combine(moved, params)

    @property
    def _in_blocks(self) -> bool:
        return isinstance(self.tangents, Blocks)

    def _block(self, key: Any, floats: PyTree[Array]) -> OneBlock:
        assert isinstance(self.tangents, Blocks)
        return OneBlock(self.tangents, key, floats, self.num_tangents * self.num_groups)

    def _runs(
        self, fun: Any, key: Any, params: Any, args: Any, has_aux: bool, share: Share
    ) -> tuple[Loss, Callable[[Array], tuple], int]:
        """(loss, run, size): the runs along a share of the tangents, for a share of the groups.

        `run(indices)` is (value, packed aux, directional [tangents, groups, *batch], tangents with
        one leading axis for both). `size` is the number of tangents to run together.
        """
        check_key(key)
        total = self.num_tangents * self.num_groups
        k, g = share.of_tangents(self.num_tangents), share.of_groups(self.num_groups)
        first = share.group * g if self.num_groups > 1 else 0
        # int32, the dtype of `lax.axis_index`: with 64-bit integers nothing has to be promoted
        groups = first + jnp.arange(g, dtype=jnp.int32)
        arrays, rest = in_groups(args, g)

        def loss_of(args):
            return Loss(fun, params, args, has_aux, self.custom_vjp)

        loss = loss_of(args)
        block = self._block(key, loss.floats) if self._in_blocks else None

        def one_group(index: Any, arrays: PyTree) -> tuple[Any, Any, Any, Any]:
            loss = loss_of(eqx.combine(arrays, rest))
            if block is not None:
                value, directional, aux = block.along(loss, index)
                return value, aux, directional, None
            tangents = self.tangents.sample(key, loss.floats, index, total)
            value, directional, aux = loss.along(tangents)
            return value, aux, directional, tangents

        def all_groups(index):
            """Every group along a tangent of its own, the results along a leading axis."""
            if g == 1:
                value, aux, *others = one_group(index * self.num_groups + groups[0], arrays)
                return value, aux, *jax.tree.map(lambda x: x[None], others)
            value, *others = jax.vmap(one_group)(index * self.num_groups + groups, arrays)
            return jnp.mean(value), *others

        def run(indices):
            if len(indices) == 1:
                value, aux, directional, tangents = all_groups(indices[0])
                return value, aux, directional[None], tangents
            value, aux, directional, tangents = jax.vmap(all_groups)(indices)
            # all tangents have the same primal
            value, aux = jax.tree.map(lambda x: x[0], (value, aux))
            return value, aux, directional, jax.tree.map(_merged, tangents)

        of_group = loss if g == 1 else loss_of(jax.tree.map(lambda x: x[0], arrays))
        return loss, run, tangents_at_once(self.chunk, k, of_group, loss.floats, run)

    def _drawn(self, key: Any, floats: PyTree[Array], indices: Array | None = None) -> PyTree:
        """The tangents with these indices, or all of them, along a leading axis."""
        total = self.num_tangents * self.num_groups
        indices = jnp.arange(total) if indices is None else indices
        return jax.vmap(lambda index: self.tangents.sample(key, floats, index, total))(indices)

    def _summed(self, key: Any, floats: PyTree[Array], weights: Array) -> PyTree[Array]:
        """`_combined`, of all tangents, which are drawn again."""
        if self._in_blocks:
            return self._block(key, floats).sum(weights, self.combine == "projection")
        return self._combined(self._drawn(key, floats), weights)

    def _combined(self, tangents: PyTree, weights: Array) -> PyTree[Array]:
        """sum_k weights_k v_k, after the projection where one was asked for."""
        if self.combine == "projection" and jax.tree.leaves(tangents):
            weights = projected(tangents, weights)
        return weighted_sum(tangents, weights)

    def _weights(self, floats: PyTree[Array], directional: Array) -> Array:
        """The weight of each tangent of each group, before a projection."""
        per_tangent = directional.reshape(directional.shape[0] * directional.shape[1], -1)
        return self._scale(floats) * per_tangent.mean(axis=1)

    def _scale(self, floats: PyTree[Array]) -> float:
        """The ratio of a tangent's weight to its directional derivative."""
        if self.combine == "projection":
            return 1.0
        num_tangents = self.num_tangents * self.num_groups
        sizes = [w.size for w in jax.tree.leaves(floats)]
        if self.combine == "mean" or not any(sizes):
            return 1 / num_tangents
        moments = jax.tree.leaves(self.tangents.second_moment_of_mean(floats, num_tangents))
        return sum(sizes) / sum(c * n for c, n in zip(moments, sizes, strict=True)) / num_tangents

    def _summed_last(self, key: Any, floats: PyTree[Array]) -> PyTree[bool]:
        """Which leaves' tangents are drawn again and summed when all derivatives are known.

        Structured ones are, which are cheap to draw and to hold, and all tangents of a projection,
        whose weights depend on each other.
        """
        total = self.num_tangents * self.num_groups
        if self.combine == "projection" or self._in_blocks:
            return jax.tree.map(lambda _: True, floats)
        tangents = jax.eval_shape(lambda: self.tangents.sample(key, floats, 0, total))
        return jax.tree.map(is_structured, tangents, is_leaf=is_structured)


def _plus(sums: PyTree[Array] | None, others: PyTree[Array]) -> PyTree[Array]:
    return others if sums is None else jax.tree.map(jnp.add, sums, others)


def _merged(x: Array) -> Array:
    """The first two axes as one. No -1 in the shape, as a leaf may be empty."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
